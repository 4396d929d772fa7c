package interceptors_test

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

func TestFallbackDecidesTheResult(t *testing.T) {
	cause, other := status.Error(codes.Unavailable, "down"), errors.New("other")
	for name, want := range map[string]error{"answer": nil, "error": other, "cause": cause} {
		g := mustGuard(t, clientRules("breaker: {}"), interceptors.WithFallback("*",
			func(_ context.Context, method string, _, _ any, got error) error {
				if got != cause || method != rpctest.Unary {
					t.Errorf("%s: asked for %v of %s", name, got, method)
				}
				return want
			}))
		if err := clientUnary.byHand(t.Context(), g, func(context.Context) error { return cause }); err != want {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
		wantEnded(t, g, interceptors.Client, rpctest.Unary, oneFailure)
	}
}

type callersKey struct{}

// The fallback is given what the caller gave: not the context with the policy's
// timeout, and the very messages.
func TestFallbackIsGivenWhatTheCallerGave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		request, answer := new(rpctest.Message), new(rpctest.Message)
		caller := context.WithValue(t.Context(), callersKey{}, "the caller")
		asked := false
		g := mustGuard(t, clientRules("timeout: 1s"), interceptors.WithFallback("*", func(ctx context.Context, _ string, req, reply any, _ error) error {
			asked = true
			if ctx.Value(callersKey{}) != "the caller" || ctx.Done() != caller.Done() || req != any(request) || reply != any(answer) {
				t.Errorf("got %v, %v, %v", ctx, req, reply)
			}
			if _, ok := ctx.Deadline(); ok || ctx.Err() != nil {
				t.Error("it has the deadline of the policy")
			}
			return nil
		}))
		err := g.UnaryClientInterceptor()(caller, rpctest.Unary, request, answer, nil,
			func(ctx context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
				<-ctx.Done()
				return status.FromContextError(ctx.Err()).Err()
			})
		if err != nil || !asked {
			t.Errorf("asked %v, returned %v", asked, err)
		}
	})
}

// While a fallback hangs, its call is over: the only place is free, the breaker
// has the verdict, and the counts are complete.
func TestFallbackHoldsNoPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		g := mustGuard(t, clientRules(placeForOne), interceptors.WithFallback("*", func(context.Context, string, any, any, error) error {
			<-release
			return nil
		}))
		hanging := make(chan error, 1)
		go func() { hanging <- clientUnary.byHand(t.Context(), g, func(context.Context) error { return errDown }) }()
		synctest.Wait()
		wantEnded(t, g, interceptors.Client, rpctest.Unary, oneFailure)
		wantState(t, g, interceptors.Client, rpctest.Unary, "open")
		time.Sleep(5 * time.Second)
		if err := clientUnary.byHand(t.Context(), g, func(context.Context) error { return nil }); err != nil {
			t.Errorf("the next call: %v", err)
		}
		wantState(t, g, interceptors.Client, rpctest.Unary, "closed")
		close(release)
		if err := <-hanging; err != nil {
			t.Error(err)
		}
		wantEnded(t, g, interceptors.Client, rpctest.Unary, ended{success: 1, failure: 1}) // and the answer is none
	})
}

// A fallback may call through the guard that asks it. What fails then may have
// another fallback.
func TestFallbackCallsThroughTheGuard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var conn *grpc.ClientConn
		g := mustGuard(t, clientRules("concurrency_limit: {max_in_flight: 1}"),
			interceptors.WithFallback(rpctest.Unary, func(ctx context.Context, _ string, _, reply any, _ error) error {
				return conn.Invoke(ctx, rpctest.Other, &rpctest.Message{Value: "UNAVAILABLE"}, reply)
			}),
			interceptors.WithFallback(rpctest.Other, func(ctx context.Context, method string, _, reply any, _ error) error {
				return conn.Invoke(ctx, method, &rpctest.Message{Value: "second hand"}, reply)
			}))
		conn = rpctest.Start(t, script(), nil, g.DialOptions())
		if got, err := rpctest.Call(t.Context(), conn, rpctest.Unary, "UNAVAILABLE"); got != "second hand" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		wantEnded(t, g, interceptors.Client, rpctest.Unary, oneFailure)
		wantEnded(t, g, interceptors.Client, rpctest.Other, ended{success: 1, failure: 1})
	})
}

// A fallback that makes the call that it is asked for, or one that leads there,
// comes to an end: no fallback is asked within itself.
func TestFallbackIsNotAskedWithinItself(t *testing.T) {
	more := map[string]func(context.Context) (context.Context, context.CancelFunc){
		"its context": context.WithCancel,
		"with time of its own": func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(context.WithoutCancel(ctx), time.Hour)
		},
	}
	for name, derive := range more {
		var depth, deepest int
		var within []error
		var g *interceptors.Guard
		calls := func(next string) interceptors.Fallback {
			return func(ctx context.Context, _ string, req, reply any, _ error) error {
				if depth++; depth > 5 {
					t.Fatalf("%s: no end", name)
				}
				deepest = max(deepest, depth)
				defer func() { depth-- }()
				ctx, cancel := derive(ctx)
				defer cancel()
				err := g.UnaryClientInterceptor()(ctx, next, req, reply, nil,
					func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return errDown })
				within = append(within, err)
				return err
			}
		}
		g = mustGuard(t, clientRules(strict), interceptors.WithFallback("/a.B/Self", calls("/a.B/Self")),
			interceptors.WithFallback("/a.B/Ping", calls("/a.B/Pong")), interceptors.WithFallback("/a.B/Pong", calls("/a.B/Ping")),
			interceptors.WithFallback("/c.D/*", calls("/c.D/Other")))
		_, _ = callOn(g, nil, "/a.B/Self", errDown), callOn(g, nil, "/a.B/Ping", errDown)
		for method, levels := range map[string]int{"/a.B/Self": 1, "/a.B/Ping": 2, "/a.B/Pong": 2} {
			for range 2 { // the breaker is open; the next call is as good as the first
				deepest, within = 0, nil
				err := callOn(g, nil, method, errDown)
				if deepest != levels || len(within) != levels || !errors.Is(err, interceptors.ErrBreakerOpen) || within[0] != err {
					t.Errorf("%s, %s: %d levels, calls within ended with %v, the call with %v", name, method, deepest, within, err)
				}
			}
		}
		deepest = 0
		if err := callOn(g, nil, "/c.D/First", errDown); err != errDown || deepest != 1 {
			t.Errorf("%s, another method of its pattern: %d levels, %v", name, deepest, err)
		}
	}
}

