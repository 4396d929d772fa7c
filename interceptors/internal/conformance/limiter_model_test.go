package conformance

import (
	"context"
	"fmt"
	"math/big"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/limiter"
)

// modelBucket is a token bucket in exact fractions.
type modelBucket struct {
	rate, tokens, burst *big.Rat // tokens per nanosecond, tokens
	last                time.Duration
}

func newModelBucket(rate float64, burst int) *modelBucket {
	perSecond := new(big.Rat)
	perSecond.SetString(fmt.Sprint(rate)) // as it is written, 0.1 is a tenth
	return &modelBucket{
		rate:   perSecond.Quo(perSecond, big.NewRat(1e9, 1)),
		tokens: big.NewRat(int64(burst), 1),
		burst:  big.NewRat(int64(burst), 1),
	}
}

func (m *modelBucket) refill(now time.Duration) {
	gain := new(big.Rat).Mul(m.rate, big.NewRat(int64(now-m.last), 1))
	if m.tokens.Add(m.tokens, gain).Cmp(m.burst) > 0 {
		m.tokens.Set(m.burst)
	}
	m.last = now
}

var oneToken = big.NewRat(1, 1)

func (m *modelBucket) take(now time.Duration) bool {
	m.refill(now)
	if m.tokens.Cmp(oneToken) < 0 {
		return false
	}
	m.tokens.Sub(m.tokens, oneToken)
	return true
}

// retryAfter is the time to the next whole token, rounded up.
func (m *modelBucket) retryAfter(now time.Duration) time.Duration {
	m.refill(now)
	missing := new(big.Rat).Sub(oneToken, m.tokens)
	missing.Quo(missing, m.rate)
	up := new(big.Int).Add(missing.Num(), new(big.Int).Sub(missing.Denom(), big.NewInt(1)))
	return max(1, time.Duration(up.Quo(up, missing.Denom()).Int64()))
}

var bursts = rapid.SampledFrom([]int{1, 2, 3, 10, 1000})

// pauses are around what a token takes at the rate.
func pauses(rate float64) *rapid.Generator[time.Duration] {
	token := int64(1e9 / rate)
	return rapid.OneOf(
		rapid.SampledFrom([]time.Duration{0, 1, time.Duration(token - 1), time.Duration(token), time.Duration(token + 1), time.Hour}),
		rapid.Custom(func(t *rapid.T) time.Duration { return time.Duration(rapid.Int64Range(0, 3*token).Draw(t, "d")) }),
	)
}

// Where 1/rate is a whole number of 64ths of a nanosecond, the bucket is exact.
func TestBucketAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rate := rapid.SampledFrom([]float64{0.001, 0.1, 0.5, 1, 8, 10, 1000, 1024, 12_500, 100_000, 6_400_000, 1e7}).Draw(t, "rate")
		burst := bursts.Draw(t, "burst")
		real, model := limiter.NewBucket(rate, burst, 0), newModelBucket(rate, burst)
		now := rapid.SampledFrom([]time.Duration{0, 1, 365 * 24 * time.Hour}).Draw(t, "now")
		pause := pauses(rate)
		t.Repeat(map[string]func(*rapid.T){
			"take": func(t *rapid.T) {
				if got, want := real.Take(now), model.take(now); got != want {
					t.Fatalf("at %v: Take() = %v, model %v", now, got, want)
				}
			},
			"take all": func(t *rapid.T) {
				got, want := 0, 0
				for real.Take(now) {
					got++
				}
				for model.take(now) {
					want++
				}
				if got != want {
					t.Fatalf("at %v: %d tokens, model %d", now, got, want)
				}
			},
			"pause": func(t *rapid.T) { now += pause.Draw(t, "pause") },
			"retry": func(t *rapid.T) { now += real.RetryAfter(now) - time.Duration(rapid.IntRange(0, 1).Draw(t, "early")) },
			"": func(t *rapid.T) {
				if got, want := real.RetryAfter(now), model.retryAfter(now); got != want {
					t.Fatalf("at %v: retry after %v, model %v", now, got, want)
				}
				available, waiting := real.Stats(now)
				want, _ := model.tokens.Float64()
				if d := available - want; d > 1e-9*want+1e-9 || d < -1e-9*want-1e-9 || waiting != 0 {
					t.Fatalf("at %v: %v available, model %v", now, available, want)
				}
				if real.Idle(now) != (model.tokens.Cmp(model.burst) == 0) {
					t.Fatalf("at %v: Idle() = %v with %v of %d", now, real.Idle(now), want, burst)
				}
			},
		})
	})
}

