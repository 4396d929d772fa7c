package breaker_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/afex/hystrix-go/hystrix"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
)

func call(w breaker.Breaker, now time.Duration, result breaker.Result) {
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

// BenchmarkHystrix compares the engine with what it is built on, at a pace at
// which hystrix-go loses no update: it may catch up, off the clock, after every
// 1,000 calls. cpu-ns is what the process spent on a call, hystrix-go's goroutines
// included.
func BenchmarkHystrix(b *testing.B) {
	var circuits atomic.Int64
	paced := func(b *testing.B, one func(), applied func() bool) {
		b.ReportAllocs()
		before := cpu()
		for i := range b.N {
			one()
			if i%1000 == 999 || i == b.N-1 {
				b.StopTimer()
				for !applied() {
					time.Sleep(100 * time.Microsecond)
				}
				b.StartTimer()
			}
		}
		b.ReportMetric(float64(cpu()-before)/float64(b.N), "cpu-ns/op")
	}
	b.Run("DoC", func(b *testing.B) {
		name := fmt.Sprint("bench ", circuits.Add(1))
		hystrix.ConfigureCommand(name, hystrix.CommandConfig{MaxConcurrentRequests: 10_000})
		before := cpu()
		b.ReportAllocs()
		for range b.N {
			if err := hystrix.DoC(b.Context(), name, func(context.Context) error { return nil }, nil); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(cpu()-before)/float64(b.N), "cpu-ns/op")
	})
	b.Run("AllowRequest+ReportEvent", func(b *testing.B) {
		c, _, err := hystrix.GetCircuit(fmt.Sprint("bench ", circuits.Add(1)))
		if err != nil {
			b.Fatal(err)
		}
		paced(b, func() {
			start := time.Now()
			if c.AllowRequest() {
				if err := c.ReportEvent([]string{"success"}, start, time.Since(start)); err != nil {
					b.Fatal(err)
				}
			}
		}, func() bool { time.Sleep(5 * time.Millisecond); return true }) // it does not tell
	})
	engine := func(b *testing.B) (h *breaker.Hystrix, one func()) {
		epoch := time.Now()
		h, err := breaker.NewHystrix(breaker.HystrixConfig{
			Name:         breaker.NewHystrixScope().Name("client", "bench", "/a.B/C"),
			ErrorPercent: 50, RequestVolume: 20, SleepWindow: 5 * sec, Epoch: epoch,
		}, nil)
		if err != nil {
			b.Fatal(err)
		}
		return h, func() { call(h, time.Since(epoch), success) }
	}
	b.Run("engine", func(b *testing.B) {
		h, one := engine(b)
		paced(b, one, h.Applied)
	})
	b.Run("engine, not paced", func(b *testing.B) { // what is lost, then
		h, one := engine(b)
		for range b.N {
			one()
		}
		b.StopTimer()
		for !h.Applied() {
			time.Sleep(100 * time.Microsecond)
		}
		b.ReportMetric(100*float64(h.Stats(0).Requests)/float64(b.N), "applied-%")
	})
}
