package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// touchyHystrix opens at the third failure after it has closed, and calls any
// deadline too short to judge by.
const touchyHystrix = "breaker: {engine: hystrix, request_volume_threshold: 4, sleep_window: 1h, min_deadline: 1h}, concurrency_limit: {max_in_flight: 50, max_streams: 50}"

// strictHystrix opens at the first failure.
const strictHystrix = "breaker: {engine: hystrix, request_volume_threshold: 1, error_percent_threshold: 1, sleep_window: 1h, min_deadline: 1h}, concurrency_limit: {max_in_flight: 1, max_streams: 1}"

func TestCase11_HystrixProbeCancelledByItsCaller(t *testing.T) {
	t.Parallel()
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		r := newRig(t, a, touchyHystrix, script())
		r.fresh()
		r.trip()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		probe := r.probe(ctx, "hang")
		r.is("half_open")
		r.mustNot() // the slot is taken
		cancel()
		r.ends(probe, codes.Canceled)
		r.ended(ended{failure: 3, neutral: 1})
		r.is("half_open")
		r.mustNot() // it costs a sleep window
		r.heard(words{failure: 3, cancelled: 1})

		word, release := holdWord(t)
		ctx, cancel = context.WithTimeout(t.Context(), time.Minute) // too short to count
		defer cancel()
		probe = r.probe(ctx, word+" DEADLINE_EXCEEDED")
		release()
		r.ends(probe, codes.DeadlineExceeded)
		r.ended(ended{failure: 3, neutral: 2})
		r.is("half_open")
		r.heard(words{failure: 3, cancelled: 1, expired: 1})
		r.heal() // and no more
		r.must("")
		r.heard(words{success: 2})
		r.ended(ended{success: 2, failure: 3, neutral: 2})
	})
}

func TestCase11_HystrixProbeFails(t *testing.T) {
	t.Parallel()
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		r := newRig(t, a, touchyHystrix, script())
		r.fresh()
		r.trip()
		for range 3 {
			word, release := holdWord(t)
			probe := r.probe(t.Context(), word+" UNAVAILABLE")
			r.is("half_open")
			release()
			r.ends(probe, codes.Unavailable)
			r.is("open")
			r.mustNot()
		}
		r.heard(words{failure: 6})
		r.heal()
		r.heard(words{success: 1})
		r.ended(ended{success: 1, failure: 6})
	})
}

func TestCase12_HystrixFirstMessageOfAStreamIsTheVerdict(t *testing.T) {
	t.Parallel()
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		if a.unary() {
			t.Skip("of streams")
		}
		r := newRig(t, a, touchyHystrix, script())
		r.fresh()
		r.trip()
		var probe grpc.ClientStream
		r.wake()
		eventually(t, "a probe answers", func() bool {
			var err error
			if probe, err = rpctest.Open(t.Context(), r.conn, a.method); err != nil {
				return false
			}
			_ = rpctest.Send(probe, "")
			_, err = rpctest.Recv(probe)
			return err == nil
		})
		r.doze()
		r.closed()
		if l := r.snapshot().ConcurrencyLimit; l.Streams != 1 {
			t.Errorf("%+v, want the probe's permit out: it is still open", *l)
		}
		r.heard(words{success: 1})

		// Its end is counted, but no news to the breaker.
		if err := rpctest.Send(probe, "UNAVAILABLE"); err != nil {
			t.Fatal(err)
		}
		if _, err := rpctest.Recv(probe); status.Code(err) != codes.Unavailable {
			t.Fatal(err)
		}
		r.ended(ended{failure: 4})
		r.must("")
		r.heard(words{success: 2})
	})
}

func TestCase12_HystrixFirstMessageAndTheEndAtOnce(t *testing.T) {
	t.Parallel()
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		if a.unary() {
			t.Skip("of streams")
		}
		r := newRig(t, a, touchyHystrix, script())
		for range 10 {
			r.fresh()
			r.trip()
			word, release := holdWord(t)
			ctx, cancel := context.WithCancel(t.Context())
			probe := r.probe(ctx, word)
			go release()
			cancel()
			eventually(t, "the probe ends", probe.ended)
			eventually(t, "and is forgotten", func() bool { c := r.snapshot().Counts; return c.Success+c.Failure+c.Neutral == c.Admitted })
			if r.state() == "half_open" { // the end was first: no verdict
				r.heal()
			}
			r.closed()
			r.heard(words{success: 1})
		}
	})
}

