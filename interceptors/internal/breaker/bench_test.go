package breaker_test

import (
	"testing"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
)

func call(w *breaker.Window, now time.Duration, result breaker.Result) {
	if _, ok := w.Ready(now); !ok {
		return
	}
	if ticket, _, ok := w.Acquire(now); ok {
		w.Done(ticket, now, result, false)
	}
}

// BenchmarkCall is Ready, Acquire and Done of a call that succeeds: in a clean
// window, and in one with failures, where each success is evaluated.
func BenchmarkCall(b *testing.B) {
	for _, failures := range []int{0, 5} {
		name := "clean"
		if failures > 0 {
			name = "dirty"
		}
		fresh := func() *breaker.Window {
			w := breaker.New(config(), nil)
			for range failures {
				call(w, 0, failure)
			}
			for range failures {
				call(w, 0, success)
			}
			return w
		}
		b.Run(name+"/serial", func(b *testing.B) {
			w := fresh()
			b.ReportAllocs()
			for b.Loop() {
				call(w, 0, success)
			}
		})
		b.Run(name+"/parallel", func(b *testing.B) {
			w := fresh()
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					call(w, 0, success)
				}
			})
		})
	}
}

func BenchmarkRejected(b *testing.B) {
	w := breaker.New(config(), nil)
	for range 20 {
		call(w, 0, failure)
	}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			call(w, sec, success)
		}
	})
}
