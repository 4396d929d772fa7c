package interceptors_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// occupy makes a call of a method that lasts until it is released.
func occupy(t *testing.T, g *interceptors.Guard, method string) (release func()) {
	t.Helper()
	admitted, end, ended := make(chan error, 1), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		_, err := g.UnaryServerInterceptor()(context.Background(), nil, &grpc.UnaryServerInfo{FullMethod: method},
			func(context.Context, any) (any, error) {
				admitted <- nil
				<-end
				return nil, nil
			})
		admitted <- err
	}()
	if err := <-admitted; err != nil {
		t.Fatal(err)
	}
	release = sync.OnceFunc(func() { close(end); <-ended })
	t.Cleanup(release)
	return release
}

// A limit of scope rule goes on in a rule that has such a limit and one of the patterns,
// whatever other rules have its other patterns, and whether or not it is a method of
// that rule which was called.
func TestReloadKeepsWhatRulesShare(t *testing.T) {
	const (
		rate   = "rate_limit: {requests_per_second: 0.001, burst: 2, scope: rule}"
		places = "concurrency_limit: {max_in_flight: 1, scope: rule}"
		other  = "timeout: 1h"
	)
	for name, c := range map[string]struct{ before, after string }{
		"one pattern leaves": {
			"{methods: [/a.A/M, /b.B/M], " + rate + ", " + places + "}",
			"{methods: [/a.A/M], " + other + "}, {methods: [/b.B/M], " + rate + ", " + places + "}",
		},
		"another rule's pattern comes first": {
			"{methods: [/a.A/M], " + rate + ", " + places + "}, {methods: [/b.B/M], " + other + "}",
			"{methods: [/b.B/M, /a.A/M], " + rate + ", " + places + "}",
		},
		"two limits in one rule": {
			"{methods: [/a.A/M], " + rate + "}, {methods: ['/a.A/*'], " + places + "}",
			"{methods: [/b.B/M, '/a.A/*', /a.A/M], " + rate + ", " + places + "}",
		},
		"the method that was called is of no rule": {
			"{methods: [/a.A/M, /b.B/M], " + rate + ", " + places + "}",
			"{methods: [/b.B/M], " + rate + ", " + places + "}",
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := mustGuard(t, "server: {rules: ["+c.before+"]}")
			release := occupy(t, g, "/a.A/M")
			mustReload(t, g, "server: {rules: ["+c.after+"]}")
			if err := serveOn(g, "/b.B/M", nil); reasonOf(err) != interceptors.ReasonConcurrencyLimited {
				t.Errorf("the place is taken: %v", err) // and the token is spent
			}
			release()
			if err := serveOn(g, "/b.B/M", nil); reasonOf(err) != interceptors.ReasonRateLimited {
				t.Errorf("the tokens are spent: %v", err)
			}
			checkIdle(t, g)
		})
	}
	t.Run("one rule becomes two", func(t *testing.T) {
		g := mustGuard(t, "server: {rules: [{methods: [/a.A/M, /b.B/M], "+rate+", "+places+"}]}")
		release := occupy(t, g, "/a.A/M")
		mustReload(t, g, "server: {rules: [{methods: [/a.A/M], "+rate+"}, {methods: [/b.B/M], "+places+"}]}")
		if err := serveOn(g, "/b.B/M", nil); reasonOf(err) != interceptors.ReasonConcurrencyLimited {
			t.Errorf("the place is taken: %v", err)
		}
		release()
		if err := serveOn(g, "/b.B/M", nil); err != nil {
			t.Error(err)
		}
		if err := serveOn(g, "/a.A/M", nil); err != nil { // the other token
			t.Error(err)
		}
		if err := serveOn(g, "/a.A/M", nil); reasonOf(err) != interceptors.ReasonRateLimited {
			t.Errorf("the tokens are spent: %v", err)
		}
		checkIdle(t, g)
	})
}