func TestCase12_HystrixProbeThatNeverEnds(t *testing.T) {
	t.Parallel()
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		r := newRig(t, a, touchyHystrix, script())
		r.fresh()
		r.trip()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		lost := r.probe(ctx, "hang")
		r.mustNot()
		r.is("half_open")
		r.heal() // another is let through after a sleep window
		if lost.ended() {
			t.Error("the first probe was ended")
		}
		cancel()
		r.ends(lost, codes.Canceled)
		r.ended(ended{success: 1, failure: 3, neutral: 1})
		r.must("")
		r.heard(words{success: 2}) // of the lost one nothing
	})
}

func TestCase12_HystrixServerSlowerThanTheLease(t *testing.T) {
	t.Parallel()
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		r := newRig(t, a, touchyHystrix, script())
		r.fresh()
		r.trip()
		word, release := holdWord(t)
		other, releaseOther := holdWord(t)
		first := r.probe(t.Context(), word)
		second := r.probe(t.Context(), other+" UNAVAILABLE")
		r.is("half_open")
		r.mustNot()
		release()
		r.ends(first, codes.OK)
		r.closed()
		releaseOther()
		r.ends(second, codes.Unavailable)
		r.must("")
		r.heard(words{success: 2}) // the second belongs to the past
		r.is("closed")
		r.ended(ended{success: 2, failure: 4})
	})
}

func TestCase13_HystrixProbeRejectedByAnotherGate(t *testing.T) {
	t.Parallel()
	full := func() error { return errors.New("full") }
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		r := newRig(t, a, "breaker: {engine: hystrix, request_volume_threshold: 4, sleep_window: 1h}, rate_limit: {external: mine}, concurrency_limit: {max_in_flight: 1, scope: rule}", script())
		other := &rig{arm: arm{"", a.side, rpctest.Other}, t: t, guard: r.guard, conn: r.conn}
		for _, gate := range []interceptors.Reason{interceptors.ReasonRateLimited, interceptors.ReasonConcurrencyLimited} {
			r.fresh()
			r.trip()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var taken *pending
			if gate == interceptors.ReasonRateLimited {
				r.guard.limit.Store(&full)
			} else {
				taken = other.begin(ctx, "hang") // the only place
			}
			r.wake()
			eventually(t, "the other gate is asked", func() bool { return reasonOf(r.do(t.Context(), "")) == gate })
			r.doze() // the probe that it was given is not to be lost
			for range 3 {
				if err := r.do(t.Context(), ""); reasonOf(err) != gate {
					t.Fatalf("%v, want %s", err, gate)
				}
			}
			r.is("open") // and ready
			if after := r.snapshot().Breaker.RetryAfter; after != 0 {
				t.Errorf("RetryAfter is %v, want 0: a probe is in hand", after)
			}
			r.heard(words{failure: 3})
			r.guard.limit.Store(nil)
			if taken != nil {
				cancel()
				other.ends(taken, codes.Canceled)
				eventually(t, "the place is free", func() bool { return other.snapshot().ConcurrencyLimit.InFlight == 0 })
			}
			r.must("")
			r.closed()
			r.heard(words{success: 1})
			r.ended(ended{success: 1, failure: 3})
		}
	})
}

