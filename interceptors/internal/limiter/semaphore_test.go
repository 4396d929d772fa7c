package limiter_test

import (
	"context"
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
