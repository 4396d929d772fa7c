package limiter_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/limiter"
)

func bucket(rate float64, burst int) *limiter.Rate { return limiter.NewBucket(rate, burst, sec) }
func pacer(rate float64, slack int) *limiter.Rate  { return limiter.NewPacer(rate, slack, sec) }

// What there is when a limit changes is kept, in every combination: up to the new
// burst, and the part of a permission too.
func TestBecome(t *testing.T) {
	type row struct {
		at    time.Duration
		taken int           // permissions that are there
		after time.Duration // RetryAfter, once they are taken
	}
	for _, tt := range []struct {
		name  string
		from  *limiter.Rate
		taken int           // at 0
		at    time.Duration // when it changes
		to    *limiter.Rate
		rows  []row
	}{
		{"higher burst", bucket(10, 5), 0, 0, bucket(10, 9), []row{{0, 5, 100 * ms}, {sec, 9, 100 * ms}}},
		{"higher burst with a part", bucket(10, 5), 5, 250 * ms, bucket(10, 9), []row{{250 * ms, 2, 50 * ms}, {sec, 8, 100 * ms}}},
		{"lower burst", bucket(10, 5), 0, 0, bucket(10, 2), []row{{0, 2, 100 * ms}, {sec, 2, 100 * ms}}},
		{"lower burst that fits", bucket(10, 5), 4, 0, bucket(10, 2), []row{{0, 1, 100 * ms}}},
		{"higher rate", bucket(10, 1), 1, 75 * ms, bucket(1000, 1), []row{{75 * ms, 0, 250 * time.Microsecond}, {sec, 1, ms}}},
		{"lower rate", bucket(1000, 1), 1, ms / 4, bucket(10, 1), []row{{ms / 4, 0, 75 * ms}, {sec, 1, 100 * ms}}},
		{"both ends of the range", bucket(1e7, 1000), 999, 0, bucket(0.001, 1000), []row{{0, 1, 1000 * sec}, {2500 * sec, 2, 500 * sec}}},
		{"both ends, the other way", bucket(0.001, 1000), 900, 0, bucket(1e7, 1e7), []row{{0, 100, 100}, {ms, 1e4, 100}}},
		{"full for years", bucket(10, 5), 5, 8 * year, bucket(20, 10), []row{{8 * year, 5, 50 * ms}}},

		{"bucket to pacing", bucket(10, 5), 0, 0, pacer(10, 10), []row{{0, 5, 100 * ms}, {100 * ms, 1, 100 * ms}, {sec, 9, 100 * ms}}},
		{"bucket to pacing with less slack", bucket(10, 9), 0, 0, pacer(20, 2), []row{{0, 3, 50 * ms}, {50 * ms, 1, 50 * ms}}},
		{"bucket to pacing without slack", bucket(10, 9), 0, 0, pacer(10, 0), []row{{0, 1, 100 * ms}, {time.Hour, 1, 100 * ms}}},
		{"empty bucket to pacing", bucket(10, 2), 2, 25 * ms, pacer(100, 3), []row{{25 * ms, 0, 7500 * time.Microsecond}}},
		{"bucket to pacing at both ends", bucket(1e7, 1e7), 1, 0, pacer(0.001, 3), []row{{0, 4, 1000 * sec}, {1000 * sec, 1, 1000 * sec}}},

		{"pacing to bucket", pacer(10, 3), 1, time.Hour, bucket(10, 9), []row{{time.Hour, 4, 100 * ms}, {time.Hour + sec, 9, 100 * ms}}},
		{"pacing to a lower burst", pacer(10, 3), 1, time.Hour, bucket(10, 2), []row{{time.Hour, 2, 100 * ms}}},
		{"pacing to bucket with a part", pacer(10, 3), 1, 25 * ms, bucket(100, 9), []row{{25 * ms, 0, 7500 * time.Microsecond}}},
		{"pacing to bucket, some slack is there", pacer(10, 3), 1, 250 * ms, bucket(100, 9), []row{{250 * ms, 2, 5 * ms}}},
		{"pacing that has not begun to bucket", pacer(10, 3), 0, time.Hour, bucket(10, 9), []row{{time.Hour, 1, 100 * ms}}},

		{"pacing to a higher rate", pacer(10, 0), 1, 50 * ms, pacer(1000, 0), []row{{50 * ms, 0, ms / 2}, {sec, 1, ms}}},
		{"pacing to a lower rate", pacer(1000, 0), 1, ms / 2, pacer(10, 5), []row{{ms / 2, 0, 50 * ms}}},
		{"pacing with slack that is there", pacer(10, 3), 1, time.Hour, pacer(20, 9), []row{{time.Hour, 4, 50 * ms}, {time.Hour + sec, 10, 50 * ms}}},
		{"pacing with less slack", pacer(10, 3), 1, time.Hour, pacer(10, 1), []row{{time.Hour, 2, 100 * ms}}},
		{"pacing that has not begun", pacer(10, 3), 0, time.Hour, pacer(10, 9), []row{{time.Hour, 1, 100 * ms}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := tt.from
			for range tt.taken {
				if !r.Take(0) {
					t.Fatal("there are fewer to begin with")
				}
			}
			r.Become(tt.to, tt.at)
			for _, row := range tt.rows {
				if n := takeAll(r, row.at); n != row.taken {
					t.Fatalf("at %v: %d taken, want %d", row.at, n, row.taken)
				}
				if d := r.RetryAfter(row.at); d != row.after {
					t.Fatalf("at %v: retry after %v, want %v", row.at, d, row.after)
				}
			}
		})
	}
}

