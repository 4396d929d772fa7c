package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// memory is a guard with a LastGood, whose calls go nowhere.
type memory struct {
	t testing.TB
	g *interceptors.Guard
}

func newMemory(t testing.TB, cfg interceptors.LastGoodConfig, opts ...interceptors.Option) *memory {
	if cfg.MaxAge == 0 {
		cfg.MaxAge = time.Minute
	}
	g := mustGuard(t, clientRules("timeout: 1h"), append(opts, interceptors.LastGood("*", cfg))...)
	return &memory{t, g}
}

// ask is one call: it gets a reply, or an error in place of it.
type ask struct {
	ctx    context.Context // default: the test's
	cc     *grpc.ClientConn
	method string // default: Unary
	req    any    // default: the text "question"
	reply  any    // that the caller gives; default: a message
	opts   []grpc.CallOption

	answer any   // what the server replies: a text or a message
	err    error // what it fails with
}

// call returns the caller's reply.
func (m *memory) call(a ask) (any, error) {
	m.t.Helper()
	if a.ctx == nil {
		a.ctx = m.t.Context()
	}
	if a.method == "" {
		a.method = rpctest.Unary
	}
	if a.req == nil {
		a.req = wrapperspb.String("question")
	}
	if a.reply == nil {
		a.reply = new(rpctest.Message)
	}
	err := m.g.UnaryClientInterceptor()(a.ctx, a.method, a.req, a.reply, a.cc,
		func(_ context.Context, _ string, _, reply any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
			switch answer := a.answer.(type) {
			case string:
				reply.(*rpctest.Message).Value = answer
			case proto.Message:
				proto.Merge(reply.(proto.Message), answer)
			}
			return a.err
		}, a.opts...)
	return a.reply, err
}

// learn makes a call that is answered.
func (m *memory) learn(a ask) {
	m.t.Helper()
	if a.answer == nil {
		a.answer = "answer"
	}
	if _, err := m.call(a); err != nil {
		m.t.Errorf("a call that is answered: %v", err)
	}
}

// want makes a call that fails, and checks what the caller gets; "" is the error.
func (m *memory) want(what string, a ask, want string) {
	m.t.Helper()
	if a.err == nil {
		a.err = errDown
	}
	reply, err := m.call(a)
	if want == "" {
		if err != a.err {
			m.t.Errorf("%s: %v, %v; want the cause", what, reply, err)
		}
		return
	}
	if got := reply.(*rpctest.Message).GetValue(); err != nil || got != want {
		m.t.Errorf("%s: %q, %v; want %q", what, got, err, want)
	}
}

func outgoing(ctx context.Context, pairs ...string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, pairs...)
}

func TestLastGoodAnswersTheSameRequest(t *testing.T) {
	m := newMemory(t, interceptors.LastGoodConfig{})
	ctx := t.Context()
	m.want("nothing learned", ask{}, "")
	m.learn(ask{})
	m.want("the same", ask{}, "answer")
	m.want("again", ask{}, "answer")
	m.learn(ask{answer: "newer"})
	m.want("the last one", ask{}, "newer")

	m.want("another request", ask{req: wrapperspb.String("")}, "")
	m.want("another method", ask{method: rpctest.Other}, "")
	m.want("more metadata", ask{ctx: outgoing(ctx, "user", "eve")}, "")

	// Nothing of the metadata may be mistaken for something else.
	m.learn(ask{ctx: outgoing(ctx, "user", "alice", "user", "x", "tenant", "t"), answer: "for alice"})
	m.want("the same metadata, in another order", ask{ctx: outgoing(ctx, "Tenant", "t", "USER", "alice", "user", "x")}, "for alice")
	for name, pairs := range map[string][]string{
		"another value":           {"user", "bob", "user", "x", "tenant", "t"},
		"values in another order": {"user", "x", "user", "alice", "tenant", "t"},
		"a value less":            {"user", "alice", "tenant", "t"},
		"a value more":            {"user", "alice", "user", "x", "user", "", "tenant", "t"},
		"values joined":           {"user", "alicex", "tenant", "t"},
		"values cut elsewhere":    {"user", "alic", "user", "ex", "tenant", "t"},
		"a key less":              {"user", "alice", "user", "x"},
		"a key of another name":   {"user", "alice", "user", "x", "tenan", "tt"},
		"values moved":            {"user", "alice", "tenant", "t", "tenant", "x"},
	} {
		m.want(name, ask{ctx: outgoing(ctx, pairs...)}, "")
	}
	// Nor may metadata be mistaken for the request.
	m.learn(ask{req: wrapperspb.String("\x01k"), ctx: outgoing(ctx, "k", ""), answer: "split"})
	for _, a := range []ask{{req: wrapperspb.String("")}, {req: wrapperspb.String("\x01k")}, {req: wrapperspb.String(""), ctx: outgoing(ctx, "k", "\x01k")}} {
		m.want("metadata and request", a, "")
	}
}

