package limiter_test

import (
	"context"
	"math/rand/v2"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/limiter"
)

func (l *line) semaphoreIs(s *limiter.Semaphore, inFlight, queued int) {
	l.Helper()
	synctest.Wait()
	if n, q := s.Stats(); n != inFlight || q != queued {
		l.Fatalf("at %v: %d in flight, %d queued, want %d, %d", l.clock(), n, q, inFlight, queued)
	}
}

func TestTryAcquire(t *testing.T) {
	for _, tt := range []struct {
		name         string
		limit, queue int
		tries, want  int
	}{
		{"limit", 3, 0, 5, 3},
		{"limit with a queue", 3, 2, 5, 3},
		{"limit 1", 1, 0, 5, 1},
		{"unlimited", 0, 0, 1000, 1000},
		{"unlimited with a queue", 0, 2, 1000, 1000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := limiter.NewSemaphore(tt.limit, tt.queue, 0)
			for range 2 { // what is given back can be had again
				got := 0
				for range tt.tries {
					if s.TryAcquire() {
						got++
					}
				}
				if n, _ := s.Stats(); got != tt.want || n != tt.want {
					t.Fatalf("%d of %d admitted, %d in flight, want %d", got, tt.tries, n, tt.want)
				}
				for range got {
					s.Release()
				}
				if n, _ := s.Stats(); n != 0 {
					t.Fatalf("%d in flight after all are released", n)
				}
			}
		})
	}
}

func TestAcquireRefused(t *testing.T) {
	bubble(t, func(l *line) {
		s := limiter.NewSemaphore(1, 0, 0)
		s.TryAcquire()
		l.wait(0, func() limiter.Verdict { return s.Acquire(l.Context()) })
		l.ended(ending{0, 0, refused}) // no queue

		s = limiter.NewSemaphore(1, 2, sec)
		s.TryAcquire()
		for i := range 3 {
			l.wait(i, func() limiter.Verdict { return s.Acquire(l.Context()) })
			l.sleep(ms)
		}
		l.ended(ending{2, 2 * ms, refused}) // queue full
		l.semaphoreIs(s, 1, 2)
		l.sleep(sec)
		l.ended(ending{0, sec, timedOut}, ending{1, sec + ms, timedOut})
		l.semaphoreIs(s, 1, 0)
	})
}

func TestAcquireInOrder(t *testing.T) {
	bubble(t, func(l *line) {
		s := limiter.NewSemaphore(2, 3, 0)
		s.TryAcquire()
		s.TryAcquire()
		for i := range 3 {
			l.wait(i, func() limiter.Verdict { return s.Acquire(l.Context()) })
		}
		l.semaphoreIs(s, 2, 3)
		l.sleep(time.Hour) // maxWait 0: as long as the context lasts
		s.Release()
		if s.TryAcquire() {
			l.Error("a newcomer overtook")
		}
		l.semaphoreIs(s, 2, 2)
		l.ended(ending{0, time.Hour, admitted})
		s.Release()
		l.ended(ending{1, time.Hour, admitted})
		s.Release()
		l.ended(ending{2, time.Hour, admitted})
		s.Release()
		s.Release()
		l.semaphoreIs(s, 0, 0)
	})
}

func TestAcquireFindsAPlace(t *testing.T) { // which came free since TryAcquire
	bubble(t, func(l *line) {
		s := limiter.NewSemaphore(1, 1, sec)
		l.wait(0, func() limiter.Verdict { return s.Acquire(l.Context()) })
		l.ended(ending{0, 0, admitted})
		l.semaphoreIs(s, 1, 0)
	})
}

func TestCase19_QueuedCallCancelled(t *testing.T) {
	for cancelled := range 3 {
		bubble(t, func(l *line) {
			s := limiter.NewSemaphore(1, 3, sec)
			s.TryAcquire()
			ctx, cancel := context.WithCancel(l.Context())
			for i := range 3 {
				c := l.Context()
				if i == cancelled {
					c = ctx
				}
				l.wait(i, func() limiter.Verdict { return s.Acquire(c) })
			}
			l.sleep(ms)
			cancel()
			l.ended(ending{cancelled, ms, ended})
			l.semaphoreIs(s, 1, 2)
			for i := range 3 {
				if i != cancelled {
					s.Release()
					l.ended(ending{i, ms, admitted})
				}
			}
			s.Release()
			l.semaphoreIs(s, 0, 0)
		})
	}
}

