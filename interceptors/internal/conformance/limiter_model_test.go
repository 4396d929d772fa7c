package conformance

import (
	"context"
	"fmt"
	"math"
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
	still               bool // no token comes before the first is taken
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
	if !m.still {
		m.tokens.Add(m.tokens, new(big.Rat).Mul(m.rate, big.NewRat(int64(now-m.last), 1)))
	}
	if m.tokens.Cmp(m.burst) > 0 {
		m.tokens.Set(m.burst)
	}
	m.last = now
}

// become returns another bucket with the tokens of this one.
func (m *modelBucket) become(s setting, now time.Duration) *modelBucket {
	m.refill(now)
	next := newModelBucket(s.rate, s.burst)
	next.tokens.Set(m.tokens)
	next.last = now
	next.refill(now)
	return next
}

// setting is what a rate limit may be. A pacer is a bucket for one call more than its
// slack, with one token to begin with.
type setting struct {
	pacing  bool
	rate    float64
	burst   int
	maxWait time.Duration
}

func (s setting) limit() *limiter.Rate {
	if s.pacing {
		return limiter.NewPacer(s.rate, s.burst-1, s.maxWait)
	}
	return limiter.NewBucket(s.rate, s.burst, s.maxWait)
}

func (s setting) model() *modelBucket {
	m := newModelBucket(s.rate, s.burst)
	if s.pacing {
		m.tokens.Set(oneToken)
		m.still = true
	}
	return m
}

var oneToken = big.NewRat(1, 1)

func (m *modelBucket) take(now time.Duration) bool {
	m.refill(now)
	if m.tokens.Cmp(oneToken) < 0 {
		return false
	}
	m.tokens.Sub(m.tokens, oneToken)
	m.still = false
	return true
}

// wait is the time until there are n tokens, rounded up; negative: since there are.
func (m *modelBucket) wait(now time.Duration, n int) time.Duration {
	m.refill(now)
	missing := new(big.Rat).Sub(big.NewRat(int64(n), 1), m.tokens)
	missing.Quo(missing, m.rate)
	up := new(big.Int).Add(missing.Num(), new(big.Int).Sub(missing.Denom(), big.NewInt(1)))
	return time.Duration(up.Div(up, missing.Denom()).Int64())
}

func (m *modelBucket) retryAfter(now time.Duration) time.Duration { return max(1, m.wait(now, 1)) }

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

// Whatever it becomes, a limit never has more than an exact bucket would have that
// becomes the same, and never less than one that is 0.1 % slower.
func TestBecomeBetweenModels(t *testing.T) {
	check(t, func(t *rapid.T) {
		settings := rapid.Custom(func(t *rapid.T) setting {
			s := setting{pacing: rapid.Bool().Draw(t, "pacing"), burst: bursts.Draw(t, "burst")}
			s.rate = rapid.OneOf(
				rapid.SampledFrom([]float64{0.001, 0.1, 1, 3, 10, 1e6}),
				rapid.Float64Range(0.001, 1e6),
			).Draw(t, "rate")
			if !s.pacing && rapid.Bool().Draw(t, "fast") {
				s.rate *= 10
			}
			return s
		})
		slower := func(m *modelBucket) *modelBucket {
			m.rate.Mul(m.rate, big.NewRat(999, 1000))
			return m
		}
		is := settings.Draw(t, "setting")
		real, upper, lower := is.limit(), is.model(), slower(is.model())
		tolerance := big.NewRat(1, 1e9) // float64(1/rate) is not exact
		now := rapid.SampledFrom([]time.Duration{0, 1, 365 * 24 * time.Hour, 8*365*24*time.Hour + 1}).Draw(t, "now")
		take := func(t *rapid.T) {
			took := real.Take(now)
			upper.refill(now)
			lower.refill(now)
			if took {
				if new(big.Rat).Add(upper.tokens, tolerance).Cmp(oneToken) < 0 {
					t.Fatalf("%+v at %v: took a token, there were only %v", is, now, upper.tokens.FloatString(12))
				}
				for _, m := range []*modelBucket{upper, lower} {
					m.tokens.Sub(m.tokens, oneToken)
					m.still = false
				}
			} else if new(big.Rat).Sub(lower.tokens, tolerance).Cmp(oneToken) >= 0 {
				t.Fatalf("%+v at %v: took none of %v", is, now, lower.tokens.FloatString(12))
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"take 1": take, "take 2": take,
			"become": func(t *rapid.T) {
				is = settings.Draw(t, "setting")
				real.Become(is.limit(), now)
				upper, lower = upper.become(is, now), slower(lower.become(is, now))
				// A pacer is rounded to a nanosecond, and permissions in a float64 are not exact.
				rounded := new(big.Rat).Add(upper.rate, tolerance)
				upper.tokens.Add(upper.tokens, rounded)
				lower.tokens.Sub(lower.tokens, rounded)
			},
			"pause": func(t *rapid.T) { now += pauses(is.rate).Draw(t, "pause") },
			"retry": func(t *rapid.T) { now += real.RetryAfter(now) },
		})
	})
}