// Who becomes what it is already is as before, to the nanosecond: somebody's turn may
// be at the very end of its max wait.
func TestBecomeTheSame(t *testing.T) {
	for name, same := range map[string]func() *limiter.Rate{
		"bucket": func() *limiter.Rate { return bucket(10, 3) },
		"third":  func() *limiter.Rate { return bucket(3, 1000) },
		"fast":   func() *limiter.Rate { return bucket(1e7, 1000) },
		"slow":   func() *limiter.Rate { return bucket(0.1, 2) },
		"pacer":  func() *limiter.Rate { return pacer(10, 3) },
		"strict": func() *limiter.Rate { return pacer(3, 0) },
		"quick":  func() *limiter.Rate { return pacer(1e6, 10) },
	} {
		t.Run(name, func(t *testing.T) {
			random := rand.New(rand.NewPCG(1, 1))
			twin, r := same(), same()
			takeAll(twin, sec)
			takeAll(r, sec)
			pause := int64(3 * r.RetryAfter(sec))
			for now := sec; now < sec+time.Duration(1000*pause); now += time.Duration(random.Int64N(pause)) {
				for range 3 {
					r.Become(same(), now)
				}
				if got, want := r.Take(now), twin.Take(now); got != want {
					t.Fatalf("at %v: Take() = %v, the twin's %v", now, got, want)
				}
				if got, want := r.RetryAfter(now), twin.RetryAfter(now); got != want {
					t.Fatalf("at %v: retry after %v, the twin's %v", now, got, want)
				}
			}
		})
	}
}

// The caller's time was taken before others were admitted: what they took is not
// there again, and they cost no more than what they took.
func TestBecomeWithAnEarlierTime(t *testing.T) {
	for _, tt := range []struct {
		name     string
		from, to *limiter.Rate
		after    time.Duration // the last call
	}{
		{"bucket", bucket(1000, 1000), bucket(1000, 1000), ms},
		{"bucket to a lower rate", bucket(1000, 1000), bucket(0.1, 10), 10 * sec},
		{"bucket to pacing", bucket(1000, 1000), pacer(10, 10), 100 * ms},
		{"pacing", pacer(10, 10), pacer(10, 10), 100 * ms},
		{"pacing to bucket", pacer(10, 10), bucket(1, 10), sec},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, last := tt.from, 10*sec
			takeAll(r, 0)
			takeAll(r, last)
			r.Become(tt.to, sec)
			if n := takeAll(r, last); n != 0 {
				t.Fatalf("%d are there twice", n)
			}
			if d := r.RetryAfter(last); d != tt.after {
				t.Fatalf("retry after %v, want %v", d, tt.after)
			}
		})
	}
}

