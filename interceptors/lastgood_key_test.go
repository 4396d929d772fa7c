package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// What a reply may depend on beside the request: the channel's credentials, its
// target, and what options of the call ask for.
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
		"what wraps them":        tagged{grpc.PerRPCCredentials(token{})},
		"a pointer to that":      &tagged{grpc.PerRPCCredentials(token{})},
		"an authority":           grpc.CallAuthority("example.net"),
		"a pointer to authority": &grpc.AuthorityOverrideCallOption{Authority: "example.net"},
		"a codec":                grpc.ForceCodecV2(nil),
		"a content-subtype":      grpc.CallContentSubtype("json"),
		"for an interceptor":     asUser{name: "eve"},
		"a harmless one in it":   tagged{grpc.WaitForReady(true)},
		"none":                   nil,
	} {
		opts := []grpc.CallOption{grpc.WaitForReady(true), opt}
		m.want(name+", answered", ask{cc: a, opts: opts}, "")
		m.learn(ask{cc: a, req: wrapperspb.String(name), opts: opts})
		m.want(name+", learned", ask{cc: a, req: wrapperspb.String(name)}, "")
	}
	m.want("harmless options", ask{cc: a, opts: []grpc.CallOption{
		grpc.EmptyCallOption{}, grpc.StaticMethod(), grpc.Header(nil), grpc.Trailer(nil), grpc.Peer(nil), grpc.OnFinish(nil),
		grpc.WaitForReady(true), grpc.MaxCallRecvMsgSize(1), grpc.MaxCallSendMsgSize(1),
		grpc.MaxRetryRPCBufferSize(1), grpc.UseCompressor("gzip"),
	}}, "answer")

	// With another Key all of that is its word, but channels and methods stay apart.
	m = newMemory(t, interceptors.LastGoodConfig{Key: func(context.Context, string, any, []grpc.CallOption) (string, bool) { return "all", true }})
	m.learn(ask{cc: a})
	m.want("another request", ask{cc: a, req: "no message", ctx: outgoing(t.Context(), "user", "eve"), opts: []grpc.CallOption{grpc.PerRPCCredentials(token{})}}, "answer")
	m.want("another channel to the target", ask{cc: b}, "")
	m.want("another target", ask{cc: other}, "")
	m.want("another method", ask{cc: a, method: rpctest.Other}, "")
	m.want("no channel", ask{}, "")
}

type token struct{ credentials.PerRPCCredentials }

// tagged is an option that does what another one does.
type tagged struct{ grpc.CallOption }

// asUser is an option that gRPC makes nothing of, but an interceptor may.
type asUser struct {
	grpc.EmptyCallOption
	name string
}

// Over the wire: who asks is said by credentials of the channel, which look into
// the context. A Key that has the caller in it keeps them apart.
func TestLastGoodWithCredentialsOfTheChannel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		down := false
		service := &rpctest.Service{Unary: func(ctx context.Context, _ *rpctest.Message) (*rpctest.Message, error) {
			if down {
				return nil, errDown
			}
			md, _ := metadata.FromIncomingContext(ctx)
			return wrapperspb.String("for " + strings.Join(md.Get("user"), "")), nil
		}}
		key := func(ctx context.Context, method string, req any, opts []grpc.CallOption) (string, bool) {
			whole, ok := interceptors.WholeRequest(ctx, method, req, opts)
			name, known := ctx.Value(user{}).(string)
			return whole + name, ok && known
		}
		g := mustGuard(t, clientRules(strict), interceptors.LastGood("*", interceptors.LastGoodConfig{MaxAge: time.Hour, Key: key}))
		conn := rpctest.Start(t, service, nil, g.DialOptions(grpc.WithPerRPCCredentials(user{})))
		ask := func(name string) (string, error) {
			return rpctest.Call(context.WithValue(t.Context(), user{}, name), conn, rpctest.Unary, "mine")
		}
		if got, err := ask("alice"); got != "for alice" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		down = true
		if got, err := ask("alice"); got != "for alice" || err != nil {
			t.Errorf("alice again: %q, %v", got, err)
		}
		if got, err := ask("bob"); !errors.Is(err, interceptors.ErrBreakerOpen) {
			t.Errorf("bob: %q, %v", got, err)
		}
	})
}

// user is credentials that tell the server who asks, and the key of it in ctx.
type user struct{}

func (user) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	name, _ := ctx.Value(user{}).(string)
	return map[string]string{"user": name}, nil
}

func (user) RequireTransportSecurity() bool { return false }

func TestWholeRequest(t *testing.T) {
	whole := func(req any) string {
		key, ok := interceptors.WholeRequest(t.Context(), rpctest.Unary, req, nil)
		if !ok {
			t.Errorf("%T: no key", req)
		}
		return key
	}
	// A map has no order, yet there is one key.
	table := make(map[string]any)
	for i := range 10 {
		table[fmt.Sprint(i)] = i
	}
	req, err := structpb.NewStruct(table)
	if err != nil {
		t.Fatal(err)
	}
	keys := make(map[string]bool)
	for range 100 {
		keys[whole(req)] = true
	}
	if len(keys) != 1 {
		t.Errorf("%d keys of one request with a map", len(keys))
	}
	for _, text := range []string{"", "x", strings.Repeat("x", 1<<20)} {
		if n := len(whole(wrapperspb.String(text))); n != 32 {
			t.Errorf("a request of %d bytes has a key of %d", len(text), n)
		}
	}
}

// While a call runs, no copy of its request is held for the answer.
func TestLastGoodHoldsNoRequest(t *testing.T) {
	const size = 32 << 20
	m := newMemory(t, interceptors.LastGoodConfig{})
	req := wrapperspb.Bytes(make([]byte, size))
	before := heapInUse()
	var held int64
	err := m.g.UnaryClientInterceptor()(t.Context(), rpctest.Unary, req, new(rpctest.Message), nil,
		func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
			held = heapInUse() - before
			return nil
		})
	if err != nil || held > size/2 {
		t.Errorf("%v, %d KiB held for a request of %d", err, held>>10, size>>10)
	}
	runtime.KeepAlive(req)
}

// Channels beyond the cap share a state, not their answers.
func TestLastGoodBeyondTheCap(t *testing.T) {
	m := newMemory(t, interceptors.LastGoodConfig{Key: func(context.Context, string, any, []grpc.CallOption) (string, bool) { return "all", true }})
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

func TestLastGoodKey(t *testing.T) {
	keys := 0
	m := newMemory(t, interceptors.LastGoodConfig{Key: func(ctx context.Context, method string, req any, _ []grpc.CallOption) (string, bool) {
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
			m := newMemory(t, interceptors.LastGoodConfig{Key: func(context.Context, string, any, []grpc.CallOption) (string, bool) {
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