// queueOp is one step of a run with a queue; pick chooses which call, and n, m and w
// are what the limit is set to.
type queueOp struct {
	kind    string
	pick    int
	d       time.Duration
	n, m, w int
}

// queueOps draws a whole run beforehand: what happens in a synctest bubble is on
// a goroutine that rapid does not know.
func queueOps(t *rapid.T, kinds ...string) []queueOp {
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) queueOp {
		return queueOp{
			kind: rapid.SampledFrom(kinds).Draw(t, "kind"),
			pick: rapid.IntRange(0, 1000).Draw(t, "pick"),
			d:    time.Duration(rapid.IntRange(0, 40).Draw(t, "d")) * 10 * time.Millisecond,
			n:    rapid.IntRange(0, 3).Draw(t, "n"),
			m:    rapid.IntRange(0, 3).Draw(t, "m"),
			w:    rapid.IntRange(0, 3).Draw(t, "w"),
		}
	}), 0, 60).Draw(t, "ops")
}

// waiter is a call in a queue, for the real one and for the model.
type waiter struct {
	id      int
	cancel  func()
	until   time.Duration // when it no longer waits; 0: never
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

func start(ctx context.Context, id int, wait func(context.Context) limiter.Verdict) *waiter {
	ctx, cancel := context.WithCancel(ctx)
	w := &waiter{id: id, cancel: cancel, verdict: make(chan limiter.Verdict, 1)}
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

var maxQueueWaits = []time.Duration{0, 105 * time.Millisecond, 0, 35 * time.Millisecond}

func TestSemaphoreAgainstModel(t *testing.T) {
	checkInBubble(t, func(rt *rapid.T) func(*testing.T) error {
		limit := rapid.IntRange(0, 3).Draw(rt, "limit")
		maxQueue := rapid.IntRange(0, 3).Draw(rt, "max queue")
		maxWait := rapid.SampledFrom(maxQueueWaits).Draw(rt, "max wait")
		ops := queueOps(rt, "call", "call", "call", "try", "release", "release", "cancel", "sleep", "set")
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
	admit := func() {
		for len(queue) > 0 && free() {
			inFlight++
			expect(queue[0], verdict(limiter.Admitted))
			queue = queue[1:]
		}
	}
	for id, op := range ops {
		now := time.Since(epoch)
		switch op.kind {
		case "call":
			w := start(t.Context(), id, func(ctx context.Context) limiter.Verdict {
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
				if queue = append(queue, w); maxWait > 0 {
					w.until = now + maxWait
				}
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
			inFlight--
			admit()
		case "set":
			limit, maxQueue, maxWait = op.n, op.m, maxQueueWaits[op.w]
			s.Set(limit, maxQueue, maxWait)
			admit()
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
			queue = slices.DeleteFunc(queue, func(w *waiter) bool {
				late := w.until > 0 && w.until <= now+op.d
				if late {
					expect(w, verdict(limiter.TimedOut))
				}
				return late
			})
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

var maxWaits = []time.Duration{0, 100 * time.Millisecond, 350 * time.Millisecond, time.Second}

func TestRateQueueAgainstModel(t *testing.T) {
	checkInBubble(t, func(rt *rapid.T) func(*testing.T) error {
		s := setting{
			pacing:  rapid.IntRange(0, 3).Draw(rt, "pacing") == 0,
			rate:    10,
			burst:   rapid.IntRange(1, 3).Draw(rt, "burst"),
			maxWait: rapid.SampledFrom(maxWaits).Draw(rt, "max wait"),
		}
		ops := queueOps(rt, "call", "call", "call", "take", "cancel", "deadline", "deadline", "sleep", "sleep", "become")
		return func(t *testing.T) error {
			return runRate(t, s, ops)
		}
	})
}

// runRate has waiters that wait for one token each. The model steps from token to
// token.
func runRate(t *testing.T, s setting, ops []queueOp) (err error) {
	real, model := s.limit(), s.model()
	epoch := time.Now()
	clock := func() time.Duration { return time.Since(epoch) }
	// The real one has whole 64ths of nanoseconds, or whole ones. What it has is rounded
	// when it becomes another; from then on, what is within the slop of a turn is left open.
	slop := time.Duration(0)
	near := func(a, b, slop time.Duration) bool { return slop > 0 && (a-b).Abs() <= slop }
	var queue []*waiter
	expect := func(w *waiter, want *limiter.Verdict) {
		if e := w.expect(want); err == nil {
			err = e
		}
	}
	for id, op := range ops {
		now := clock()
		switch op.kind {
		case "call", "deadline":
			ctx, patience := t.Context(), s.maxWait
			if op.kind == "deadline" {
				// Between two tokens: a turn at the very deadline may end either way.
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, op.d+5*time.Millisecond)
				defer cancel()
				patience = min(patience, op.d+5*time.Millisecond)
			}
			due := model.wait(now, len(queue)+1)
			if near(due, 0, slop) || near(due, patience, slop) {
				continue
			}
			w := start(ctx, id, func(ctx context.Context) limiter.Verdict {
				if real.Take(now) {
					return limiter.Admitted
				}
				return real.Wait(ctx, clock)
			})
			switch {
			case len(queue) == 0 && model.take(now):
				expect(w, verdict(limiter.Admitted))
			case due > patience || s.maxWait == 0:
				expect(w, verdict(limiter.Refused))
			default:
				w.until = now + patience
				queue = append(queue, w)
			}
		case "take":
			if near(model.wait(now, 1), 0, slop) {
				continue
			}
			want := len(queue) == 0 && model.take(now)
			if got := real.Take(now); got != want && err == nil {
				err = fmt.Errorf("Take() = %v, model %v", got, want)
			}
		case "become":
			next := setting{op.pick%2 == 0, []float64{5, 10, 20, 40}[op.n], op.m + 1, maxWaits[op.w]}
			becomes := model.become(next, now)
			var stay, late []*waiter
			open := false
			for _, w := range queue {
				due := now + becomes.wait(now, len(stay)+1)
				open = open || near(due, w.until, time.Microsecond)
				if due > w.until {
					late = append(late, w)
				} else {
					stay = append(stay, w)
				}
			}
			if open {
				continue
			}
			s, model, queue, slop = next, becomes, stay, time.Microsecond
			real.Become(s.limit(), now)
			for _, w := range late {
				expect(w, verdict(limiter.TimedOut))
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
				at := clock() + model.wait(clock(), 1)
				if at-slop > until {
					break
				}
				if early := at - slop - clock(); slop > 0 && early > 0 {
					time.Sleep(early)
					expect(queue[0], nil)
				}
				time.Sleep(at + 2*slop - clock())
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
		open := near(model.wait(clock(), 1), 0, slop)
		tokens, _ := model.tokens.Float64()
		if s.pacing { // it tells only whether there is one
			tokens = min(1, math.Floor(tokens))
		}
		available, waiting := real.Stats(clock())
		if err == nil && (waiting != len(queue) || !open && math.Abs(available-tokens) > 1e-4) {
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