// A call that still holds the limit that was replaced gets nothing from it, ever.
func TestClosedGivesNothing(t *testing.T) {
	for name, r := range map[string]*limiter.Rate{
		"bucket": bucket(10, 5), "large bucket": bucket(0.001, 2592), "fast": bucket(1e7, 1e7), "pacer": pacer(10, 5), "new pacer": pacer(10, 5),
	} {
		if name == "pacer" {
			r.Take(0)
		}
		r.Close(sec)
		for _, at := range []time.Duration{0, sec, time.Hour, year, 4 * year, 5 * year, 9 * year} {
			if r.Take(at) {
				t.Errorf("%s: took at %v", name, at)
			}
		}
	}
}

// become changes the limit now.
func (l *line) become(r, next *limiter.Rate) {
	r.Become(next, l.clock())
}

func (l *line) waitFor(call int, r *limiter.Rate) {
	l.wait(call, func() limiter.Verdict { return r.Wait(l.Context(), l.clock) })
}

// A limit that is raised finds who waits for the old one, whatever the timer says.
func TestCase22_RateRaised(t *testing.T) {
	const μs = time.Microsecond
	for _, tt := range []struct {
		name     string
		from, to *limiter.Rate
		want     []ending // after 250 s
	}{
		{"bucket", limiter.NewBucket(0.001, 1, time.Hour), limiter.NewBucket(1000, 5, 0), []ending{{0, 750 * μs, admitted}, {1, 1750 * μs, admitted}, {2, 2750 * μs, admitted}}},
		{"bucket to pacing", limiter.NewBucket(0.001, 1, time.Hour), limiter.NewPacer(1000, 5, 0), []ending{{0, 750 * μs, admitted}, {1, 1750 * μs, admitted}, {2, 2750 * μs, admitted}}},
		{"pacing to bucket", limiter.NewPacer(0.001, 5, time.Hour), limiter.NewBucket(1000, 5, 0), []ending{{0, 750 * μs, admitted}, {1, 1750 * μs, admitted}, {2, 2750 * μs, admitted}}},
		{"pacing", limiter.NewPacer(0.001, 5, time.Hour), limiter.NewPacer(1000, 5, 0), []ending{{0, 750 * μs, admitted}, {1, 1750 * μs, admitted}, {2, 2750 * μs, admitted}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(l *line) {
				r := tt.from
				takeAll(r, 0)
				for i := range 3 {
					l.waitFor(i, r)
				}
				l.sleep(250 * sec)
				l.ended()
				l.become(r, tt.to)
				l.ended()
				if r.Take(l.clock()) {
					l.Error("a newcomer overtook")
				}
				l.sleep(sec)
				for i := range tt.want {
					tt.want[i].at += 250 * sec
				}
				l.ended(tt.want...)
			})
		})
	}
}

// Who would now wait longer than it may is refused at once, and nobody else is.
func TestCase22_RateLowered(t *testing.T) {
	for name, slower := range map[string]*limiter.Rate{"bucket": limiter.NewBucket(5, 1, time.Hour), "pacing": limiter.NewPacer(5, 3, time.Hour)} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(l *line) {
				b := limiter.NewBucket(10, 1, 500*ms)
				takeAll(b, 0)
				for i := range 4 {
					l.waitFor(i, b)
				}
				l.sleep(50 * ms)
				l.become(b, slower) // turns at 150, 350, 550 and 750 ms
				l.ended(ending{2, 50 * ms, timedOut}, ending{3, 50 * ms, timedOut})
				if d := b.RetryAfter(l.clock()); d != 500*ms {
					l.Errorf("retry after %v, behind two", d)
				}
				l.waitFor(4, b) // by the new max wait
				l.sleep(sec)
				l.ended(ending{0, 150 * ms, admitted}, ending{1, 350 * ms, admitted}, ending{4, 550 * ms, admitted})
			})
		})
	}
}