// The head is cancelled, or times out, at the very time of the hand-over: either
// it is admitted, or the place goes to the next.
func TestCase19_CancelledAtTheHandOver(t *testing.T) {
	for want, at := range map[limiter.Verdict]time.Duration{ended: sec / 2, timedOut: sec} {
		t.Run(at.String(), func(t *testing.T) {
			for range 200 {
				bubble(t, func(l *line) {
					s := limiter.NewSemaphore(1, 2, sec)
					s.TryAcquire()
					ctx, cancel := context.WithCancel(l.Context())
					defer cancel()
					l.wait(0, func() limiter.Verdict { return s.Acquire(ctx) })
					time.Sleep(ns)
					l.wait(1, func() limiter.Verdict { return s.Acquire(l.Context()) })
					time.Sleep(at - ns)
					if want == ended {
						cancel()
					} // else it times out now; in both cases it may still be in the queue
					s.Release()
					synctest.Wait()
					if len(l.ends) == 1 { // 0 was admitted
						l.ended(ending{0, at, admitted})
						l.semaphoreIs(s, 1, 1)
						s.Release()
						l.ended(ending{1, at, admitted})
					} else {
						l.ended(ending{0, at, want}, ending{1, at, admitted})
					}
					l.semaphoreIs(s, 1, 0)
				})
			}
		})
	}
}

func TestQueueOfThousand(t *testing.T) {
	bubble(t, func(l *line) {
		s := limiter.NewSemaphore(10, 1000, 0)
		var running atomic.Int32
		for i := range 1010 {
			if i < 10 {
				s.TryAcquire()
			}
			go func() {
				if i >= 10 {
					if v := s.Acquire(l.Context()); v != admitted {
						l.Errorf("%d: %v", i, v)
						return
					}
				}
				if n := running.Add(1); n > 10 {
					l.Errorf("%d at once", n)
				}
				time.Sleep(ms)
				l.ends <- ending{i, l.clock(), admitted}
				running.Add(-1)
				s.Release()
			}()
			synctest.Wait()
		}
		for i := range 101 {
			tenth := map[int]bool{}
			for range 10 {
				e := <-l.ends
				if e.at != time.Duration(i+1)*ms {
					l.Fatalf("%v in turn %d", e, i)
				}
				tenth[e.call/10] = true
			}
			if len(tenth) != 1 || !tenth[i] {
				l.Fatalf("turn %d: calls of %v", i, tenth)
			}
		}
		l.semaphoreIs(s, 0, 0)
	})
}

// Never over the limit, nothing lost, nobody forgotten.
func TestSemaphoreAtOnce(t *testing.T) {
	for _, queue := range []int{0, 3} {
		s := limiter.NewSemaphore(2, queue, 0)
		var running, done atomic.Int32
		together(8, func(g int) {
			ctx, cancel := context.WithCancel(context.Background())
			for i := range 10_000 {
				if i%16 == g {
					go cancel()
				}
				if !s.TryAcquire() && s.Acquire(ctx) != admitted {
					if ctx.Err() != nil {
						ctx, cancel = context.WithCancel(context.Background())
					}
					continue
				}
				if n := running.Add(1); n > 2 {
					t.Errorf("%d at once", n)
				}
				done.Add(1)
				running.Add(-1)
				s.Release()
			}
			cancel()
		})
		if n, q := s.Stats(); n != 0 || q != 0 {
			t.Errorf("%d in flight, %d queued at the end", n, q)
		}
		if done.Load() == 0 {
			t.Error("nothing ran")
		}
	}
}

// A place that is free is never refused because of others who try in vain, and
// no place is there twice.
func TestTryAcquireAtOnce(t *testing.T) {
	const limit = 1_000_000
	s := limiter.NewSemaphore(limit, 0, 0)
	var got atomic.Int32
	together(4, func(int) {
		for range limit / 2 {
			if s.TryAcquire() {
				got.Add(1)
			}
		}
	})
	if got.Load() != limit {
		t.Fatalf("%d admitted", got.Load())
	}
}

// A place that is given back is that of who waits, from then on.
func TestReleasedPlaceIsNotANewcomers(t *testing.T) {
	s := limiter.NewSemaphore(1, 1, 0)
	s.TryAcquire()
	ended := make(chan limiter.Verdict)
	go func() { ended <- s.Acquire(context.Background()) }()
	for _, queued := s.Stats(); queued == 0; _, queued = s.Stats() {
		runtime.Gosched()
	}
	letGo := s.Hold() // before the place is handed over
	released := make(chan struct{})
	go func() { defer close(released); s.Release() }()
	for s.InFlight() > 0 {
		runtime.Gosched()
	}
	overtook := s.TryAcquire()
	letGo()
	<-released
	if overtook {
		t.Error("a newcomer overtook")
		s.Release()
	}
	if v := <-ended; v != admitted {
		t.Errorf("verdict %d", v)
	}
}