func TestLastGoodOverTheWire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		down := false
		service := &rpctest.Service{Unary: func(_ context.Context, req *rpctest.Message) (*rpctest.Message, error) {
			if down {
				return nil, errDown
			}
			return wrapperspb.String("about " + req.GetValue()), nil
		}}
		g := mustGuard(t, clientRules(strict), interceptors.LastGood("*", interceptors.LastGoodConfig{MaxAge: time.Hour}))
		conn := rpctest.Start(t, service, nil, g.DialOptions())
		if got, err := rpctest.Call(t.Context(), conn, rpctest.Unary, "a"); got != "about a" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		down = true
		for i := range 3 { // one failure, then the breaker is open
			if got, err := rpctest.Call(t.Context(), conn, rpctest.Unary, "a"); got != "about a" || err != nil {
				t.Errorf("call %d: %q, %v", i, got, err)
			}
			if _, err := rpctest.Call(t.Context(), conn, rpctest.Unary, "b"); !errors.Is(err, interceptors.ErrBreakerOpen) {
				t.Errorf("call %d: %v", i, err)
			}
		}
		ctx, cancel := context.WithDeadline(t.Context(), time.Now())
		defer cancel()
		if got, err := rpctest.Call(ctx, conn, rpctest.Unary, "a"); got != "about a" || err != nil {
			t.Errorf("past its deadline: %q, %v", got, err)
		}
		wantEnded(t, g, interceptors.Client, rpctest.Unary, ended{success: 1, failure: 1})
	})
}

// What a reply may depend on beside the request: the channel's credentials, its
// target, and credentials of the call.
func TestLastGoodDoesNotTellOneCallerAboutAnother(t *testing.T) {
	a, b, other := channel(t, "example.com"), channel(t, "example.com"), channel(t, "example.org")
	m := newMemory(t, interceptors.LastGoodConfig{})
	m.learn(ask{cc: a})
	m.want("the channel", ask{cc: a}, "answer")
	m.want("another channel to the target", ask{cc: b}, "")
	m.want("another target", ask{cc: other}, "")
	m.want("no channel", ask{}, "")
	for name, opt := range map[string]grpc.CallOption{
		"credentials":            grpc.PerRPCCredentials(token{}),
		"a pointer to them":      &grpc.PerRPCCredsCallOption{Creds: token{}},
		"an authority":           grpc.CallAuthority("example.net"),
		"a pointer to authority": &grpc.AuthorityOverrideCallOption{Authority: "example.net"},
	} {
		opts := []grpc.CallOption{grpc.WaitForReady(true), opt}
		m.want(name+", answered", ask{cc: a, opts: opts}, "")
		m.learn(ask{cc: a, req: wrapperspb.String(name), opts: opts})
		m.want(name+", learned", ask{cc: a, req: wrapperspb.String(name)}, "")
	}
	m.want("a harmless option", ask{cc: a, opts: []grpc.CallOption{grpc.WaitForReady(true)}}, "answer")

	// With a Key, all of that is its word; targets and methods stay apart.
	m = newMemory(t, interceptors.LastGoodConfig{Key: func(context.Context, string, any) (string, bool) { return "all", true }})
	m.learn(ask{cc: a})
	m.want("another channel to the target", ask{cc: b}, "answer")
	m.want("another request", ask{cc: b, req: "no message", ctx: outgoing(t.Context(), "user", "eve"), opts: []grpc.CallOption{grpc.PerRPCCredentials(token{})}}, "answer")
	m.want("another target", ask{cc: other}, "")
	m.want("another method", ask{cc: a, method: rpctest.Other}, "")
}