func TestCase14_HystrixStaleResults(t *testing.T) {
	t.Parallel()
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		r := newRig(t, a, touchyHystrix, script())
		r.fresh()
		well, releaseWell := holdWord(t)
		badly, releaseBadly := holdWord(t)
		success := r.begin(t.Context(), well)
		var failures []*pending
		for range 5 { // enough to open
			failures = append(failures, r.begin(t.Context(), badly+" UNAVAILABLE"))
		}
		r.trip()
		releaseWell()
		r.ends(success, codes.OK)
		r.mustNot() // a success from before the opening does not close
		r.is("open")
		if !r.circuit().IsOpen() {
			t.Error("others find it closed")
		}
		r.heard(words{failure: 3})

		r.heal()
		r.fail(1) // two fewer than it takes
		releaseBadly()
		for _, f := range failures {
			r.ends(f, codes.Unavailable)
		}
		r.must("") // nor does a failure from before it open
		r.is("closed")
		r.heard(words{success: 2, failure: 1})
		r.ended(ended{success: 3, failure: 9})
	})
}

// Refusals and failures that hystrix-go has not applied when the circuit closes
// must not count in its new life.
func TestCase14_HystrixQueueAtTheClosing(t *testing.T) {
	t.Parallel()
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		r := handRig(t, a, strictHystrix)
		for range 5 {
			r.fresh()
			r.trip()
			r.wake()
			eventually(t, "a probe comes amidst refusals", func() bool {
				r.doze()
				for range 200 {
					r.mustNot()
				}
				r.wake()
				return r.do(t.Context(), "") == nil
			})
			r.doze()
			r.is("closed")
			r.closed()
			r.must("")
			r.heard(words{success: 2})
			r.is("closed")
		}
		r.ended(ended{success: 2, failure: 1})
	})
}

func TestCase15_HystrixWhatNeverOpens(t *testing.T) {
	t.Parallel()
	kinds := []struct {
		name     string
		err      error
		deadline time.Duration
		cancel   bool // by the caller, while the call runs
		ended    ended
		words    words
	}{
		{"NotFound", status.Error(codes.NotFound, ""), 0, false, ended{success: 1}, words{success: 1}},
		{"InvalidArgument", status.Error(codes.InvalidArgument, ""), 0, false, ended{success: 1}, words{success: 1}},
		{"Canceled", status.Error(codes.Canceled, ""), 0, true, ended{neutral: 1}, words{cancelled: 1}},
		{"cancelled, whatever the code", status.Error(codes.Unavailable, ""), 0, true, ended{neutral: 1}, words{cancelled: 1}},
		{"short deadline", status.Error(codes.DeadlineExceeded, ""), time.Minute, false, ended{neutral: 1}, words{expired: 1}},
		{"own rejection", fmt.Errorf("stock: %w", &interceptors.RejectedError{Reason: interceptors.ReasonRateLimited}), 0, false, ended{neutral: 1}, words{none: 1}},
		{"too large", status.Error(codes.ResourceExhausted, ""), 0, false, ended{neutral: 1}, words{none: 1}},
	}
	const each, batch = 2500, 500 // 10,000 on all arms; in batches, for hystrix-go queues 2,000 and drops more
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		r := handRig(t, a, strictHystrix+" # never opens")
		var outcomes ended
		told := r.words
		for _, k := range kinds {
			for i := range each {
				ctx, cancel := context.WithCancel(t.Context())
				if k.deadline > 0 {
					ctx, cancel = context.WithTimeout(t.Context(), k.deadline)
				}
				err := r.byHand(ctx, r.guard.Guard, func(context.Context) error {
					if k.cancel {
						cancel()
					}
					return k.err
				})
				cancel()
				if reasonOf(err) == interceptors.ReasonBreakerOpen || err == nil {
					t.Fatalf("%s: %v", k.name, err)
				}
				if i%batch == 0 {
					eventually(t, k.name, func() bool { return r.told().attempts >= told.sum()+i+1 })
				}
			}
			outcomes = outcomes.plus(k.ended, each)
			told = told.plus(k.words, each)
			r.heard(told.plus(r.words, -1))
		}
		r.is("closed")
		if n := r.snapshot().Breaker.Failures; n != 0 {
			t.Errorf("%d failures", n)
		}
		r.ended(outcomes)
	})
}

