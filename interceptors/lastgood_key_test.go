package interceptors_test

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

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
