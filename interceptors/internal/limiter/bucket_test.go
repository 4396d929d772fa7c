package limiter_test

import (
	"math"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/limiter"
)

const (
	sec  = time.Second
	ms   = time.Millisecond
	ns   = time.Nanosecond
	year = 365 * 24 * time.Hour
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

// takeAll takes what there is.
func takeAll(b *limiter.Rate, now time.Duration) (n int) {
	for b.Take(now) {
		n++
	}
	return n
}

func TestTake(t *testing.T) {
	type row struct {
		at    time.Duration
		taken int           // tokens that are there
		after time.Duration // RetryAfter, once they are taken
	}
	for _, tt := range []struct {
		name  string
		rate  float64
		burst int
		rows  []row
	}{
		{"starts full and refills at the rate", 10, 5, []row{
			{0, 5, 100 * ms}, {99 * ms, 0, ms}, {100*ms - ns, 0, ns}, {100 * ms, 1, 100 * ms}, {450 * ms, 3, 50 * ms}, {500 * ms, 1, 100 * ms},
		}},
		{"holds no more than the burst", 10, 5, []row{
			{0, 5, 100 * ms}, {500*ms - ns, 4, ns}, {500 * ms, 1, 100 * ms}, {1000 * ms, 5, 100 * ms}, {10 * time.Hour, 5, 100 * ms},
		}},
		{"burst 1 is strict spacing", 1000, 1, []row{
			{0, 1, ms}, {ms - ns, 0, ns}, {ms, 1, ms}, {sec, 1, ms},
		}},
		{"is full whenever it is first asked", 10, 5, []row{{5 * year, 5, 100 * ms}}},
		{"one in ten seconds", 0.1, 1, []row{{0, 1, 10 * sec}, {10*sec - ns, 0, ns}, {10 * sec, 1, 10 * sec}}},
		{"one in a thousand seconds", 0.001, 2, []row{{0, 2, 1000 * sec}, {999 * sec, 0, sec}, {1000 * sec, 1, 1000 * sec}}},
		{"a million a second", 1e6, 3, []row{{0, 3, 1000}, {999, 0, 1}, {1000, 1, 1000}, {1_500_000, 3, 1000}}},
		{"ten million a second", 1e7, 1, []row{{0, 1, 100}, {99, 0, 1}, {100, 1, 100}}},
		{"an interval of a fraction of a nanosecond is rounded up", 3e6, 1, []row{{0, 1, 334}, {333, 0, 1}, {334, 1, 334}}},
		{"rounds the time to retry up to where there is a token", 3, 1, []row{{0, 1, 333_333_334}, {333_333_333, 0, 1}, {333_333_334, 1, 333_333_334}}},
		{"a large burst", 1e7, 1e6, []row{{0, 1e6, 100}, {50 * ms, 5e5, 100}, {sec, 1e6, 100}}},
		{"time that goes backwards admits nothing", 10, 5, []row{{10 * sec, 5, 100 * ms}, {0, 0, 10*sec + 100*ms}, {-year, 0, 10*sec + 100*ms}, {10 * sec, 0, 100 * ms}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := limiter.NewBucket(tt.rate, tt.burst, 0)
			for _, r := range tt.rows {
				if n := takeAll(b, r.at); n != r.taken {
					t.Fatalf("at %v: %d tokens, want %d", r.at, n, r.taken)
				}
				if d := b.RetryAfter(r.at); d != r.after {
					t.Fatalf("at %v: retry after %v, want %v", r.at, d, r.after)
				}
			}
		})
	}
}

// Case 21, and the corners of the range, also after a year.
func TestCase21_Extremes(t *testing.T) {
	for _, start := range []time.Duration{0, year, 8 * year} {
		for _, rate := range []float64{0.001, 0.1, 1, 1e6, 9_999_999, 1e7} {
			for _, burst := range []int{1, 2, 1000, 1e7} {
				fill := float64(burst) / rate // seconds
				if fill > 30*24*3600 {
					continue
				}
				b := limiter.NewBucket(rate, burst, 0)
				// Not one by one: Stats tells what is left of 1000.
				for range min(burst, 1000) {
					if !b.Take(start) {
						t.Fatalf("%g/s, burst %d: not full", rate, burst)
					}
				}
				left, _ := b.Stats(start)
				if want := float64(max(0, burst-1000)); left != want {
					t.Fatalf("%g/s, burst %d: %v left, want %v", rate, burst, left, want)
				}
				if left == 0 {
					d := b.RetryAfter(start)
					if exact := 1e9 / rate; float64(d) < math.Floor(exact) || float64(d) > exact*1.0002+1 {
						t.Fatalf("%g/s, burst %d: retry after %v", rate, burst, d)
					}
					if b.Take(start+d-ns) || !b.Take(start+d) || b.Take(start+d) {
						t.Fatalf("%g/s, burst %d: there must be one token after %v, and no sooner", rate, burst, d)
					}
				}
				again := start + time.Duration(fill*1e9*1.001) + 31*24*time.Hour
				if left, _ := b.Stats(again); left != float64(burst) || !b.Idle(again) {
					t.Fatalf("%g/s, burst %d: %v after a pause", rate, burst, left)
				}
			}
		}
	}
}

// Each rate is kept to 0.02 %, and never exceeded.
func TestRateIsExact(t *testing.T) {
	for _, rate := range []float64{0.001, 0.3, 7, 10, 1000, 99_999.9, 100_000, 600_000, 2_999_999, 9_996_876.5, 9_999_999, 1e7} {
		const n = 100_000
		b := limiter.NewBucket(rate, 1, 0)
		var now time.Duration
		for range n {
			for !b.Take(now) {
				now += b.RetryAfter(now)
			}
		}
		// Going from token to token costs up to a nanosecond each: measured at the
		// full capacity instead, which a Bucket keeps in its own units.
		b = limiter.NewBucket(rate, n, 0)
		takeAll(b, 0)
		var lo, hi time.Duration = 0, time.Duration(2 * n / rate * 1e9)
		for lo < hi { // when is it full?
			if mid := (lo + hi) / 2; b.Idle(mid) {
				hi = mid
			} else {
				lo = mid + 1
			}
		}
		if got := n / lo.Seconds(); got > rate*(1+1e-9) || got < rate*(1-0.0002) {
			t.Errorf("%g/s: %.3f/s", rate, got)
		}
		if got := n / now.Seconds(); got > rate*(1+1e-4) {
			t.Errorf("%g/s, one by one: %.3f/s", rate, got)
		}
	}
}

func TestBucketStats(t *testing.T) {
	b := limiter.NewBucket(10, 5, 0)
	for _, tt := range []struct {
		at        time.Duration
		take      bool
		available float64
		idle      bool
	}{
		{0, false, 5, true}, {0, true, 4, false}, {50 * ms, false, 4.5, false}, {100*ms - ns, false, 4.99999999, false},
		{100 * ms, false, 5, true}, {time.Hour, false, 5, true}, {time.Hour, true, 4, false}, {0, false, 0, false},
	} {
		if tt.take && !b.Take(tt.at) {
			t.Fatalf("at %v: no token", tt.at)
		}
		available, waiting := b.Stats(tt.at)
		if math.Abs(available-tt.available) > 1e-9 || waiting != 0 || b.Idle(tt.at) != tt.idle {
			t.Errorf("at %v: %v available, %d waiting, idle %v, want %v, 0, %v", tt.at, available, waiting, b.Idle(tt.at), tt.available, tt.idle)
		}
	}
}

// No span of w admits more than rate*w + burst + 1, with many goroutines and an
// uneven clock.
func TestNeverMoreThanTheRate(t *testing.T) {
	const rate, burst = 1e6, 7
	b := limiter.NewBucket(rate, burst, 0)
	var clock atomic.Int64
	var mu sync.Mutex
	admitted := map[time.Duration]int{}
	together(4, func(g int) {
		for i := range 20_000 {
			now := time.Duration(clock.Add(int64((i*7919 + g) % 900)))
			if b.Take(now) {
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
	if total[end] < end*9/10 {
		t.Errorf("%d in %dµs: too few", total[end], end)
	}
}

// As many as there are, at once and from all sides: not one more or less.
func TestTakeAtOnce(t *testing.T) {
	const n = 1_000_000
	b := limiter.NewBucket(1, n, 0)
	var taken atomic.Int32
	together(4, func(int) { taken.Add(int32(takeAll(b, 0))) })
	if taken.Load() != n {
		t.Fatalf("%d taken", taken.Load())
	}
}

func TestNoAllocations(t *testing.T) {
	b := limiter.NewBucket(1000, 10, sec)
	var now time.Duration
	if n := testing.AllocsPerRun(1000, func() {
		b.Take(now)
		b.RetryAfter(now)
		now += ms / 2
	}); n != 0 {
		t.Errorf("Take: %v allocations", n)
	}
	for _, queue := range []int{0, 10} {
		s := limiter.NewSemaphore(1, queue, sec)
		if n := testing.AllocsPerRun(1000, func() {
			if s.TryAcquire() && !s.TryAcquire() {
				s.Release()
			}
		}); n != 0 {
			t.Errorf("TryAcquire with a queue of %d: %v allocations", queue, n)
		}
	}
}