// The same through gRPC, and what only that has.
func TestCase15_HystrixOverTheWire(t *testing.T) {
	t.Parallel()
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		r := newRig(t, a, strictHystrix, script())
		r.fresh()
		short, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		for range 20 {
			_ = r.do(t.Context(), "NOT_FOUND")
			_ = r.do(t.Context(), "INVALID_ARGUMENT")
			_ = r.do(short, "DEADLINE_EXCEEDED")
			ctx, cancel := context.WithCancel(t.Context())
			running := r.begin(ctx, "hang")
			cancel()
			r.ends(running, codes.Canceled)
			eventually(t, "the place is free", func() bool {
				l := r.snapshot().ConcurrencyLimit
				return l.InFlight+l.Streams == 0
			})
			if a.side == "client" { // from this process, it never leaves
				_ = r.do(t.Context(), "\xff")
			}
		}
		want, heard := ended{success: 40, neutral: 40}, words{success: 40, expired: 20, cancelled: 20}
		if a.side == "client" {
			want.neutral, heard.none = 60, 20
		}
		r.ended(want)
		r.heard(heard)
		r.is("closed")
	})
}

func TestCase15_HystrixOwnRejectionsAreNotCounted(t *testing.T) {
	t.Parallel()
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		r := handRig(t, a, strictHystrix)
		r.fresh()
		r.trip()
		before := r.snapshot().Counts.Rejected[interceptors.ReasonBreakerOpen]
		for range 2500 { // 10,000 on all arms
			r.mustNot()
		}
		if n := r.snapshot().Counts.Rejected[interceptors.ReasonBreakerOpen] - before; n != 2500 {
			t.Errorf("%d rejections, want 2500", n)
		}
		r.heal() // they have not made it any longer
		r.must("")
		r.is("closed")
		r.heard(words{success: 2})
		r.ended(ended{success: 2, failure: 1})
	})
}

func TestCase16_HystrixBackendOfOpenStreamsDies(t *testing.T) {
	t.Parallel()
	onHystrixArms(t, []arm{arms[1], arms[3]}, func(t *testing.T, a arm) {
		r := useRig(t, a, strings.ReplaceAll(touchyHystrix, "50", "200"))
		srv, lis := rpctest.NewServer(script(), r.serverOptions()...), rpctest.Listen()
		served := make(chan error)
		go func() { served <- srv.Serve(lis) }()
		r.conn = rpctest.Dial(t, lis, r.dialOptions()...)
		r.fresh()
		var running []*pending
		for range 100 {
			running = append(running, r.begin(t.Context(), "hang"))
		}
		srv.Stop()
		for _, p := range running {
			r.ends(p, codes.Unavailable)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
		if a.side == "server" { // it was the callers that went
			r.ended(ended{neutral: 100})
			r.heard(words{cancelled: 100})
			r.is("closed")
			return
		}
		r.ended(ended{failure: 100})
		eventually(t, "it opens", func() bool { return r.state() == "open" })
	})
}

// TestCase18_HystrixIdle is about what happened more than 10 seconds ago.
func TestCase18_HystrixIdle(t *testing.T) {
	t.Parallel()
	var rigs []*rig
	for _, a := range arms {
		r := newRig(t, a, touchyHystrix+" # left alone: "+a.name, script())
		r.fresh()
		r.fail(2)
		r.is("closed")
		rigs = append(rigs, r)
	}
	var forgotten int64
	eventually(t, "the window is empty", func() bool {
		now := time.Now().Unix()
		for _, r := range rigs {
			if r.snapshot().Breaker.Requests != 0 {
				forgotten = now
			}
			time.Sleep(10 * time.Millisecond)
		}
		return now > forgotten+1 // the engine's own figures may be a second apart from hystrix-go's
	})
	for _, r := range rigs {
		r.fail(3)
		r.is("closed")
		r.fail(1)
		r.is("open")
		r.heal()
		r.ended(ended{success: 1, failure: 6})
	}
}

// plus adds other n times.
func (e ended) plus(other ended, n uint64) ended {
	return ended{e.success + n*other.success, e.failure + n*other.failure, e.neutral + n*other.neutral, e.dropped + n*other.dropped}
}
