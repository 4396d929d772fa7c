package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// limiterFunc is a limiter given in Go.
type limiterFunc func(ctx context.Context) error

func (f limiterFunc) Limit(ctx context.Context) error { return f(ctx) }

func TestCase19_WaiterCancelledInTheQueueOfPlaces(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		d := newDesk()
		g, conn := a.setup(t, "concurrency_limit: {max_in_flight: 1, max_streams: 1, max_queue: 3}", d.service())
		a.start(t.Context(), conn, "holder")
		a.start(t.Context(), conn, "one")
		ctx, cancel := context.WithCancel(t.Context())
		two := a.start(ctx, conn, "two")
		a.start(t.Context(), conn, "three")

		time.Sleep(time.Second)
		cancel()
		if got := a.state(t, g).ConcurrencyLimit.Queued; got != 2 {
			t.Errorf("%d calls wait after one was cancelled, want 2", got)
		}
		if !two.ended() || status.Code(two.result().err) != codes.Canceled || two.result().took != time.Second {
			t.Errorf("the cancelled call: ended %v after %v: %v", two.ended(), two.result().took, two.result().err)
		}
		for i, want := range [][]string{{"holder", "one"}, {"holder", "one", "three"}, {"holder", "one", "three"}} {
			if got := d.next(nil); !slices.Equal(got, want) {
				t.Errorf("after %d calls have ended the handler has seen %q, want %q", i+1, got, want)
			}
		}
		checkIdle(t, g)
	})
}

func TestCase19_WaiterCancelledInTheQueueForTokens(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		g, conn := a.setup(t, "rate_limit: {requests_per_second: 1, burst: 1, max_wait: 10s}", &rpctest.Service{})
		if err := a.call(t.Context(), conn, "spends the token"); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		head := a.start(ctx, conn, "head")
		second := a.start(t.Context(), conn, "second")
		third := a.start(t.Context(), conn, "third")
		time.Sleep(500 * time.Millisecond)
		cancel()
		if got := a.state(t, g).RateLimit.Waiting; got != 2 {
			t.Errorf("%d calls wait after the head was cancelled, want 2", got)
		}
		if !head.ended() || head.result().took != 500*time.Millisecond {
			t.Errorf("the cancelled head: ended %v after %v", head.ended(), head.result().took)
		}
		pass(5 * time.Second)
		for i, p := range []*pending{second, third} {
			if want := time.Duration(i+1) * time.Second; p.result().err != nil || !near(p.result().took, want) {
				t.Errorf("waiter %d took %v (%v), want the turn of the one before it at %v", i, p.result().took, p.result().err, want)
			}
		}
		checkIdle(t, g)
	})
}

// near compares times on the gates' clock, which rounds up to nanoseconds.
func near(a, b time.Duration) bool { return (a - b).Abs() < time.Microsecond }

func TestCase19_BreakerOpensDuringTheWait(t *testing.T) {
	for _, wait := range []string{
		"concurrency_limit: {max_in_flight: 1, max_streams: 1, max_queue: 3}",
		"rate_limit: {requests_per_second: 1, burst: 1, max_wait: 10s}",
	} {
		t.Run(wait, func(t *testing.T) {
			eachArm(t, func(t *testing.T, a arm) {
				d := newDesk()
				g, conn := a.setup(t, "breaker: {request_volume_threshold: 1, sleep_window: 1m}, "+wait, d.service())
				a.start(t.Context(), conn, "fails")
				waiter := a.start(t.Context(), conn, "waits")
				if waiter.ended() {
					t.Fatalf("the second call did not wait: %v", waiter.result().err)
				}
				if seen := d.next(status.Error(codes.Unavailable, "down")); len(seen) != 1 {
					t.Errorf("the handler has seen %q: the breaker was open after the wait", seen)
				}
				pass(2 * time.Second)
				if !waiter.ended() || reasonOf(waiter.result().err) != interceptors.ReasonBreakerOpen {
					t.Errorf("the waiter: ended %v: %v", waiter.ended(), waiter.result().err)
				}
				checkIdle(t, g)
			})
		})
	}
}