type token struct{ credentials.PerRPCCredentials }

// Targets beyond the cap share a state, not their answers.
func TestLastGoodBeyondTheCap(t *testing.T) {
	m := newMemory(t, interceptors.LastGoodConfig{Key: func(context.Context, string, any) (string, bool) { return "all", true }})
	for i := range maxStates {
		_, _ = m.call(ask{cc: channel(t, fmt.Sprintf("host%d", i))})
	}
	one, two := channel(t, "one"), channel(t, "two")
	m.learn(ask{cc: one})
	m.want("the same target", ask{cc: one}, "answer")
	m.want("another target", ask{cc: two}, "")
	if n := slices.IndexFunc(m.g.Snapshot().Methods, func(s interceptors.MethodSnapshot) bool { return s.Target == "_OTHER" }); n < 0 {
		t.Error("they have state of their own: the test proves nothing")
	}
}

func TestLastGoodMaxAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(t, interceptors.LastGoodConfig{MaxAge: time.Minute})
		m.learn(ask{})
		time.Sleep(30 * time.Second)
		m.want("half as old", ask{}, "answer")
		time.Sleep(30 * time.Second)
		m.want("as old as may be, though used since", ask{}, "answer")
		time.Sleep(time.Nanosecond)
		m.want("older", ask{}, "")
		m.learn(ask{answer: "new"})
		time.Sleep(time.Minute)
		m.want("learned again", ask{}, "new")
	})
}

func TestLastGoodLearnsFromSuccessesAlone(t *testing.T) {
	for _, tt := range []struct {
		name string
		err  error
		gone bool
	}{
		{"an error that is a success", status.Error(codes.NotFound, ""), false},
		{"an error that is a failure", errDown, false},
		{"a reply that nobody waits for", nil, true},
	} {
		m := newMemory(t, interceptors.LastGoodConfig{})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		_ = m.g.UnaryClientInterceptor()(ctx, rpctest.Unary, wrapperspb.String("question"), new(rpctest.Message), nil,
			func(_ context.Context, _ string, _, reply any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
				reply.(*rpctest.Message).Value = "answer"
				if tt.gone {
					cancel()
				}
				return tt.err
			})
		m.want(tt.name, ask{}, "")
	}
	// It answers what a fallback is for, and nothing else.
	m := newMemory(t, interceptors.LastGoodConfig{})
	m.learn(ask{})
	m.want("not found", ask{err: status.Error(codes.NotFound, "")}, "")
}

