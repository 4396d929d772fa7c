package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// What a fallback makes of a call is shown beside what the call was.
func TestHystrixFallbacks(t *testing.T) {
	giveUp := errors.New("no answer")
	answer := func(_ context.Context, _ string, req, _ any, _ error) error {
		if req.(*rpctest.Message).GetValue() == "UNAVAILABLE" {
			return nil
		}
		return giveUp
	}
	g := mustGuard(t, "client: {rules: [{methods: ['*'], breaker: {}}]}", interceptors.WithFallback("*", answer))
	conn := rpctest.Start(t, script(), nil, g.DialOptions())
	look(t, g)
	for text, want := range map[string]error{"UNAVAILABLE": nil, "INTERNAL": giveUp, "NOT_FOUND": status.Error(codes.NotFound, "as asked for"), "": nil} {
		if _, err := rpctest.Call(t.Context(), conn, rpctest.Unary, text); fmt.Sprint(err) != fmt.Sprint(want) {
			t.Errorf("%q: %v, want %v", text, err, want)
		}
	}
	e := only(t, look(t, g), "HystrixCommand", "passthrough:///test test.v1.Test/Unary")
	keys := []string{"rollingCountSuccess", "rollingCountFailure", "rollingCountFallbackSuccess", "rollingCountFallbackFailure", "rollingCountFallbackMissing", "rollingCountExceptionsThrown"}
	if got, want := e.numbers(keys...), []int{2, 2, 1, 1, 0, 1}; !slices.Equal(got, want) {
		t.Errorf("got  %v\nwant %v\nfor  %v", got, want, keys)
	}
}

// Whether a fallback is missing, and whether the caller got an error, is told apart by
// what the call was. Each step adds to the counts of those before it.
func TestHystrixFallbacksByCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		giveUp := errors.New("no answer")
		var answer error
		g := mustGuard(t, clientRules("minimum_budget: 60ms, breaker: {request_volume_threshold: 6}, concurrency_limit: {max_in_flight: 1, max_queue: 1, max_queue_wait: 1h}"),
			interceptors.WithFallback("*", func(context.Context, string, any, any, error) error { return answer }),
			interceptors.WithClassifier(func(_ context.Context, _ interceptors.Side, _ string, err error) interceptors.Outcome {
				if c := status.Code(err); c == codes.Unavailable {
					return interceptors.Failure
				}
				return interceptors.Neutral
			}))
		look(t, g)
		call := func(ctx context.Context, end error) error {
			return clientUnary.byHand(ctx, g, func(context.Context) error { return end })
		}
		within := func(d time.Duration, f func(context.Context, func())) {
			ctx, cancel := context.WithTimeout(t.Context(), d)
			defer cancel()
			f(ctx, cancel)
		}
		shed, denied := status.Error(codes.ResourceExhausted, ""), status.Error(codes.PermissionDenied, "")
		inner := &interceptors.RejectedError{Side: interceptors.Client, Method: rpctest.Unary, Reason: interceptors.ReasonRateLimited}
		keys := []string{"errorCount", "rollingCountShortCircuited", "rollingCountSemaphoreRejected", "rollingCountBadRequests",
			"rollingCountFallbackSuccess", "rollingCountFallbackFailure", "rollingCountFallbackMissing", "rollingCountExceptionsThrown"}
		sum := make([]int, len(keys))
		for _, step := range []struct {
			name   string
			answer error
			do     func()
			adds   []int
		}{
			{"failures that are answered", nil, func() { _ = call(t.Context(), errDown); _ = call(t.Context(), errDown) }, []int{2, 0, 0, 0, 2, 0, 0, 0}},
			{"a failure that is not", giveUp, func() { _ = call(t.Context(), errDown) }, []int{1, 0, 0, 0, 0, 1, 0, 1}},
			{"bad requests that are answered", nil, func() {
				for range 7 {
					_ = call(t.Context(), shed)
				}
			}, []int{0, 0, 0, 7, 7, 0, 0, 0}},
			{"a bad request that is not", giveUp, func() { _ = call(t.Context(), shed) }, []int{0, 0, 0, 1, 0, 1, 0, 1}},
			{"a bad request without a fallback", nil, func() { _ = call(t.Context(), denied) }, []int{0, 0, 0, 1, 0, 0, 0, 1}},
			{"a failure without one: its caller has cancelled, late", nil, func() {
				within(100*time.Millisecond, func(ctx context.Context, cancel func()) {
					_ = clientUnary.byHand(ctx, g, func(context.Context) error {
						time.Sleep(90 * time.Millisecond)
						cancel()
						return errDown
					})
				})
			}, []int{1, 0, 0, 0, 0, 0, 1, 1}},
			{"another guard's rejection", nil, func() { _ = call(t.Context(), inner) }, []int{0, 0, 0, 1, 1, 0, 0, 0}},
			{"too small a budget", nil, func() {
				within(50*time.Millisecond, func(ctx context.Context, _ func()) { _ = call(ctx, nil) })
			}, []int{0, 0, 0, 1, 1, 0, 0, 0}},
			{"no place, and a deadline that ends in the queue, which is in no count", nil, func() {
				end := make(chan struct{})
				go func() { _ = clientUnary.byHand(t.Context(), g, func(context.Context) error { <-end; return nil }) }()
				synctest.Wait()
				go within(100*time.Millisecond, func(ctx context.Context, _ func()) {
					if err := call(ctx, nil); err != nil {
						t.Errorf("in the queue: %v, want the fallback's answer", err)
					}
				})
				synctest.Wait()
				_ = call(t.Context(), nil)
				pass(time.Second)
				close(end)
				synctest.Wait()
			}, []int{0, 0, 1, 0, 1, 0, 0, 0}},
			{"the breaker", giveUp, func() { _ = call(t.Context(), errDown); _ = call(t.Context(), nil) }, []int{1, 1, 0, 0, 0, 2, 0, 2}},
		} {
			answer = step.answer
			step.do()
			for i, n := range step.adds {
				sum[i] += n
			}
			if got := only(t, look(t, g), "HystrixCommand", "client test.v1.Test/Unary").numbers(keys...); !slices.Equal(got, sum) {
				t.Fatalf("%s:\ngot  %v\nwant %v\nfor  %v", step.name, got, sum, keys)
			}
		}
	})
}

// A fallback may be counted later than its call, and then for longer: no count wraps.
func TestHystrixFallbackTakesItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, clientRules("breaker: {}"), interceptors.WithFallback("*", func(context.Context, string, any, any, error) error {
			time.Sleep(5 * time.Second)
			return nil
		}))
		look(t, g)
		_ = clientUnary.byHand(t.Context(), g, func(context.Context) error { return errDown })
		pass(6 * time.Second)
		keys := []string{"errorCount", "rollingCountFallbackSuccess", "rollingCountFallbackMissing", "rollingCountExceptionsThrown"}
		if got, want := look(t, g)[0].numbers(keys...), []int{0, 1, 0, 0}; !slices.Equal(got, want) {
			t.Errorf("got  %v\nwant %v\nfor  %v", got, want, keys)
		}
	})
}