// A limiter given in Go may wait, and come back with a yes when the context has
// ended.
func TestCase19_ContextDoneAfterTheWait(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		wait := limiterFunc(func(ctx context.Context) error { <-ctx.Done(); return nil })
		d := newDesk()
		g, conn := a.setup(t, "rate_limit: {external: waits}, concurrency_limit: {max_in_flight: 1, max_streams: 1}, breaker: {}",
			d.service(), interceptors.WithLimiter("waits", wait))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := a.call(ctx, conn, ""); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("got %v, want the end of the context", err)
		}
		if seen := d.seen(); len(seen) != 0 {
			t.Errorf("the handler ran: %q", seen)
		}
		if c := a.state(t, g).Counts; c.Admitted != 0 || len(c.Rejected) != 0 {
			t.Errorf("counts %+v: the call was neither admitted nor rejected", c)
		}
		checkIdle(t, g)
	})
}

// The place and the end of the context come at the same moment: either may win,
// the place must not be lost.
func TestCase19_CancelledAtTheHandOver(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		d := newDesk()
		g, conn := a.setup(t, "concurrency_limit: {max_in_flight: 1, max_streams: 1, max_queue: 1}", d.service())
		for range 50 {
			holder := a.start(t.Context(), conn, "holder")
			ctx, cancel := context.WithCancel(t.Context())
			a.start(ctx, conn, "waiter")
			go cancel()
			d.next(nil)
			if !holder.ended() || holder.result().err != nil {
				t.Fatalf("the holder: ended %v: %v", holder.ended(), holder.result().err)
			}
			checkIdle(t, g)
		}
	})
}

func TestCase20_DeadlineSoonerThanTheWait(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		g, conn := a.setup(t, "rate_limit: {requests_per_second: 1, burst: 1, max_wait: 1m}", &rpctest.Service{})
		if err := a.call(t.Context(), conn, "spends the token"); err != nil {
			t.Fatal(err)
		}
		for range 5 {
			ctx, cancel := context.WithTimeout(t.Context(), 900*time.Millisecond)
			p := a.start(ctx, conn, "hopeless")
			if !p.ended() || p.result().took != 0 || status.Code(p.result().err) != codes.ResourceExhausted || reasonOf(p.result().err) != interceptors.ReasonRateLimited {
				t.Errorf("a call whose turn comes after its deadline: ended %v after %v: %v, want a rate limit's rejection at once", p.ended(), p.result().took, p.result().err)
			}
			cancel()
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		p := a.start(ctx, conn, "can wait")
		pass(1500 * time.Millisecond)
		if p.result().err != nil || !near(p.result().took, time.Second) {
			t.Errorf("a call whose turn comes in time took %v: %v, want 1s: the refused ones have spent nothing", p.result().took, p.result().err)
		}
		checkIdle(t, g)
	})
}

func TestCase21_RatesFarApart(t *testing.T) {
	for _, tt := range []struct {
		limit string
		burst int
		every time.Duration
	}{
		{"requests_per_second: 0.1", 1, 10 * time.Second}, // burst: at least 1
		{"requests_per_second: 0.1, burst: 3", 3, 10 * time.Second},
		{"requests_per_second: 1, burst: 1", 1, time.Second},
		{"requests_per_second: 1000000, burst: 1", 1, time.Microsecond},
		{"requests_per_second: 1000000, burst: 20", 20, time.Microsecond},
		{"requests_per_second: 2.5", 3, 400 * time.Millisecond},
	} {
		t.Run(tt.limit, func(t *testing.T) {
			eachArm(t, func(t *testing.T, a arm) {
				g, conn := a.setup(t, "rate_limit: {"+tt.limit+"}", &rpctest.Service{})
				for i := range tt.burst {
					if err := a.call(t.Context(), conn, ""); err != nil {
						t.Fatalf("call %d of a burst of %d: %v", i+1, tt.burst, err)
					}
				}
				for range 3 {
					err := a.call(t.Context(), conn, "")
					if reasonOf(err) != interceptors.ReasonRateLimited || !near(retryInfo(err), tt.every) {
						t.Fatalf("beyond the burst: %v, retry in %v, want %v", err, retryInfo(err), tt.every)
					}
					time.Sleep(retryInfo(err))
					if err := a.call(t.Context(), conn, ""); err != nil {
						t.Fatalf("after RetryInfo has passed: %v", err)
					}
				}
				checkIdle(t, g)
			})
		})
	}
}

