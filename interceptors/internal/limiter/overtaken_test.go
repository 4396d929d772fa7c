package limiter_test

import (
	"context"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/limiter"
)

// kinds are limits of 1,000 a second that hold ten permissions, or what is nearest.
var kinds = map[string]func() *limiter.Rate{
	"bucket": func() *limiter.Rate { return limiter.NewBucket(1000, 10, 0) },
	"pacer":  func() *limiter.Rate { return limiter.NewPacer(1000, 9, 0) },
}

// Become's time may be older than that of calls which have been admitted: what they took
// stays taken.
func TestBecomeOvertakenByTake(t *testing.T) {
	for from, first := range kinds {
		for to, next := range kinds {
			r, now, n := first(), 10*time.Second, 0
			r.Take(0) // a pacer's first call is alone
			for r.Take(now) {
				n++
			}
			for range 100 {
				r.Become(next(), now-5*time.Millisecond)
				for r.Take(now) {
					n++
				}
			}
			if available, _ := r.Stats(now); n > 11 || available >= 1 {
				t.Errorf("from %s to %s: %d were admitted at one time, %v are available", from, to, n, available)
			}
		}
	}
}

// Take's time may be older than that of a Become: what is there is there for it.
func TestTakeOvertakenByBecome(t *testing.T) {
	for from, first := range kinds {
		for to, next := range kinds {
			r, now := first(), 10*time.Second
			r.Take(0)
			r.Become(next(), now)
			for i := range 10 {
				if !r.Take(now - time.Millisecond) {
					t.Errorf("from %s to %s: call %d was refused", from, to, i)
				}
			}
		}
	}
}

// A limit that admits a call by what it was and by what it becomes, admits it meanwhile.
func TestSetRefusesNobodyMeanwhile(t *testing.T) {
	const callers = 8
	s := limiter.NewSemaphore(1, callers, 0)
	stop := make(chan struct{})
	var calls sync.WaitGroup
	for range callers {
		calls.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if !s.TryAcquire() {
					if v := s.Acquire(t.Context()); v != limiter.Admitted {
						t.Errorf("verdict %v", v)
						return
					}
				}
				runtime.Gosched()
				s.Release()
			}
		})
	}
	for range 3000 {
		s.Set(callers, 0, 0)
		runtime.Gosched()
		s.Set(1, callers, 0)
		runtime.Gosched()
	}
	close(stop)
	calls.Wait()
	if inFlight, queued := s.Stats(); inFlight != 0 || queued != 0 {
		t.Errorf("%d in flight, %d queued", inFlight, queued)
	}

	// The limit is raised between the two, and the queue is gone.
	s = limiter.NewSemaphore(1, 1, 0)
	if !s.TryAcquire() || s.TryAcquire() {
		t.Fatal("there is one place")
	}
	s.Set(2, 0, 0)
	if v := s.Acquire(t.Context()); v != limiter.Admitted {
		t.Errorf("verdict %v", v)
	}
	if v := s.Acquire(t.Context()); v != limiter.Refused {
		t.Errorf("verdict %v", v)
	}
}

// A place that comes while a call joins the queue is not missed: nobody else would come
// to hand it over.
func TestAcquireMissesNoPlace(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	s := limiter.NewSemaphore(1, 1, 0)
	for range 20_000 {
		s.TryAcquire()
		var holder sync.WaitGroup
		holder.Go(s.Release)
		v := s.Acquire(ctx)
		holder.Wait()
		if v != limiter.Admitted {
			t.Fatalf("verdict %v", v)
		}
		s.Release()
	}
}