// Nobody can change what was learned, and nothing of the failed call shows.
func TestLastGoodHandsOutCopies(t *testing.T) {
	tree := func() *structpb.Struct {
		s, err := structpb.NewStruct(map[string]any{"list": []any{"a", map[string]any{"b": 1.5}}, "null": nil})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	spoil := func(s *structpb.Struct) {
		s.Fields["list"].GetListValue().Values[1].GetStructValue().Fields["b"] = structpb.NewStringValue("spoilt")
		delete(s.Fields, "null")
	}
	m := newMemory(t, interceptors.LastGoodConfig{})
	learned := new(structpb.Struct)
	m.learn(ask{reply: learned, answer: tree()})
	spoil(learned)
	for range 3 {
		reply := new(structpb.Struct)
		if _, err := m.call(ask{reply: reply, answer: &structpb.Struct{Fields: map[string]*structpb.Value{"left over": structpb.NewBoolValue(true)}}, err: errDown}); err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(reply, tree()) {
			t.Errorf("got %v", reply)
		}
		spoil(reply)
	}
}

func TestLastGoodAndMessageTypes(t *testing.T) {
	m := newMemory(t, interceptors.LastGoodConfig{})
	m.learn(ask{})
	m.want("another type of reply", ask{reply: new(wrapperspb.BytesValue)}, "") // the same on the wire
	m.want("a reply that is no message", ask{reply: new(string)}, "")
	m.want("a nil reply", ask{reply: (*rpctest.Message)(nil)}, "")
	m.want("the type that it was", ask{}, "answer")

	plain := "no message"
	m.learn(ask{req: &plain})
	m.want("a request that is no message", ask{req: &plain}, "")
	invalid := wrapperspb.String("\xff")
	m.learn(ask{req: invalid})
	m.want("a request that cannot be marshalled", ask{req: invalid}, "")

	m = newMemory(t, interceptors.LastGoodConfig{})
	m.learn(ask{reply: new(string), answer: 1})
	m.want("a learned reply that is no message", ask{}, "")
	m.learn(ask{reply: invalid, answer: 1})
	m.want("a learned reply that cannot be marshalled", ask{}, "")
}

func TestLastGoodKey(t *testing.T) {
	type user struct{}
	keys := 0
	m := newMemory(t, interceptors.LastGoodConfig{Key: func(ctx context.Context, method string, req any) (string, bool) {
		keys++
		name, ok := ctx.Value(user{}).(string)
		return method + name + req.(*rpctest.Message).GetValue()[:1], ok
	}})
	alice, bob := context.WithValue(t.Context(), user{}, "alice"), context.WithValue(t.Context(), user{}, "bob")
	m.learn(ask{ctx: alice})
	m.want("what the key does not have", ask{ctx: outgoing(alice, "request-id", "1"), req: wrapperspb.String("queue")}, "answer")
	m.want("another user", ask{ctx: bob}, "")
	m.learn(ask{})
	m.want("not ok", ask{}, "")
	if keys != 5 {
		t.Errorf("%d keys of 5 calls", keys)
	}
}

// The key is that of the request as the caller made it: an interceptor further in
// may move what tells callers apart elsewhere.
func TestLastGoodKeyIsTakenBeforeTheCall(t *testing.T) {
	m := newMemory(t, interceptors.LastGoodConfig{})
	moved := func(text string, err error) (string, error) {
		reply := new(rpctest.Message)
		err = m.g.UnaryClientInterceptor()(t.Context(), rpctest.Unary, wrapperspb.String(text), reply, nil,
			func(_ context.Context, _ string, req, reply any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
				reply.(*rpctest.Message).Value = "for " + text
				req.(*rpctest.Message).Value = ""
				return err
			})
		return reply.GetValue(), err
	}
	if got, err := moved("alice", nil); got != "for alice" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := moved("bob", errDown); err != errDown {
		t.Errorf("bob: %v", err)
	}
	if got, err := moved("alice", errDown); got != "for alice" || err != nil {
		t.Errorf("alice: %q, %v", got, err)
	}
}

func TestCase17_KeyBlowsUp(t *testing.T) {
	for name, blowUp := range blowUps {
		t.Run(name, func(t *testing.T) {
			var log strings.Builder
			mined := true
			m := newMemory(t, interceptors.LastGoodConfig{Key: func(context.Context, string, any) (string, bool) {
				if mined {
					blowUp()
				}
				return "", true
			}}, interceptors.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
			for range 3 {
				if p := survive(func() { m.learn(ask{}) }); (p != nil) != (name == "Goexit") {
					t.Errorf("%v came through", p)
				}
			}
			mined = false
			m.want("a call whose key blew up, learned", ask{}, "")
			m.learn(ask{})
			mined = true
			if name == "panic" {
				m.want("a call whose key blows up", ask{}, "")
				if n := strings.Count(log.String(), "LastGood's Key of *"); n != 1 {
					t.Errorf("logged %d times:\n%s", n, log.String())
				}
			}
			checkIdle(t, m.g)
		})
	}
}

// badMessage is a message of somebody else's making.
type badMessage struct{ proto.Message }

func TestCase17_MessageBlowsUp(t *testing.T) {
	m := newMemory(t, interceptors.LastGoodConfig{})
	m.learn(ask{reply: badMessage{}, answer: 1})
	m.learn(ask{})
	m.want("a reply that panics", ask{reply: badMessage{}}, "")
	m.want("a request that panics", ask{req: badMessage{}}, "")
	m.want("a good one", ask{}, "answer")
}

// The option is a recipe: each guard learns for itself, and so does each pattern.
func TestLastGoodIsOfOneGuardAndPattern(t *testing.T) {
	opt := interceptors.LastGood("*", interceptors.LastGoodConfig{MaxAge: time.Minute})
	a := &memory{t, mustGuard(t, clientRules("timeout: 1h"), opt)}
	b := &memory{t, mustGuard(t, clientRules("timeout: 1h"), opt)}
	a.learn(ask{})
	a.want("the guard that learned", ask{}, "answer")
	b.want("another one", ask{}, "")

	one := interceptors.LastGoodConfig{MaxAge: time.Minute, MaxEntries: 1}
	c := &memory{t, mustGuard(t, clientRules("timeout: 1h"), interceptors.LastGood("*", one), interceptors.LastGood(rpctest.Other, one))}
	c.learn(ask{})
	c.learn(ask{method: rpctest.Other})
	c.want("the other pattern's entry is not in the way", ask{}, "answer")
	c.want("nor this one's", ask{method: rpctest.Other}, "answer")
}

func TestLastGoodDefaultMaxEntries(t *testing.T) {
	m := newMemory(t, interceptors.LastGoodConfig{})
	numbered := func(i int) ask { return ask{req: wrapperspb.String(fmt.Sprint(i))} }
	for i := range 1001 {
		m.learn(numbered(i))
	}
	m.want("the first", numbered(0), "")
	m.want("the second", numbered(1), "answer")
	m.want("the last", numbered(1000), "answer")
}

func TestLastGoodDefaultMaxBytes(t *testing.T) {
	m := newMemory(t, interceptors.LastGoodConfig{})
	text := strings.Repeat("x", 5<<20)
	for i := range 4 {
		m.learn(ask{req: wrapperspb.String(fmt.Sprint(i)), answer: text})
	}
	m.want("the first of 20 MiB", ask{req: wrapperspb.String("0")}, "")
	m.want("the second", ask{req: wrapperspb.String("1")}, text)
	m.learn(ask{answer: strings.Repeat(text, 4)})
	m.want("20 MiB at once", ask{}, "")
	m.want("the last but that", ask{req: wrapperspb.String("3")}, text)
}

// A reply that cannot be kept makes the one before it the last no more.
func TestLastGoodForgetsWhatIsNotTheLast(t *testing.T) {
	m := newMemory(t, interceptors.LastGoodConfig{MaxBytes: 200})
	m.learn(ask{})
	m.learn(ask{answer: strings.Repeat("x", 200)})
	m.want("after a reply that is too large", ask{}, "")
	m.learn(ask{})
	m.want("after one that fits", ask{}, "answer")
}

// modelEntry is what the naive model keeps: a list, the latest used last.
type modelEntry struct {
	key, reply string
	learned    time.Time
}

func TestLastGoodAgainstModel(t *testing.T) {
	const maxAge, maxEntries, maxBytes = time.Minute, 6, 400
	for seed := range uint64(200) {
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 17))
			m := newMemory(t, interceptors.LastGoodConfig{MaxAge: maxAge, MaxEntries: maxEntries, MaxBytes: maxBytes,
				Key: func(_ context.Context, _ string, req any) (string, bool) {
					return req.(*rpctest.Message).GetValue(), true
				}})
			var model []modelEntry
			find := func(key string) int {
				return slices.IndexFunc(model, func(e modelEntry) bool { return e.key == key })
			}
			bytes := func(entries ...modelEntry) (n int) {
				for _, e := range entries {
					n += len(rpctest.Unary) + len(e.key) + proto.Size(wrapperspb.String(e.reply))
				}
				return n
			}
			for step := range 300 {
				key := strings.Repeat(string(rune('a'+r.IntN(10))), 1+r.IntN(2)*r.IntN(40))
				call := ask{req: wrapperspb.String(key)}
				switch i := find(key); r.IntN(5) {
				case 0:
					time.Sleep(time.Duration(r.Int64N(int64(maxAge / 3))))
				case 1, 2: // learn
					e := modelEntry{key, fmt.Sprint(step) + strings.Repeat("x", r.IntN(2)*r.IntN(450)), time.Now()}
					call.answer = e.reply
					m.learn(call)
					if i >= 0 {
						model = slices.Delete(model, i, i+1)
					}
					if bytes(e) > maxBytes {
						break
					}
					for model = append(model, e); len(model) > maxEntries || bytes(model...) > maxBytes; {
						model = model[1:]
					}
				default: // answer
					want := ""
					if i >= 0 {
						e := model[i]
						model = slices.Delete(model, i, i+1)
						if time.Since(e.learned) <= maxAge {
							model, want = append(model, e), e.reply
						}
					}
					m.want(fmt.Sprintf("seed %d, step %d, key %q", seed, step, key), call, want)
				}
				if t.Failed() {
					t.FailNow()
				}
			}
		})
	}
}

