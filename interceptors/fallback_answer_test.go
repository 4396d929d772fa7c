package interceptors_test

import (
	"context"
	"errors"
	"fmt"
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
			if ctx != caller || req != any(request) || reply != any(answer) {
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

// A fallback may call through the guard that asks it, the same method even.
func TestFallbackCallsThroughTheGuard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var conn *grpc.ClientConn
		depth := 0
		g := mustGuard(t, clientRules("concurrency_limit: {max_in_flight: 1}"),
			interceptors.WithFallback("/test.v1.Test/*", func(ctx context.Context, method string, _, reply any, cause error) error {
				if depth++; depth > 3 {
					return cause
				}
				if method == rpctest.Unary {
					return conn.Invoke(ctx, rpctest.Other, &rpctest.Message{Value: "UNAVAILABLE"}, reply)
				}
				return conn.Invoke(ctx, rpctest.Other, &rpctest.Message{Value: fmt.Sprint("second hand ", depth)}, reply)
			}))
		conn = rpctest.Start(t, script(), nil, g.DialOptions())
		if got, err := rpctest.Call(t.Context(), conn, rpctest.Unary, "UNAVAILABLE"); got != "second hand 2" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		wantEnded(t, g, interceptors.Client, rpctest.Unary, oneFailure)
		wantEnded(t, g, interceptors.Client, rpctest.Other, ended{success: 1, failure: 1})
	})
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
