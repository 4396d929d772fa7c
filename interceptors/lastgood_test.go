package interceptors_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
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
	if cfg.Key == nil {
		cfg.Key = interceptors.WholeRequest
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
	m.learn(ask{ctx: outgoing(ctx, "a", "p", "a", "b", "c", "q"), answer: "a: p, b; c: q"})
	m.want("a name that is another's value", ask{ctx: outgoing(ctx, "a", "p", "b", "c", "b", "q")}, "")
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
		g := mustGuard(t, clientRules(strict), interceptors.LastGood("*", interceptors.LastGoodConfig{MaxAge: time.Hour, Key: interceptors.WholeRequest}))
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

	// A codec or an interceptor further in may let a reply pass that has not all of
	// its required fields.
	partial := &descriptorpb.UninterpretedOption_NamePart{NamePart: proto.String("answer")}
	if proto.CheckInitialized(partial) == nil {
		t.Error("nothing is missing: the test proves nothing")
	}
	m = newMemory(t, interceptors.LastGoodConfig{})
	m.learn(ask{reply: new(descriptorpb.UninterpretedOption_NamePart), answer: partial})
	reply, err := m.call(ask{reply: new(descriptorpb.UninterpretedOption_NamePart), err: errDown})
	if err != nil || !proto.Equal(reply.(proto.Message), partial) {
		t.Errorf("a partial reply: %v, %v", reply, err)
	}

	m = newMemory(t, interceptors.LastGoodConfig{})
	m.learn(ask{reply: new(string), answer: 1})
	m.want("a learned reply that is no message", ask{}, "")
	m.learn(ask{reply: invalid, answer: 1})
	m.want("a learned reply that cannot be marshalled", ask{}, "")
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
	opt := interceptors.LastGood("*", interceptors.LastGoodConfig{MaxAge: time.Minute, Key: interceptors.WholeRequest})
	a := &memory{t, mustGuard(t, clientRules("timeout: 1h"), opt)}
	b := &memory{t, mustGuard(t, clientRules("timeout: 1h"), opt)}
	a.learn(ask{})
	a.want("the guard that learned", ask{}, "answer")
	b.want("another one", ask{}, "")

	one := interceptors.LastGoodConfig{MaxAge: time.Minute, Key: interceptors.WholeRequest, MaxEntries: 1}
	c := &memory{t, mustGuard(t, clientRules("timeout: 1h"), interceptors.LastGood("*", one), interceptors.LastGood(rpctest.Other, one))}
	c.learn(ask{})
	c.learn(ask{method: rpctest.Other})
	c.want("the other pattern's entry is not in the way", ask{}, "answer")
	c.want("nor this one's", ask{method: rpctest.Other}, "answer")
}
