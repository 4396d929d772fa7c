package limiter_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"go.uber.org/ratelimit"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/limiter"
)

// drive lets callers make n calls one after the other through f, and returns when
// each call was admitted, from the first on.
func drive(clock func() time.Duration, callers, n int, f func()) []time.Duration {
	times := make(chan time.Duration, callers*n)
	for range callers {
		go func() {
			for range n {
				f()
				times <- clock()
			}
		}()
	}
	var all []time.Duration
	for range callers * n {
		all = append(all, <-times)
	}
	slices.Sort(all)
	return all
}

// spacing is the median of the gaps, and how many are shorter than the interval.
func spacing(times []time.Duration, interval time.Duration) (median time.Duration, early int) {
	var gaps []time.Duration
	for i := range times[1:] {
		gap := times[i+1] - times[i]
		if gap < interval {
			early++
		}
		gaps = append(gaps, gap)
	}
	slices.Sort(gaps)
	return gaps[len(gaps)/2], early
}

func TestPacingIsEven(t *testing.T) {
	for _, rate := range []float64{0.5, 10, 200, 5000, 1e6} {
		t.Run(fmt.Sprint(rate), func(t *testing.T) {
			bubble(t, func(l *line) {
				interval := time.Duration(1e9 / rate)
				p := limiter.NewPacer(rate, 10, time.Hour)
				times := drive(l.clock, 8, 50, func() {
					if !p.Take(l.clock()) && p.Wait(l.Context(), l.clock) != admitted {
						l.Error("refused")
					}
				})
				for i, at := range times {
					if at != time.Duration(i)*interval {
						l.Fatalf("call %d at %v, want %v", i, at, time.Duration(i)*interval)
					}
				}
			})
		})
	}
}

func TestPacingAfterAPause(t *testing.T) {
	for _, slack := range []int{0, 1, 10} {
		for _, pause := range []time.Duration{100 * ms, 150 * ms, 500 * ms, sec, 1100 * ms, 1101 * ms, time.Hour} {
			t.Run(fmt.Sprint(slack, " after ", pause), func(t *testing.T) {
				p := limiter.NewPacer(10, slack, 0)
				if !p.Take(0) || p.Take(0) {
					t.Fatal("the first call is alone")
				}
				// The next is due at 100 ms, or as long before as the slack allows.
				due := max(100*ms, pause-time.Duration(slack)*100*ms)
				got, want := takeAll(p, pause), int((pause-due)/(100*ms))+1
				if got != want {
					t.Fatalf("%d at once, want %d", got, want)
				}
				next := due + time.Duration(want)*100*ms
				if d := p.RetryAfter(pause); d != next-pause {
					t.Fatalf("the next in %v, want %v", d, next-pause)
				}
				for i := range 20 { // then evenly again
					if p.Take(next-ns) || !p.Take(next) || p.Take(next) {
						t.Fatalf("call %d is not at %v", i, next)
					}
					next += 100 * ms
				}
			})
		}
	}
}

func TestPacingRefusalTakesNothing(t *testing.T) {
	bubble(t, func(l *line) {
		p := limiter.NewPacer(10, 0, 250*ms)
		if !p.Take(0) {
			l.Fatal("refused the first")
		}
		ctx, cancel := context.WithTimeout(l.Context(), 50*ms)
		defer cancel()
		for range 1000 { // no time for it
			if p.Take(0) || p.Wait(ctx, l.clock) != refused {
				l.Fatal("admitted")
			}
		}
		leaves, leave := context.WithCancel(l.Context())
		defer leave()
		l.wait(1, func() limiter.Verdict { return p.Wait(leaves, l.clock) })
		l.wait(2, func() limiter.Verdict { return p.Wait(l.Context(), l.clock) })
		l.wait(3, func() limiter.Verdict { return p.Wait(l.Context(), l.clock) }) // 300 ms for the third
		l.ended(ending{3, 0, refused})
		if d := p.RetryAfter(0); d != 300*ms {
			l.Errorf("retry after %v, behind two", d)
		}
		l.sleep(60 * ms)
		leave()
		l.sleep(40 * ms)
		l.ended(ending{1, 60 * ms, ended}, ending{2, 100 * ms, admitted})
		l.sleep(100 * ms)
		if !p.Take(l.clock()) || p.Take(l.clock()) {
			l.Error("the next one is not at 200 ms")
		}
	})
}