// Each has its own end of patience: who goes makes room for who is behind.
func TestCase22_RateLoweredAndSomeHaveTime(t *testing.T) {
	for _, tt := range []struct {
		name      string
		impatient []int
		want      []ending
	}{
		{"the head has none", []int{0}, []ending{{0, 50 * ms, timedOut}, {1, 550 * ms, admitted}, {2, 1550 * ms, admitted}, {3, 2550 * ms, admitted}}},
		{"two at the head have none", []int{0, 1}, []ending{{0, 50 * ms, timedOut}, {1, 50 * ms, timedOut}, {2, 550 * ms, admitted}, {3, 1550 * ms, admitted}}},
		{"one in the middle has none", []int{1}, []ending{{1, 50 * ms, timedOut}, {0, 550 * ms, admitted}, {2, 1550 * ms, admitted}, {3, 2550 * ms, admitted}}},
		{"every other one has none", []int{0, 2}, []ending{{0, 50 * ms, timedOut}, {2, 50 * ms, timedOut}, {1, 550 * ms, admitted}, {3, 1550 * ms, admitted}}},
		{"all have none", []int{0, 1, 2, 3}, []ending{{0, 50 * ms, timedOut}, {1, 50 * ms, timedOut}, {2, 50 * ms, timedOut}, {3, 50 * ms, timedOut}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(l *line) {
				b := limiter.NewBucket(10, 1, 2600*ms) // enough for three, not for four
				takeAll(b, 0)
				ctx, cancel := context.WithTimeout(l.Context(), 505*ms)
				defer cancel()
				for i := range 4 {
					l.wait(i, func() limiter.Verdict {
						if slices.Contains(tt.impatient, i) {
							return b.Wait(ctx, l.clock)
						}
						return b.Wait(l.Context(), l.clock)
					})
				}
				l.sleep(50 * ms)
				l.become(b, limiter.NewBucket(1, 1, 0)) // half a token is there
				l.sleep(10 * sec)
				l.ended(tt.want...)
				l.bucketIs(b, 1, 0)
			})
		})
	}
}

// A turn at the very end of what a call may wait is not too late, before and after.
func TestCase22_BecomeTheSameRefusesNobody(t *testing.T) {
	for name, same := range map[string]func() *limiter.Rate{
		"bucket": func() *limiter.Rate { return limiter.NewBucket(10, 1, 300*ms) },
		"pacer":  func() *limiter.Rate { return limiter.NewPacer(10, 5, 300*ms) },
	} {
		t.Run(name, func(t *testing.T) {
			for at := ms; at < 100*ms; at += ms + 1 {
				bubble(t, func(l *line) {
					r := same()
					takeAll(r, 0)
					for i := range 3 {
						l.waitFor(i, r)
					}
					l.sleep(at)
					for range 10 {
						l.become(r, same())
					}
					l.sleep(sec)
					l.ended(ending{0, 100 * ms, admitted}, ending{1, 200 * ms, admitted}, ending{2, 300 * ms, admitted})
				})
			}
		})
	}
}

