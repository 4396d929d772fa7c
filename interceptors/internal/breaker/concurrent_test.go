package breaker_test

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
)

// together runs f(0) to f(n-1) at the same time.
func together(n int, f func(i int)) {
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		wg.Go(func() {
			<-start
			f(i)
		})
	}
	close(start)
	wg.Wait()
}

// Results that come at once must not each believe that another opens.
func TestOpeningIsNotMissed(t *testing.T) {
	cfg := config()
	cfg.RequestVolume = 4
	for range 3000 {
		var opened atomic.Int32
		w := breaker.New(cfg, func(breaker.Transition) { opened.Add(1) })
		together(4, func(i int) {
			ticket, _, _ := w.Acquire(0)
			w.Done(ticket, 0, success+breaker.Result(i%2), false)
		})
		if s := w.Stats(0); s.State != open || opened.Load() != 1 {
			t.Fatalf("%+v after %d openings", s, opened.Load())
		}
	}
}

func TestProbesAtOnce(t *testing.T) {
	cfg := config()
	cfg.Probes = 2
	for range 1000 {
		w := breaker.New(cfg, nil)
		for range 20 {
			ticket, _, _ := w.Acquire(0)
			w.Done(ticket, 0, failure, false)
		}
		var probes atomic.Int32
		together(8, func(int) {
			if ticket, _, ok := w.Acquire(5 * sec); ok {
				if !ticket.Probe() {
					t.Error("admitted without being a probe")
				}
				probes.Add(1)
			}
		})
		if probes.Load() != 2 {
			t.Fatalf("%d probes", probes.Load())
		}
	}
}

// All operations at once while time runs through thousands of windows.
func TestAllAtOnce(t *testing.T) {
	cfg := config()
	cfg.Probes, cfg.SlowPercent, cfg.RequestVolume = 2, 50, 5
	var clock atomic.Int64
	var count [3][3]atomic.Int64 // transitions, by from and to
	w := breaker.New(cfg, func(tr breaker.Transition) { count[tr.From][tr.To].Add(1) })
	together(4, func(i int) {
		for n := range 20_000 {
			now := time.Duration(clock.Add(int64(10 * time.Millisecond)))
			if _, ok := w.Ready(now); !ok && n%3 == 0 {
				continue
			}
			if ticket, _, ok := w.Acquire(now); ok {
				result := success
				switch { // all goes well for 30s, then not for 30s
				case n%5 == 0:
					result = ignored
				case n%3 > 0 && now/(30*sec)%2 == 1:
					result = failure
				}
				w.Done(ticket, now, result, n%11 == 0)
			}
			if s := w.Stats(now); s.Failures > s.Requests || s.RetryAfter < 0 {
				t.Errorf("%+v", s)
			}
		}
	})
	opened, probed, reopened, closings := count[closed][open].Load(), count[open][halfOpen].Load(), count[halfOpen][open].Load(), count[halfOpen][closed].Load()
	if opened == 0 || closings == 0 || reopened == 0 {
		t.Errorf("opened %d, reopened %d, closed %d: not all was tried", opened, reopened, closings)
	}
	// What was left must have been entered, but for the last state.
	if d := opened - closings; d < 0 || d > 1 {
		t.Errorf("opened %d times, closed %d", opened, closings)
	}
	if d := opened + reopened - probed; d < 0 || d > 1 {
		t.Errorf("opened %d and reopened %d times, half-open %d", opened, reopened, probed)
	}
}

func TestNoAllocations(t *testing.T) {
	cfg := config()
	cfg.SlowPercent = 90
	w := breaker.New(cfg, nil)
	var now time.Duration
	result := success
	call := func() {
		now += 100 * time.Millisecond
		w.Ready(now)
		if ticket, _, ok := w.Acquire(now); ok {
			w.Done(ticket, now, result, false)
		}
	}
	if n := testing.AllocsPerRun(1000, call); n != 0 {
		t.Errorf("closed: %v allocations a call", n)
	}
	result = failure
	for w.Stats(now).State == closed {
		call()
	}
	now -= sec
	if n := testing.AllocsPerRun(30, call); n != 0 {
		t.Errorf("open: %v allocations a rejection", n)
	}
	if s := w.Stats(now); s.State != open {
		t.Errorf("%+v", s)
	}
}

// Calls that are lost for ever, in half-open, cost no memory.
func TestLostProbesAreForgotten(t *testing.T) {
	w := breaker.New(config(), nil)
	for range 20 {
		ticket, _, _ := w.Acquire(0)
		w.Done(ticket, 0, failure, false)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	probes := 0
	for now := time.Duration(0); now < 1000*time.Hour; now += 5 * sec {
		if _, _, ok := w.Acquire(now); ok {
			probes++
		}
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 10_000 || probes < 100_000 {
		t.Errorf("%d bytes for %d probes", n, probes)
	}
}

func TestHeap(t *testing.T) {
	const n = 10_000
	all := make([]*breaker.Window, n)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range all {
		all[i] = breaker.New(config(), nil)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if size := (after.HeapAlloc - before.HeapAlloc) / n; size > 350 {
		t.Errorf("a breaker takes %d bytes", size)
	} else {
		t.Logf("a breaker takes %d bytes", size)
	}
	runtime.KeepAlive(all)
}
