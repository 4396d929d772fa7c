package limiter_test

import (
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