// The max wait of those who wait is theirs; that of newcomers is the new one.
func TestCase22_MaxWaitChanges(t *testing.T) {
	for _, tt := range []struct {
		maxWait time.Duration
		want    []ending
	}{
		{0, []ending{{2, 50 * ms, refused}, {0, 100 * ms, admitted}, {1, 200 * ms, admitted}}},
		{100 * ms, []ending{{2, 50 * ms, refused}, {0, 100 * ms, admitted}, {1, 200 * ms, admitted}}},
		{sec, []ending{{0, 100 * ms, admitted}, {1, 200 * ms, admitted}, {2, 300 * ms, admitted}}},
	} {
		bubble(t, func(l *line) {
			b := limiter.NewBucket(10, 1, 205*ms)
			takeAll(b, 0)
			l.waitFor(0, b)
			l.waitFor(1, b)
			l.sleep(50 * ms)
			l.become(b, limiter.NewBucket(10, 1, tt.maxWait))
			l.waitFor(2, b)
			l.sleep(sec)
			l.ended(tt.want...)
		})
	}
}

// A head that learns late that the limit is higher takes its token as of then, not as
// of when the old limit would have had one.
func TestCase22_RousedHeadTakesAsOfNow(t *testing.T) {
	bubble(t, func(l *line) {
		b := limiter.NewBucket(0.001, 1, time.Hour)
		takeAll(b, 0)
		clock := func() time.Duration {
			if l.clock() == sec { // the head is slow to look, and finds a token
				time.Sleep(ms)
			}
			return l.clock()
		}
		l.wait(0, func() limiter.Verdict { return b.Wait(l.Context(), clock) })
		l.sleep(sec)
		l.become(b, limiter.NewBucket(1000, 1, 0))
		l.sleep(2 * ms)
		l.ended(ending{0, sec + ms, admitted})
		if !b.Take(l.clock()) {
			l.Errorf("the next is in %v", b.RetryAfter(l.clock()))
		}
	})
}

// Again and again, and in between the queue goes on.
func TestCase22_RateChangesAllTheTime(t *testing.T) {
	bubble(t, func(l *line) {
		r := limiter.NewBucket(10, 1, time.Hour)
		takeAll(r, 0)
		for i := range 20 {
			l.waitFor(i, r)
		}
		for i := range 200 { // 10 ms each, of a twentieth and a fifth of a token
			if i%2 == 0 {
				l.become(r, limiter.NewPacer(5, 3, 0))
			} else {
				l.become(r, limiter.NewBucket(20, 7, 0))
			}
			l.sleep(10 * ms)
		}
		l.sleep(sec)
		last := -1
		for len(l.ends) > 0 {
			e := <-l.ends
			if e.verdict != admitted || e.call != last+1 {
				l.Fatalf("%v after call %d", e, last)
			}
			last = e.call
		}
		l.bucketIs(r, 7, 0)
		if last != 19 {
			l.Fatalf("the last one was %d", last)
		}
	})
}

// With plenty there, nobody is refused while the limit is replaced, and what was taken
// is gone for good: not one more, not one less.
func TestBecomeAtOnce(t *testing.T) {
	const burst, each, takers = 100_000, 30_000, 3
	kinds := []func() *limiter.Rate{
		func() *limiter.Rate { return limiter.NewBucket(1e6, burst, 0) },
		func() *limiter.Rate { return limiter.NewPacer(1e6, burst-1, 0) },
		func() *limiter.Rate { return limiter.NewBucket(1000, burst, 0) },
	}
	for name, order := range map[string][]int{"bucket": {0}, "pacer": {1}, "both": {0, 1, 2}} {
		t.Run(name, func(t *testing.T) {
			const now = time.Hour
			r := kinds[0]()
			var left atomic.Int32
			left.Store(takers)
			changes := 0
			together(takers+1, func(g int) {
				if g == takers {
					for ; left.Load() > 0; changes++ {
						r.Become(kinds[order[changes%len(order)]](), now)
					}
					return
				}
				defer left.Add(-1)
				for i := range each {
					if !r.Take(now) {
						t.Errorf("refused take %d, with plenty there", i)
						return
					}
				}
			})
			r.Become(kinds[0](), now)
			if a, _ := r.Stats(now); a != burst-takers*each {
				t.Errorf("%v are left after %d changes, want %d", a, changes, burst-takers*each)
			}
		})
	}
}