// What go.uber.org/ratelimit does alone, and the pacer does not.
func TestPacingAndPlainTake(t *testing.T) {
	t.Run("Take", func(t *testing.T) {
		bubble(t, func(l *line) {
			r := ratelimit.New(10)
			r.Take()
			ctx, cancel := context.WithTimeout(l.Context(), 50*ms)
			defer cancel()
			r.Take() // takes no context
			if ctx.Err() == nil || l.clock() != 100*ms {
				l.Errorf("returned at %v, with %v", l.clock(), ctx.Err())
			}
			r.Take() // the call that had no time left has had its turn all the same
			if l.clock() != 200*ms {
				l.Errorf("the next is at %v", l.clock())
			}
		})
	})
	t.Run("pacer", func(t *testing.T) {
		bubble(t, func(l *line) {
			p := limiter.NewPacer(10, 10, time.Hour)
			p.Take(0)
			ctx, cancel := context.WithTimeout(l.Context(), 50*ms)
			defer cancel()
			if v := p.Wait(ctx, l.clock); v != refused || l.clock() != 0 {
				l.Errorf("%v at %v, want refused at once", v, l.clock())
			}
			if v := p.Wait(l.Context(), l.clock); v != admitted || l.clock() != 100*ms {
				l.Errorf("%v at %v, want the turn that was not taken", v, l.clock())
			}
		})
	})
}

func TestPacingNeverSleepsWithoutMaxWait(t *testing.T) {
	bubble(t, func(l *line) {
		p := limiter.NewPacer(0.001, 0, 0)
		p.Take(0)
		if v := p.Wait(l.Context(), l.clock); v != refused || l.clock() != 0 {
			l.Errorf("%v at %v", v, l.clock())
		}
	})
}

func TestPacingRates(t *testing.T) {
	for _, rate := range []float64{0.001, 3, 7.3, 600_000, 666_900, 999_999, 1e6} {
		p, at, n := limiter.NewPacer(rate, 0, 0), time.Duration(0), 10_000
		for range n {
			if !p.Take(at) {
				t.Fatalf("%v/s: refused at %v", rate, at)
			}
			at += p.RetryAfter(at)
		}
		// Never faster, and slower by less than a nanosecond a call.
		if got := float64(at) / float64(n); got < 1e9/rate || got >= 1e9/rate+1 {
			t.Errorf("%v/s: %v ns apart", rate, got)
		}
	}
}

// No span sees more than its share, the slack and one, whenever calls come.
func TestPacingSpans(t *testing.T) {
	const interval = 100 * ms
	for _, slack := range []int{0, 1, 2, 10} {
		for seed := range uint64(300) {
			random := rand.New(rand.NewPCG(seed, 0))
			p := limiter.NewPacer(10, slack, 0)
			var at []time.Duration
			for now := time.Duration(0); len(at) < 100; {
				for range random.IntN(2 * (slack + 2)) { // the slack is not always used up
					if p.Take(now) {
						at = append(at, now)
					}
				}
				switch full := time.Duration(slack+1) * interval; random.IntN(3) {
				case 0:
					now += time.Duration(random.Int64N(int64(interval)))
				case 1:
					now += full + time.Duration(random.Int64N(int64(2*interval))) - interval
				case 2:
					now += p.RetryAfter(now)
				}
			}
			for i, from := range at {
				for j, to := range at[i:] {
					if most := int((to-from)/interval) + slack + 1; j+1 > most {
						t.Fatalf("slack %d, seed %d: %d calls in %v, want at most %d", slack, seed, j+1, to-from, most)
					}
				}
			}
		}
	}
}

func TestPacingStats(t *testing.T) {
	p := limiter.NewPacer(10, 2, sec)
	is := func(at time.Duration, available float64, idle bool) {
		t.Helper()
		for range 2 { // looking changes nothing
			if a, waiting := p.Stats(at); a != available || waiting != 0 || p.Idle(at) != idle {
				t.Errorf("at %v: %v available, %d waiting, idle %v", at, a, waiting, p.Idle(at))
			}
		}
	}
	is(0, 1, true)
	p.Take(0)
	is(0, 0, false)
	is(100*ms-ns, 0, false)
	is(100*ms, 1, false)
	is(300*ms-ns, 1, false)
	is(300*ms, 1, true)
	if n := takeAll(p, time.Hour); n != 3 {
		t.Errorf("%d at once when idle, want 3", n)
	}
}

func TestPacingAllocatesNothing(t *testing.T) {
	for _, slack := range []int{0, 1, 10} {
		for _, step := range []time.Duration{ms / 2, ms + ms/2, 20 * ms} {
			p, now := limiter.NewPacer(1000, slack, 0), time.Duration(0)
			if n := testing.AllocsPerRun(1000, func() { now += step; p.Take(now) }); n != 0 {
				t.Errorf("slack %d, every %v: %v allocations a call", slack, step, n)
			}
		}
	}
}