// At any rate, the bucket never has more than the exact one has, and never less
// than one that is 0.02 % slower.
func TestBucketBetweenModels(t *testing.T) {
	check(t, func(t *rapid.T) {
		rate := rapid.Float64Range(0.001, 1e7).Draw(t, "rate")
		burst := bursts.Draw(t, "burst")
		real := limiter.NewBucket(rate, burst, 0)
		// Both are told what the real one did: they must be able to, or have to.
		upper, lower := newModelBucket(rate, burst), newModelBucket(rate, burst)
		lower.rate.Mul(lower.rate, big.NewRat(9998, 10_000))
		tolerance := big.NewRat(1, 1e9) // float64(1/rate) is not exact
		now := time.Duration(0)
		pause := pauses(rate)
		t.Repeat(map[string]func(*rapid.T){
			"take": func(t *rapid.T) {
				took := real.Take(now)
				upper.refill(now)
				lower.refill(now)
				if took {
					if new(big.Rat).Add(upper.tokens, tolerance).Cmp(oneToken) < 0 {
						t.Fatalf("at %v: took a token, there were only %v", now, upper.tokens.FloatString(12))
					}
					upper.tokens.Sub(upper.tokens, oneToken)
					lower.tokens.Sub(lower.tokens, oneToken)
				} else if new(big.Rat).Sub(lower.tokens, tolerance).Cmp(oneToken) >= 0 {
					t.Fatalf("at %v: took none of %v", now, lower.tokens.FloatString(12))
				}
			},
			"pause": func(t *rapid.T) { now += pause.Draw(t, "pause") },
			"retry": func(t *rapid.T) { now += real.RetryAfter(now) },
		})
	})
}

// queueOp is one step of a run with a queue; pick chooses which call.
type queueOp struct {
	kind string
	pick int
	d    time.Duration
}

// queueOps draws a whole run beforehand: what happens in a synctest bubble is on
// a goroutine that rapid does not know.
func queueOps(t *rapid.T, kinds ...string) []queueOp {
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) queueOp {
		return queueOp{
			kind: rapid.SampledFrom(kinds).Draw(t, "kind"),
			pick: rapid.IntRange(0, 1000).Draw(t, "pick"),
			d:    time.Duration(rapid.IntRange(0, 40).Draw(t, "d")) * 10 * time.Millisecond,
		}
	}), 0, 60).Draw(t, "ops")
}

// waiter is a call in a queue, for the real one and for the model.
type waiter struct {
	id      int
	cancel  func()
	since   time.Duration
	verdict chan limiter.Verdict
}

// expect lets everything happen and compares how the call ended; nil: not yet.
func (w *waiter) expect(want *limiter.Verdict) error {
	synctest.Wait()
	select {
	case got := <-w.verdict:
		if want == nil || got != *want {
			return fmt.Errorf("call %d ended with verdict %d, model %v", w.id, got, show(want))
		}
	default:
		if want != nil {
			return fmt.Errorf("call %d still waits, model %v", w.id, show(want))
		}
	}
	return nil
}

func show(v *limiter.Verdict) string {
	if v == nil {
		return "waits"
	}
	return fmt.Sprint(*v)
}