// No span sees more than its share while the limit is replaced all the time, though
// the clocks of all are a little apart.
func TestNeverMoreThanTheRateWhileItChanges(t *testing.T) {
	const rate, burst = 1e6, 50
	kinds := []func() *limiter.Rate{
		func() *limiter.Rate { return limiter.NewBucket(rate, burst, 0) },
		func() *limiter.Rate { return limiter.NewPacer(rate, burst-1, 0) },
	}
	r := kinds[0]()
	var clock atomic.Int64
	var done atomic.Bool
	var mu sync.Mutex
	admitted := map[time.Duration]int{}
	together(4, func(g int) {
		if g == 3 {
			for i := 0; !done.Load(); i++ {
				r.Become(kinds[i%2](), time.Duration(clock.Load()))
			}
			return
		}
		defer done.Store(true)
		for i := range 20_000 {
			now := time.Duration(clock.Add(int64((i*7919 + g) % 900)))
			if r.Take(now) {
				mu.Lock()
				admitted[now/1000]++
				mu.Unlock()
			}
		}
	})
	end := int(clock.Load()/1000) + 1
	total := make([]int, end+1) // admitted in the first n microseconds
	for i := range end {
		total[i+1] = total[i] + admitted[time.Duration(i)]
	}
	for _, span := range []int{1, 2, 10, 100, 10_000, end} {
		for i := span; i <= end; i++ {
			if n := total[i] - total[i-span]; n > span+burst+1 {
				t.Fatalf("%d in %dµs", n, span)
			}
		}
	}
}

// Everything at once, at random: nobody is forgotten, nothing stays behind, and no
// span sees more than the highest rate and burst allow. A waiter that nobody wakes
// would be a deadlock of the bubble.
func TestCase22_BecomeUnderLoad(t *testing.T) {
	const rate, burst, callers = 1000, 5, 12
	for seed := range uint64(10) {
		bubble(t, func(l *line) {
			r := limiter.NewBucket(rate, burst, sec)
			var mu sync.Mutex
			var times []time.Duration
			ends := map[limiter.Verdict]int{}
			var left atomic.Int32
			left.Store(callers)
			together(callers+1, func(g int) {
				random := rand.New(rand.NewPCG(seed, uint64(g)))
				if g == callers {
					for left.Load() > 0 {
						per, n, wait := []float64{10, 100, 300, rate}[random.IntN(4)], 1+random.IntN(burst), time.Duration(random.IntN(30))*ms
						if random.IntN(2) == 0 {
							r.Become(limiter.NewBucket(per, n, wait), l.clock())
						} else {
							r.Become(limiter.NewPacer(per, n-1, wait), l.clock())
						}
						time.Sleep(time.Duration(random.IntN(5)) * ms / 2)
					}
					return
				}
				defer left.Add(-1)
				for range 100 {
					ctx, cancel := l.Context(), context.CancelFunc(func() {})
					switch random.IntN(3) {
					case 0:
						ctx, cancel = context.WithTimeout(ctx, time.Duration(random.IntN(20))*ms)
					case 1:
						ctx, cancel = context.WithCancel(ctx)
						time.AfterFunc(time.Duration(random.IntN(20))*ms, cancel)
					}
					verdict := admitted
					if !r.Take(l.clock()) {
						verdict = r.Wait(ctx, l.clock)
					}
					now := l.clock()
					cancel()
					mu.Lock()
					if ends[verdict]++; verdict == admitted {
						times = append(times, now)
					}
					mu.Unlock()
					time.Sleep(time.Duration(random.IntN(8)) * ms / 2)
				}
			})
			if _, waiting := r.Stats(l.clock()); waiting != 0 {
				l.Errorf("%d wait, and nobody is there", waiting)
			}
			for _, v := range []limiter.Verdict{refused, admitted, timedOut, ended} {
				if ends[v] == 0 {
					l.Errorf("no verdict %d in %v", v, ends)
				}
			}
			slices.Sort(times)
			for i, from := range times {
				for j, to := range times[i:] {
					if most := rate*(to-from).Seconds() + burst + 1; float64(j+1) > most+1e-6 {
						l.Fatalf("seed %d: %d calls in %v, want at most %v", seed, j+1, to-from, most)
					}
				}
			}
			r.Become(limiter.NewBucket(rate, burst, 0), l.clock())
			l.sleep(sec)
			if n := takeAll(r, l.clock()); n != burst {
				l.Errorf("%d at the end, want %d", n, burst)
			}
		})
	}
}

