package limiter_test

import (
	"testing"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/limiter"
)

// bench runs what setup returns, serially and in parallel; a call takes a second
// of its goroutine's own time.
func bench(b *testing.B, setup func() func(now time.Duration)) {
	b.Run("serial", func(b *testing.B) {
		f := setup()
		b.ReportAllocs()
		var now time.Duration
		for b.Loop() {
			now += time.Second
			f(now)
		}
	})
	b.Run("parallel", func(b *testing.B) {
		f := setup()
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			var now time.Duration
			for pb.Next() {
				now += time.Second
				f(now)
			}
		})
	})
}

func BenchmarkTake(b *testing.B) {
	// As large as a bucket may be: a goroutine whose time lags behind that of the
	// others still finds tokens.
	for name, rate := range map[string]float64{"admitted": 4, "refused": 0.001} {
		b.Run(name, func(b *testing.B) {
			bench(b, func() func(time.Duration) {
				bucket := limiter.NewBucket(rate, int(rate*2.5e6), 0)
				return func(now time.Duration) { bucket.Take(now) }
			})
		})
	}
}

func BenchmarkSemaphore(b *testing.B) {
	for name, queue := range map[string]int{"no queue": 0, "queue": 10} {
		b.Run(name, func(b *testing.B) {
			bench(b, func() func(time.Duration) {
				s := limiter.NewSemaphore(1000, queue, 0)
				return func(time.Duration) {
					if s.TryAcquire() {
						s.Release()
					}
				}
			})
		})
	}
}
