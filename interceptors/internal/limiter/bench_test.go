package limiter_test

import (
	"fmt"
	"testing"
	"time"

	"go.uber.org/ratelimit"

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

// BenchmarkSpacing measures, in real time, how evenly eight callers who want more
// than the rate are admitted: the median gap as a share of 1/rate, how many of 100
// gaps are shorter than nine tenths of it, and the share of a core that it takes.
// Beside it go.uber.org/ratelimit's own Take.
func BenchmarkSpacing(b *testing.B) {
	for _, rate := range []int{10, 200, 5000} {
		arms := []struct {
			name string
			take func() func()
		}{
			{"pacing", func() func() {
				p, start := limiter.NewPacer(float64(rate), 10, time.Hour), time.Now()
				clock := func() time.Duration { return time.Since(start) }
				return func() {
					if !p.Take(clock()) && p.Wait(b.Context(), clock) != admitted {
						b.Error("refused")
					}
				}
			}},
			{"Take", func() func() { r := ratelimit.New(rate); return func() { r.Take() } }},
		}
		for _, arm := range arms {
			b.Run(fmt.Sprintf("%d/%s", rate, arm.name), func(b *testing.B) {
				for range b.N {
					take, start, before := arm.take(), time.Now(), cpu()
					times := drive(func() time.Duration { return time.Since(start) }, 8, max(3, rate/8), take)
					interval := time.Second / time.Duration(rate)
					median, _ := spacing(times, interval)
					_, early := spacing(times, interval*9/10)
					b.ReportMetric(float64(median)/float64(interval), "gap/interval")
					b.ReportMetric(100*float64(early)/float64(len(times)-1), "early-%")
					b.ReportMetric(float64(cpu()-before)/float64(time.Since(start)), "cores")
				}
			})
		}
	}
}