// Who waits at a limit that rules share waits as the new policy says, though its own
// method has no rule any more; and goes when the limit does.
func TestReloadWakesWhoWaitsAtSharedLimits(t *testing.T) {
	const (
		two  = "server: {rules: [{methods: [/a.A/M, /b.B/M], rate_limit: {requests_per_second: 0.001, burst: 1, max_wait: 1h, scope: rule}}]}"
		one  = "server: {rules: [{methods: [/b.B/M], rate_limit: {requests_per_second: %s, burst: 1, max_wait: 1h, scope: rule}}]}"
		none = "server: {rules: [{methods: [/b.B/M], timeout: 1h}]}"
	)
	for name, policies := range map[string][]string{
		"faster": {fmt.Sprintf(one, "1000")},
		"gone":   {fmt.Sprintf(one, "0.001"), none},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := mustGuard(t, two)
				var calls []chan error
				for range 3 {
					ended := make(chan error, 1)
					calls = append(calls, ended)
					go func() { ended <- serveOn(g, "/a.A/M", nil) }()
				}
				synctest.Wait()
				for i, p := range policies {
					mustReload(t, g, p)
					pass(10 * time.Millisecond)
					if last := i == len(policies)-1; len(calls[0])+len(calls[1])+len(calls[2]) != 3 == last {
						t.Errorf("after %s: %d, %d and %d have ended", p, len(calls[0]), len(calls[1]), len(calls[2]))
					}
				}
				for _, ended := range calls {
					if err := <-ended; err != nil {
						t.Error(err)
					}
				}
			})
		})
	}
}

// A target whose shared limit is in use is not forgotten, though the method that uses
// it is no rule's any more.
func TestIdleTargetsKeepWhatRulesShare(t *testing.T) {
	const rule = "client: {rules: [{methods: [%s/test.v1.Test/Unary], concurrency_limit: {max_in_flight: 1, scope: rule}}]}"
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, fmt.Sprintf(rule, "/test.v1.Test/Bidi, "))
		conn := rpctest.Start(t, script(), nil, g.DialOptions())
		ctx, cancel := context.WithCancel(t.Context())
		if _, err := rpctest.Open(ctx, conn, rpctest.Bidi); err != nil {
			t.Fatal(err)
		}
		mustReload(t, g, fmt.Sprintf(rule, ""))
		for range 5 {
			pass(time.Minute)
			g.Snapshot()
		}
		if _, err := rpctest.Call(t.Context(), conn, rpctest.Unary, ""); reasonOf(err) != interceptors.ReasonConcurrencyLimited {
			t.Errorf("the place is taken: %v", err)
		}
		cancel()
		synctest.Wait()
		if _, err := rpctest.Call(t.Context(), conn, rpctest.Unary, ""); err != nil {
			t.Error(err)
		}
		checkIdle(t, g)
	})
}

// asked is a context that does something when it is first asked whether it has ended:
// in the middle of a call's admission, after the call has found its gates and the time.
type asked struct {
	context.Context
	first func()
}

func (a asked) Err() error {
	a.first()
	return a.Context.Err()
}

// A call that is overtaken by a reload is judged by the one policy or by the other.
func TestReloadDuringAdmission(t *testing.T) {
	for name, c := range map[string]struct {
		before, after string
		calls         int // before it
	}{
		"a token that was there":  {"{requests_per_second: 10, burst: 1}", "{requests_per_second: 20, burst: 1}", 0},
		"a larger bucket":         {"{requests_per_second: 10, burst: 1}", "{requests_per_second: 10, burst: 9}", 0},
		"a call that was due":     {"{algorithm: pacing, requests_per_second: 10, burst: 0}", "{algorithm: pacing, requests_per_second: 20, burst: 0}", 0},
		"a limit that is no more": {"{requests_per_second: 0.001, burst: 1}", "{disabled: true}", 1},
	} {
		t.Run(name, func(t *testing.T) {
			policy := func(rate string) string {
				return "server: {rules: [{methods: ['*'], rate_limit: " + rate + ", timeout: 1h}]}"
			}
			g := mustGuard(t, policy(c.before))
			for range c.calls {
				_ = serveOn(g, "/a.A/M", nil)
			}
			ctx := asked{t.Context(), sync.OnceFunc(func() { mustReload(t, g, policy(c.after)) })}
			if _, err := g.UnaryServerInterceptor()(ctx, nil, &grpc.UnaryServerInfo{FullMethod: "/a.A/M"},
				func(context.Context, any) (any, error) { return nil, nil }); err != nil {
				t.Error(err)
			}
			checkIdle(t, g)
		})
	}
}