func (l *line) acquire(call int, s *limiter.Semaphore) {
	l.wait(call, func() limiter.Verdict { return s.Acquire(l.Context()) })
}

// A limit that is lowered ends no call and admits nobody until enough have ended, and
// then those who wait, in order.
func TestCase22_LimitLowered(t *testing.T) {
	bubble(t, func(l *line) {
		s := limiter.NewSemaphore(5, 3, 0)
		for range 5 {
			s.TryAcquire()
		}
		for i := range 3 {
			l.acquire(i, s)
		}
		s.Set(2, 3, 0)
		for inFlight := 4; inFlight >= 2; inFlight-- {
			s.Release()
			l.semaphoreIs(s, inFlight, 3)
			if s.TryAcquire() {
				l.Fatalf("a newcomer was admitted to %d", inFlight)
			}
		}
		l.ended()
		for i := range 3 {
			s.Release()
			l.ended(ending{i, 0, admitted})
			l.semaphoreIs(s, 2, 2-i)
		}
		s.Release()
		if !s.TryAcquire() || s.TryAcquire() {
			l.Error("the limit is not 2")
		}
		s.Set(1, 0, 0)
		for _, want := range []bool{false, true} { // down to 1, then to none
			s.Release()
			if got := s.TryAcquire(); got != want {
				l.Errorf("TryAcquire() = %v", got)
			}
		}
		s.Release()
		l.semaphoreIs(s, 0, 0)
	})
}

// A limit that is raised admits at once as many of those who wait as there is room
// for, in order.
func TestCase22_LimitRaised(t *testing.T) {
	for _, tt := range []struct {
		limit    int
		queue    int
		admitted int
	}{
		{1, 5, 0}, {2, 5, 1}, {4, 5, 3}, {4, 0, 3}, {6, 5, 5}, {9, 5, 5}, {0, 5, 5}, {0, 0, 5},
	} {
		bubble(t, func(l *line) {
			s := limiter.NewSemaphore(1, 5, 0)
			s.TryAcquire()
			for i := range 5 {
				l.acquire(i, s)
			}
			l.sleep(sec)
			s.Set(tt.limit, tt.queue, 0)
			want := []ending{}
			for i := range tt.admitted {
				want = append(want, ending{i, sec, admitted})
			}
			l.ended(want...)
			l.semaphoreIs(s, 1+tt.admitted, 5-tt.admitted)
			room := tt.limit == 0 || tt.limit > 6
			if s.TryAcquire() != room {
				l.Errorf("limit %d: TryAcquire() = %v", tt.limit, !room)
			} else if room {
				s.Release()
			}
			for i := tt.admitted; i < 5; i++ {
				s.Release()
				l.ended(ending{i, sec, admitted})
			}
			for n, _ := s.Stats(); n > 0; n-- {
				s.Release()
			}
			l.semaphoreIs(s, 0, 0)
		})
	}
}

// Who waits goes on waiting, in order and as long as it would have, though newcomers
// may no longer, or only for less.
func TestCase22_QueueLowered(t *testing.T) {
	bubble(t, func(l *line) {
		s := limiter.NewSemaphore(1, 3, sec)
		s.TryAcquire()
		for i := range 3 {
			l.acquire(i, s)
			l.sleep(ms)
		}
		s.Set(1, 0, 5*ms)
		l.acquire(3, s)
		l.ended(ending{3, 3 * ms, refused})
		s.Set(1, 2, 5*ms) // three wait
		l.acquire(4, s)
		l.ended(ending{4, 3 * ms, refused})
		s.Set(1, 4, 5*ms)
		l.acquire(5, s)
		l.sleep(7 * ms)
		l.ended(ending{5, 8 * ms, timedOut})
		s.Set(1, 0, 0)
		s.Release()
		l.ended(ending{0, 10 * ms, admitted})
		l.semaphoreIs(s, 1, 2)
		l.sleep(sec)
		l.ended(ending{1, sec + ms, timedOut}, ending{2, sec + 2*ms, timedOut})
		s.Release()
		l.semaphoreIs(s, 0, 0)
		if !s.TryAcquire() || s.TryAcquire() {
			l.Error("the limit is not 1")
		}
		s.Release()
	})
}