// A context says nothing about other guards: theirs are other fallbacks, even if
// they were made by one option.
func TestFallbackIsOfOneGuard(t *testing.T) {
	var guards [2]*interceptors.Guard
	asked := 0
	opt := interceptors.WithFallback("*", func(ctx context.Context, method string, req, reply any, _ error) error {
		asked++
		return guards[1].UnaryClientInterceptor()(ctx, method, req, reply, nil,
			func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return errDown })
	})
	for i := range guards {
		guards[i] = mustGuard(t, clientRules("breaker: {}"), opt)
	}
	if err := callOn(guards[0], nil, rpctest.Unary, errDown); err != errDown || asked != 2 {
		t.Errorf("asked %d times, %v", asked, err)
	}
}

// A fallback that ends without returning is one that failed.
func TestCase17_FallbackThatBlowsUpHasFailed(t *testing.T) {
	for name, blowUp := range blowUps {
		g := mustGuard(t, clientRules("breaker: {}"), interceptors.WithFallback("*", func(context.Context, string, any, any, error) error {
			blowUp()
			return nil
		}))
		_ = look(t, g) // recording begins
		_ = survive(func() { _ = callOn(g, nil, rpctest.Unary, errDown) })
		e := only(t, look(t, g), "HystrixCommand", "client test.v1.Test/Unary")
		if e["rollingCountFallbackFailure"] != 1.0 || e["rollingCountFallbackSuccess"] != 0.0 || e["rollingCountFallbackMissing"] != 0.0 {
			t.Errorf("%s: failed %v, answered %v, missing %v", name, e["rollingCountFallbackFailure"], e["rollingCountFallbackSuccess"], e["rollingCountFallbackMissing"])
		}
	}
}

func TestCase17_FallbackBlowsUp(t *testing.T) {
	for name, blowUp := range blowUps {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log strings.Builder
				mined := true
				g := mustGuard(t, clientRules(placeForOne), interceptors.WithLogger(slog.New(slog.NewTextHandler(&log, nil))),
					interceptors.WithFallback("*", func(context.Context, string, any, any, error) error {
						if mined {
							blowUp()
						}
						return nil
					}))
				fail := func() error {
					return clientUnary.byHand(t.Context(), g, func(context.Context) error { return errDown })
				}
				// Of a failure, of a rejection, and of a half-open probe.
				for i, want := range []interceptors.Reason{"", interceptors.ReasonBreakerOpen, ""} {
					if i == 2 {
						time.Sleep(5 * time.Second)
					}
					var err error
					p := survive(func() { err = fail() })
					if wanted := map[string]any{"panic": nil, "Goexit": "Goexit"}[name]; p != wanted {
						t.Errorf("call %d: %v came through, want %v", i, p, wanted)
					}
					if name == "panic" && (reasonOf(err) != want || want == "" && err != errDown) {
						t.Errorf("call %d: %v, want the cause", i, err)
					}
					wantState(t, g, interceptors.Client, rpctest.Unary, "open")
				}
				wantEnded(t, g, interceptors.Client, rpctest.Unary, ended{failure: 2})
				if n := strings.Count(log.String(), `callback="fallback of *"`); n != map[string]int{"panic": 1}[name] {
					t.Errorf("logged %d times:\n%s", n, log.String())
				}
				// Nothing is wedged.
				mined = false
				if err := fail(); err != nil {
					t.Errorf("%v, want the fallback's answer", err)
				}
				time.Sleep(5 * time.Second)
				if err := clientUnary.byHand(t.Context(), g, func(context.Context) error { return nil }); err != nil {
					t.Error(err)
				}
				wantState(t, g, interceptors.Client, rpctest.Unary, "closed")
				wantEnded(t, g, interceptors.Client, rpctest.Unary, ended{success: 1, failure: 2})
			})
		})
	}
}

// A call that needs no fallback does not pay for one.
func TestFallbackAllocatesNothingUntilItIsAsked(t *testing.T) {
	f := func(context.Context, string, any, any, error) error { return nil }
	g := mustGuard(t, hotPolicy, interceptors.WithFallback("*", f))
	call := unaryClient(g)
	if got := testing.AllocsPerRun(1000, func() {
		if err := call(); err != nil {
			t.Fatal(err)
		}
	}); got != 0 {
		t.Errorf("a call that succeeds: %v allocations, want 0", got)
	}
	call = rejected(unaryClient(mustGuard(t, "client: {"+oneToken+"}", interceptors.WithFallback("/a.B/C", f))))
	if got := testing.AllocsPerRun(1000, func() {
		if err := call(); err != nil {
			t.Fatal(err)
		}
	}); got != 1 {
		t.Errorf("a rejection of a method without one: %v allocations, want its error", got)
	}
}