func TestCase21_BurstOfZeroIsAMistake(t *testing.T) {
	_, err := interceptors.Parse("p.yaml", []byte("client: {rules: [{methods: ['*'], rate_limit: {requests_per_second: 1, burst: 0}}]}"))
	if err == nil || !strings.Contains(err.Error(), "burst") {
		t.Errorf("got %v", err)
	}
}

func TestCase23_OneLimitForUnaryCallsAndStreams(t *testing.T) {
	all := []arm{{method: rpctest.Unary}, {method: rpctest.Other}, {method: rpctest.Bidi}, {method: rpctest.ServerStream}}
	for _, side := range []string{"client", "server"} {
		t.Run("in flight/"+side, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDesk()
				a := arm{side: side}
				g, conn := a.setup(t, "concurrency_limit: {max_in_flight: 4, scope: rule}", d.service())
				for _, a := range all {
					a.start(t.Context(), conn, "")
				}
				for _, a := range all {
					p := a.start(t.Context(), conn, "")
					if !p.ended() || reasonOf(p.result().err) != interceptors.ReasonConcurrencyLimited {
						t.Errorf("%s beyond the limit: ended %v: %v", a.method, p.ended(), p.result().err)
					}
					if l := a.state(t, g).ConcurrencyLimit; l.InFlight != 4 || l.Streams != 0 || l.Limit != 4 {
						t.Errorf("%s: %+v, want the 4 calls of all methods", a.method, l)
					}
				}
				d.next(nil)
				if p := all[0].start(t.Context(), conn, ""); p.ended() {
					t.Errorf("the place of the call that has ended was not to be had: %v", p.result().err)
				}
				for range 4 {
					d.next(nil)
				}
				checkIdle(t, g)
			})
		})
		t.Run("rate/"+side, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := arm{side: side}
				g, conn := a.setup(t, "rate_limit: {requests_per_second: 1, burst: 4, scope: rule}", &rpctest.Service{})
				for _, a := range all {
					if err := a.call(t.Context(), conn, ""); err != nil {
						t.Fatal(err)
					}
				}
				for _, a := range all {
					if err := a.call(t.Context(), conn, ""); reasonOf(err) != interceptors.ReasonRateLimited {
						t.Errorf("%s beyond the shared burst: %v", a.method, err)
					}
				}
				checkIdle(t, g)
			})
		})
	}
}

func TestCase24_PermitReturnsWhenTheHandlerEnds(t *testing.T) {
	ends := map[string]func(){
		"returns": func() {},
		"panics":  func() { panic("boom") },
		"exits":   runtime.Goexit,
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			eachServerArm(t, func(t *testing.T, a arm) {
				deaf := bothKinds(func(context.Context, string) error {
					time.Sleep(10 * time.Second) // outlives its context
					end()
					return nil
				})
				g, conn := a.setup(t, "concurrency_limit: {max_in_flight: 1, max_streams: 1}", deaf)
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				if err := a.call(ctx, conn, ""); status.Code(err) != codes.DeadlineExceeded {
					t.Fatal(err)
				}
				time.Sleep(9*time.Second - time.Millisecond) // the handler has a millisecond to go
				if err := a.call(t.Context(), conn, ""); reasonOf(err) != interceptors.ReasonConcurrencyLimited {
					t.Errorf("the handler still runs, but a call got its place: %v", err)
				}
				if held := a.held(t, g); held != 1 {
					t.Errorf("%d permits are out while the handler runs, want 1", held)
				}
				time.Sleep(time.Millisecond)
				if held := a.held(t, g); held != 0 {
					t.Errorf("%d permits are out when the handler has ended", held)
				}
				checkIdle(t, g)
			})
		})
	}
}