func verdict(v limiter.Verdict) *limiter.Verdict { return &v }

func start(ctx context.Context, id int, now time.Duration, wait func(context.Context) limiter.Verdict) *waiter {
	ctx, cancel := context.WithCancel(ctx)
	w := &waiter{id: id, cancel: cancel, since: now, verdict: make(chan limiter.Verdict, 1)}
	go func() { w.verdict <- wait(ctx) }()
	return w
}

// checkInBubble runs a drawn case in virtual time.
func checkInBubble(t *testing.T, draw func(*rapid.T) func(*testing.T) error) {
	check(t, func(rt *rapid.T) {
		run := draw(rt)
		var err error
		synctest.Test(t, func(t *testing.T) { err = run(t) })
		if err != nil {
			rt.Fatal(err)
		}
	})
}

func TestSemaphoreAgainstModel(t *testing.T) {
	checkInBubble(t, func(rt *rapid.T) func(*testing.T) error {
		limit := rapid.IntRange(0, 3).Draw(rt, "limit")
		maxQueue := rapid.IntRange(0, 3).Draw(rt, "max queue")
		maxWait := rapid.SampledFrom([]time.Duration{0, 105 * time.Millisecond}).Draw(rt, "max wait")
		ops := queueOps(rt, "call", "call", "call", "try", "release", "release", "cancel", "sleep")
		return func(t *testing.T) error {
			return runSemaphore(t, limit, maxQueue, maxWait, ops)
		}
	})
}

func runSemaphore(t *testing.T, limit, maxQueue int, maxWait time.Duration, ops []queueOp) (err error) {
	s := limiter.NewSemaphore(limit, maxQueue, maxWait)
	epoch := time.Now()
	inFlight := 0
	var queue []*waiter
	expect := func(w *waiter, want *limiter.Verdict) {
		if e := w.expect(want); err == nil {
			err = e
		}
	}
	free := func() bool { return limit == 0 || inFlight < limit }
	for id, op := range ops {
		now := time.Since(epoch)
		switch op.kind {
		case "call":
			w := start(t.Context(), id, now, func(ctx context.Context) limiter.Verdict {
				if s.TryAcquire() {
					return limiter.Admitted
				}
				return s.Acquire(ctx)
			})
			switch {
			case len(queue) == 0 && free():
				inFlight++
				expect(w, verdict(limiter.Admitted))
			case len(queue) >= maxQueue:
				expect(w, verdict(limiter.Refused))
			default:
				queue = append(queue, w)
			}
		case "try":
			want := len(queue) == 0 && free()
			if got := s.TryAcquire(); got != want && err == nil {
				err = fmt.Errorf("TryAcquire() = %v, model %v", got, want)
			}
			if want {
				inFlight++
			}
		case "release":
			if inFlight == 0 {
				continue
			}
			s.Release()
			if len(queue) > 0 {
				expect(queue[0], verdict(limiter.Admitted))
				queue = queue[1:]
			} else {
				inFlight--
			}
		case "cancel":
			if len(queue) == 0 {
				continue
			}
			i := op.pick % len(queue)
			queue[i].cancel()
			expect(queue[i], verdict(limiter.Ended))
			queue = slices.Delete(queue, i, i+1)
		case "sleep":
			time.Sleep(op.d)
			for maxWait > 0 && len(queue) > 0 && queue[0].since+maxWait <= now+op.d {
				expect(queue[0], verdict(limiter.TimedOut))
				queue = queue[1:]
			}
		}
		for _, w := range queue {
			expect(w, nil)
		}
		synctest.Wait()
		if n, q := s.Stats(); err == nil && (n != inFlight || q != len(queue)) {
			err = fmt.Errorf("%d in flight, %d queued, model %d, %d", n, q, inFlight, len(queue))
		}
		if err != nil {
			err = fmt.Errorf("op %d %+v: %w", id, op, err)
			break
		}
	}
	for _, w := range queue {
		w.cancel()
	}
	return err
}