// Calls are counted while there is no limit.
func TestCase22_UnlimitedAndBack(t *testing.T) {
	bubble(t, func(l *line) {
		s := limiter.NewSemaphore(0, 0, 0)
		for range 10 {
			if !s.TryAcquire() {
				l.Fatal("refused without a limit")
			}
		}
		s.Set(3, 1, 0)
		l.acquire(0, s)
		for range 7 {
			l.semaphoreIs(s, 10, 1)
			s.Release()
			s.Set(3, 1, 0) // which makes no place
			if n, _ := s.Stats(); n >= 3 {
				l.ended()
			}
			if s.TryAcquire() {
				l.Fatal("admitted beyond the limit")
			}
			s.Set(0, 1, 0)
			l.ended(ending{0, 0, admitted})
			s.Set(3, 1, 0)
			l.acquire(0, s)
		}
		s.Set(11, 1, 0)
		l.ended(ending{0, 0, admitted})
		for range 11 {
			s.Release()
		}
		l.semaphoreIs(s, 0, 0)
	})
}

// A call that TryAcquire has told no finds the place that Set has made meanwhile, also
// if Set has taken the queue away.
func TestCase22_RaisedBeforeAcquire(t *testing.T) {
	for _, queue := range []int{0, 1} {
		bubble(t, func(l *line) {
			s := limiter.NewSemaphore(1, 1, 0)
			s.TryAcquire()
			if s.TryAcquire() {
				l.Fatal("two at once")
			}
			s.Set(2, queue, 0)
			l.acquire(0, s)
			l.ended(ending{0, 0, admitted})
			l.semaphoreIs(s, 2, 0)
		})
	}
}

// The limit and the queue change as one: a call that would wait before, and be
// admitted after, is never refused in between.
func TestCase22_NeverRefusedInBetween(t *testing.T) {
	const callers = 4
	s := limiter.NewSemaphore(1, callers, 0)
	var left atomic.Int32
	left.Store(callers)
	together(callers+1, func(g int) {
		if g == callers {
			for left.Load() > 0 {
				s.Set(0, 0, 0)
				runtime.Gosched()
				s.Set(1, callers, 0)
				runtime.Gosched()
			}
			s.Set(0, 0, 0)
			return
		}
		defer left.Add(-1)
		for range 20_000 {
			if !s.TryAcquire() {
				if v := s.Acquire(context.Background()); v != admitted {
					t.Errorf("verdict %d", v)
					return
				}
			}
			runtime.Gosched()
			s.Release()
		}
	})
	if n, q := s.Stats(); n != 0 || q != 0 {
		t.Errorf("%d in flight, %d queued at the end", n, q)
	}
}

// Everything at once, at random: never more in flight than the highest limit, nobody
// forgotten, nothing left. A waiter that nobody wakes would be a deadlock of the
// bubble.
func TestCase22_SetUnderLoad(t *testing.T) {
	const most, callers = 4, 10
	var ends [4]atomic.Int32 // by verdict
	for seed := range uint64(20) {
		bubble(t, func(l *line) {
			s := limiter.NewSemaphore(2, 3, 0)
			var running, left atomic.Int32
			left.Store(callers)
			together(callers+1, func(g int) {
				random := rand.New(rand.NewPCG(seed, uint64(g)))
				pause := func() {
					if n := random.IntN(8); n == 0 {
						runtime.Gosched()
					} else {
						time.Sleep(time.Duration(n) * ms)
					}
				}
				if g == callers {
					for left.Load() > 0 {
						s.Set(1+random.IntN(most), random.IntN(4), time.Duration(random.IntN(4))*ms)
						pause()
					}
					return
				}
				defer left.Add(-1)
				for range 200 {
					ctx, cancel := l.Context(), context.CancelFunc(func() {})
					switch random.IntN(4) {
					case 0:
						ctx, cancel = context.WithTimeout(ctx, time.Duration(random.IntN(10))*ms)
					case 1:
						ctx, cancel = context.WithCancel(ctx)
						time.AfterFunc(time.Duration(random.IntN(10))*ms, cancel)
					}
					verdict := admitted
					if !s.TryAcquire() {
						verdict = s.Acquire(ctx)
					}
					ends[verdict].Add(1)
					if verdict == admitted {
						if n := running.Add(1); n > most {
							l.Errorf("%d at once", n)
						}
						pause()
						running.Add(-1)
						s.Release()
					}
					cancel()
				}
			})
			l.semaphoreIs(s, 0, 0)
			s.Set(1, 0, 0)
			if !s.TryAcquire() || s.TryAcquire() {
				l.Error("the limit is not 1")
			}
		})
	}
	for v := range ends {
		if ends[v].Load() == 0 {
			t.Errorf("no verdict %d", v)
		}
	}
}