func TestQueueIsFirstInFirstOut(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		d := newDesk()
		g, conn := a.setup(t, "concurrency_limit: {max_in_flight: 2, max_streams: 2, max_queue: 20}", d.service())
		var want []string
		for i := range 22 {
			name := fmt.Sprint(i)
			want = append(want, name)
			if p := a.start(t.Context(), conn, name); p.ended() {
				t.Fatalf("call %d: %v", i, p.result().err)
			}
		}
		if p := a.start(t.Context(), conn, "too many"); !p.ended() || p.result().took != 0 || reasonOf(p.result().err) != interceptors.ReasonConcurrencyLimited {
			t.Errorf("with a full queue: ended %v: %v", p.ended(), p.result().err)
		}
		if l := a.state(t, g).ConcurrencyLimit; a.held(t, g) != 2 || l.Queued != 20 {
			t.Errorf("%+v, want 2 held and 20 queued", l)
		}
		for range want {
			d.next(nil)
		}
		if got := d.seen(); !slices.Equal(got, want) {
			t.Errorf("served in the order %q", got)
		}
		checkIdle(t, g)
	})
}

func TestQueueTimeout(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		d := newDesk()
		g, conn := a.setup(t, "concurrency_limit: {max_in_flight: 1, max_streams: 1, max_queue: 2, max_queue_wait: 50ms}", d.service())
		a.start(t.Context(), conn, "holder")
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		hasty, patient := a.start(ctx, conn, "hasty"), a.start(t.Context(), conn, "patient")
		pass(time.Second)
		if hasty.result().took != 20*time.Millisecond || status.Code(hasty.result().err) != codes.DeadlineExceeded || reasonOf(hasty.result().err) != "" {
			t.Errorf("a call whose deadline passes in the queue took %v: %v", hasty.result().took, hasty.result().err)
		}
		if patient.result().took != 50*time.Millisecond || reasonOf(patient.result().err) != interceptors.ReasonQueueTimeout {
			t.Errorf("a call that waits for longer than max_queue_wait took %v: %v", patient.result().took, patient.result().err)
		}
		if a.side == "client" && (!errors.Is(patient.result().err, interceptors.ErrQueueTimeout) || !errors.Is(patient.result().err, interceptors.ErrConcurrencyLimited)) {
			t.Errorf("%v is not the sentinel errors", patient.result().err)
		}
		d.next(nil)
		checkIdle(t, g)
	})
}

// Streams and unary calls of one method pattern have places of their own unless
// the scope is the rule.
func TestUnaryCallsAndStreamsAreLimitedApart(t *testing.T) {
	for _, side := range []string{"client", "server"} {
		t.Run(side, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDesk()
				a := arm{side: side}
				g, conn := a.setup(t, "concurrency_limit: {max_in_flight: 1}", d.service())
				unary, stream := arm{method: rpctest.Unary}, arm{method: rpctest.Bidi}
				unary.start(t.Context(), conn, "")
				for range 3 {
					if p := stream.start(t.Context(), conn, ""); p.ended() {
						t.Errorf("a stream was refused, max_streams is unlimited: %v", p.result().err)
					}
				}
				if l := stream.state(t, g).ConcurrencyLimit; l.Streams != 3 || l.InFlight != 0 {
					t.Errorf("%+v, want 3 streams", l)
				}
				if p := unary.start(t.Context(), conn, ""); reasonOf(p.result().err) != interceptors.ReasonConcurrencyLimited {
					t.Errorf("a second unary call: %v", p.result().err)
				}
				for range 4 {
					d.next(nil)
				}
				checkIdle(t, g)
			})
		})
	}
}