// MaxBytes bounds the heap, not the wire alone: in memory a message can be many
// times what it is on the wire.
func TestLastGoodMemoryIsBounded(t *testing.T) {
	const maxEntries, maxBytes = 1000, 1 << 20
	m := newMemory(t, interceptors.LastGoodConfig{MaxEntries: maxEntries, MaxBytes: maxBytes})
	dense := func(i int) *structpb.ListValue { // many small values
		l := new(structpb.ListValue)
		for j := range 1000 {
			l.Values = append(l.Values, structpb.NewNumberValue(float64(i+j)))
		}
		return l
	}
	m.learn(ask{reply: new(structpb.ListValue), answer: dense(0)})
	heap := heapInUse()
	for i := range 2 * maxEntries {
		m.learn(ask{req: wrapperspb.Int64(int64(i))}) // all of maxEntries small ones
	}
	for i := range 150 { // 1.6 MiB
		m.learn(ask{req: wrapperspb.Int64(int64(i)), reply: new(structpb.ListValue), answer: dense(i)})
	}
	grown := heapInUse() - heap
	t.Logf("%d KiB of heap, %d KiB of them for replies", grown>>10, maxBytes>>10)
	if most := int64(maxBytes + maxEntries*400); grown > most {
		t.Errorf("%d bytes of heap, want at most %d", grown, most)
	}
	runtime.KeepAlive(m)
}

