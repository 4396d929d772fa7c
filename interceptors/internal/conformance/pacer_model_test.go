package conformance

import (
	"testing"
	"time"

	"go.uber.org/ratelimit"
	"pgregory.net/rapid"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/limiter"
)

// takeClock is the time of a process that does nothing but Take.
type takeClock struct{ now time.Time }

func (c *takeClock) Now() time.Time        { return c.now }
func (c *takeClock) Sleep(d time.Duration) { c.now = c.now.Add(d) }

// A pacer admits calls when go.uber.org/ratelimit's own Take would return, however
// often it becomes what it is.
func TestPacerAgainstTake(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rate := rapid.SampledFrom([]float64{0.1, 10, 1000, 1e6}).Draw(t, "rate")
		slack := rapid.SampledFrom([]int{0, 1, 3, 10}).Draw(t, "slack")
		interval := time.Duration(1e9 / rate)
		clock := &takeClock{now: time.Unix(1e9, 0)}
		start := clock.now
		plain := ratelimit.New(1, ratelimit.Per(interval), ratelimit.WithSlack(slack), ratelimit.WithClock(clock))
		pacer := limiter.NewPacer(rate, slack, 0)
		var now, arrival time.Duration
		calls := rapid.SliceOfN(pauses(rate/float64(slack+1)), 1, 100).Draw(t, "pauses")
		for i, pause := range calls {
			arrival += pause
			if d := arrival - clock.now.Sub(start); d > 0 {
				clock.Sleep(d)
			}
			want := plain.Take().Sub(start)

			now = max(now, arrival)
			if i > 0 && rapid.Bool().Draw(t, "become") {
				pacer.Become(limiter.NewPacer(rate, slack, 0), now)
			}
			for !pacer.Take(now) {
				now += pacer.RetryAfter(now)
			}
			if now != want {
				t.Fatalf("call %d, which comes at %v, is admitted at %v, by Take at %v", i, arrival, now, want)
			}
		}
	})
}