func TestBucketQueueAgainstModel(t *testing.T) {
	checkInBubble(t, func(rt *rapid.T) func(*testing.T) error {
		burst := rapid.IntRange(1, 3).Draw(rt, "burst")
		maxWait := rapid.SampledFrom([]time.Duration{0, 100, 350, 1000}).Draw(rt, "max wait") * time.Millisecond
		ops := queueOps(rt, "call", "call", "call", "take", "cancel", "deadline", "sleep", "sleep")
		return func(t *testing.T) error {
			return runBucket(t, burst, maxWait, ops)
		}
	})
}

// runBucket has a token every 100ms and waiters that wait for one each. The
// model steps from token to token.
func runBucket(t *testing.T, burst int, maxWait time.Duration, ops []queueOp) (err error) {
	const perToken = 100 * time.Millisecond
	b := limiter.NewBucket(10, burst, maxWait)
	epoch := time.Now()
	clock := func() time.Duration { return time.Since(epoch) }
	model := newModelBucket(10, burst)
	var queue []*waiter
	expect := func(w *waiter, want *limiter.Verdict) {
		if e := w.expect(want); err == nil {
			err = e
		}
	}
	// turn is when a newcomer has its token, if nobody leaves.
	turn := func(now time.Duration) time.Duration {
		if model.refill(now); model.tokens.Cmp(big.NewRat(int64(len(queue)+1), 1)) >= 0 {
			return 0
		}
		return model.retryAfter(now) + time.Duration(len(queue))*perToken
	}
	for id, op := range ops {
		now := clock()
		switch op.kind {
		case "call", "deadline":
			ctx, patience := t.Context(), maxWait
			if op.kind == "deadline" {
				// Between two tokens: a turn at the very deadline may end either way.
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, op.d+5*time.Millisecond)
				defer cancel()
				patience = min(patience, op.d+5*time.Millisecond)
			}
			due := turn(now)
			w := start(ctx, id, now, func(ctx context.Context) limiter.Verdict {
				if b.Take(now) {
					return limiter.Admitted
				}
				return b.Wait(ctx, clock)
			})
			switch {
			case len(queue) == 0 && model.take(now):
				expect(w, verdict(limiter.Admitted))
			case due > patience || maxWait == 0:
				expect(w, verdict(limiter.Refused))
			default:
				queue = append(queue, w)
			}
		case "take":
			want := len(queue) == 0 && model.take(now)
			if got := b.Take(now); got != want && err == nil {
				err = fmt.Errorf("Take() = %v, model %v", got, want)
			}
		case "cancel":
			if len(queue) == 0 {
				continue
			}
			i := op.pick % len(queue)
			queue[i].cancel()
			expect(queue[i], verdict(limiter.Ended))
			queue = slices.Delete(queue, i, i+1)
		case "sleep":
			for until := now + op.d; len(queue) > 0; {
				at := clock() + model.retryAfter(clock())
				if at > until {
					break
				}
				time.Sleep(at - clock())
				if !model.take(at) {
					return fmt.Errorf("op %d: the model is wrong", id)
				}
				expect(queue[0], verdict(limiter.Admitted))
				queue = queue[1:]
			}
			time.Sleep(now + op.d - clock())
		}
		for _, w := range queue {
			expect(w, nil)
		}
		synctest.Wait()
		model.refill(clock())
		tokens, _ := model.tokens.Float64()
		if available, waiting := b.Stats(clock()); err == nil && (waiting != len(queue) || available-tokens > 1e-6 || tokens-available > 1e-6) {
			err = fmt.Errorf("%v available, %d waiting, model %v, %d", available, waiting, tokens, len(queue))
		}
		if err != nil {
			err = fmt.Errorf("op %d %+v: %w", id, op, err)
			break
		}
	}
	for _, w := range queue {
		w.cancel()
	}
	return err
}