// A channel that was closed is not kept for its answers.
func TestLastGoodKeepsNoChannel(t *testing.T) {
	m := newMemory(t, interceptors.LastGoodConfig{})
	collected := make(chan struct{})
	func() {
		cc, err := grpc.NewClient("passthrough:///gone", grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		runtime.AddCleanup(cc, func(c chan struct{}) { close(c) }, collected)
		m.learn(ask{cc: cc})
		m.want("the channel", ask{cc: cc}, "answer")
		_ = cc.Close()
	}()
	for range 100 {
		runtime.GC()
		select {
		case <-collected:
			runtime.KeepAlive(m)
			return
		default:
			runtime.Gosched()
		}
	}
	t.Error("it is still there")
}

func TestLastGoodIsSafeForConcurrentUse(t *testing.T) {
	m := newMemory(t, interceptors.LastGoodConfig{MaxEntries: 5, MaxBytes: 500})
	var calls sync.WaitGroup
	for worker := range 8 {
		calls.Go(func() {
			r := rand.New(rand.NewPCG(uint64(worker), 1))
			for range 2000 {
				key := fmt.Sprint(r.IntN(10))
				a := ask{ctx: context.Background(), req: wrapperspb.String(key), answer: key + " " + strings.Repeat("x", r.IntN(100))}
				if r.IntN(2) == 0 {
					a.answer, a.err = "left over", errDown
				}
				reply, err := m.call(a)
				got := reply.(*rpctest.Message).GetValue()
				if err != nil && err != errDown || err == nil && !strings.HasPrefix(got, key+" ") {
					t.Errorf("key %s: %q, %v", key, got, err)
				}
				reply.(*rpctest.Message).Value = "spoilt"
			}
		})
	}
	calls.Wait()
	checkIdle(t, m.g)
}