// The same in real time, where a precise rest cannot be roused in its last millisecond.
func TestCase22_BecomeUnderLoadInRealTime(t *testing.T) {
	const callers = 8
	start := time.Now()
	clock := func() time.Duration { return time.Since(start) }
	r := limiter.NewPacer(5000, 3, sec)
	var left atomic.Int32
	left.Store(callers)
	together(callers+1, func(g int) {
		random := rand.New(rand.NewPCG(7, uint64(g)))
		if g == callers {
			for left.Load() > 0 {
				rate, burst, wait := []float64{1000, 5000, 20_000}[random.IntN(3)], 1+random.IntN(5), time.Duration(random.IntN(8))*ms
				next := limiter.NewPacer(rate, burst-1, wait)
				if random.IntN(2) == 0 {
					next = limiter.NewBucket(rate, burst, wait)
				}
				r.Become(next, clock())
				runtime.Gosched()
			}
			return
		}
		defer left.Add(-1)
		for range 1000 {
			if r.Take(clock()) {
				continue
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			if random.IntN(3) == 0 {
				time.AfterFunc(time.Duration(random.IntN(1000))*time.Microsecond, cancel)
			}
			r.Wait(ctx, clock)
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				t.Error("nobody woke it")
			}
			cancel()
		}
	})
	if _, waiting := r.Stats(clock()); waiting != 0 {
		t.Errorf("%d wait, and nobody is there", waiting)
	}
}

// A limit that nobody has any more becomes one that is not felt: who waits goes at
// once, and so does who has just been told that there is nothing.
func TestCase22_LimitThatIsGone(t *testing.T) {
	bubble(t, func(l *line) {
		b := limiter.NewBucket(0.001, 1, time.Hour)
		takeAll(b, 0)
		for i := range 3 {
			l.waitFor(i, b)
		}
		l.become(b, limiter.NewBucket(1e7, 1e7, sec))
		l.waitFor(3, b)
		l.sleep(500)
		l.ended(ending{0, 100, admitted}, ending{1, 200, admitted}, ending{2, 300, admitted}, ending{3, 400, admitted})
	})
}

// A call that may not wait, or not for so long, costs nothing.
func TestRefusalAllocatesNothing(t *testing.T) {
	b := limiter.NewBucket(0.001, 1, sec)
	b.Take(0)
	clock := func() time.Duration { return 0 }
	if n := testing.AllocsPerRun(1000, func() {
		if v := b.Wait(t.Context(), clock); v != refused {
			t.Fatal(v)
		}
	}); n != 0 {
		t.Errorf("a turn that comes too late: %v allocations", n)
	}
	bubble(t, func(l *line) {
		s := limiter.NewSemaphore(1, 1, 0)
		s.TryAcquire()
		l.wait(0, func() limiter.Verdict { return s.Acquire(l.Context()) })
		if n := testing.AllocsPerRun(1000, func() {
			if v := s.Acquire(l.Context()); v != refused {
				t.Fatal(v)
			}
		}); n != 0 {
			t.Errorf("a queue that is full: %v allocations", n)
		}
		s.Release()
	})
}
