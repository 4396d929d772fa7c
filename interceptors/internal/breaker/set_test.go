package breaker_test

import (
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
)

// set changes the configuration.
func set(at time.Duration, edit func(*breaker.Config)) step {
	return func(r *run) {
		cfg := config()
		edit(&cfg)
		r.Set(cfg, at)
	}
}

func withSleep(d, most time.Duration) func(*breaker.Config) {
	return func(c *breaker.Config) { c.SleepWindow, c.MaxSleepWindow = d, most }
}

func withWindow(d time.Duration) func(*breaker.Config) {
	return func(c *breaker.Config) { c.Window = d }
}
func withProbes(n int) func(*breaker.Config)          { return func(c *breaker.Config) { c.Probes = n } }
func withLease(d time.Duration) func(*breaker.Config) { return func(c *breaker.Config) { c.Lease = d } }

func TestSetClosed(t *testing.T) {
	for _, tt := range []struct {
		name  string
		steps []step
	}{
		{"keeps results, and the next one is judged by the new thresholds", []step{
			calls(0, 9, failure), set(0, func(c *breaker.Config) { c.RequestVolume = 5 }), is(0, closed, 9, 9), saw(),
			calls(0, 1, success), saw("closed>open error_percent"),
		}},
		{"ignores a result that says nothing", []step{
			calls(0, 9, failure), set(0, func(c *breaker.Config) { c.RequestVolume = 5 }), calls(0, 1, ignored), is(0, closed, 9, 9), saw(),
		}},
		{"a higher volume is waited for", []step{
			calls(0, 19, failure), set(0, func(c *breaker.Config) { c.RequestVolume = 30 }), calls(0, 10, failure), is(0, closed, 29, 29),
			calls(0, 1, failure), saw("closed>open error_percent"),
		}},
		{"another percentage", []step{
			calls(0, 20, success), calls(0, 10, failure), set(0, func(c *breaker.Config) { c.ErrorPercent = 34 }),
			calls(0, 1, success), is(0, closed, 31, 10), calls(0, 1, failure), saw("closed>open error_percent"),
		}},
		{"slow calls are counted from now on", []step{
			slowCalls(0, 19, success), set(0, func(c *breaker.Config) { c.SlowPercent = 50 }),
			slowCalls(0, 18, success), is(0, closed, 37, 0), slowCalls(0, 1, success), saw("closed>open slow_calls"),
		}},
		{"slow calls are no longer counted", []step{
			set(0, func(c *breaker.Config) { c.SlowPercent = 50 }), slowCalls(0, 19, success), set(0, func(*breaker.Config) {}),
			slowCalls(0, 1, success), is(0, closed, 20, 0), saw(),
		}},
		{"the same window goes on", []step{
			calls(500*time.Millisecond, 10, failure), set(5*sec, func(c *breaker.Config) { c.ErrorPercent = 90 }),
			calls(9*sec, 9, failure), is(10*sec-ns, closed, 19, 19), is(10*sec, closed, 9, 9),
		}},
		{"another window begins empty, now", []step{
			calls(0, 19, failure), set(7300*time.Millisecond, withWindow(20*sec)), is(7300*time.Millisecond, closed, 0, 0),
			calls(9300*time.Millisecond-ns, 10, failure), is(27300*time.Millisecond-ns, closed, 10, 10), is(27300*time.Millisecond, closed, 0, 0), saw(),
		}},
		{"a shorter window", []step{
			calls(0, 19, failure), set(1*sec, withWindow(1*sec)), calls(1*sec, 19, failure), is(2*sec-ns, closed, 19, 19), is(2*sec, closed, 0, 0), saw(),
		}},
		{"calls from before another window do not count in it", []step{
			begin(0, "before"), calls(0, 19, failure), set(1*sec, withWindow(20*sec)),
			end(1*sec, "before", failure), is(1*sec, closed, 0, 0), saw(),
			set(2*sec, withWindow(10*sec)), calls(2*sec, 20, failure), saw("closed>open error_percent"),
		}},
		{"nor do they open it", []step{
			begin(0, "before"), calls(0, 19, failure), set(1*sec, withWindow(20*sec)), calls(1*sec, 1, success),
			end(1*sec, "before", failure), is(1*sec, closed, 1, 0), saw(),
		}},
		{"time that goes backwards", []step{
			calls(100*sec, 10, failure), set(50*sec, withWindow(20*sec)), calls(60*sec, 10, failure), is(0, closed, 10, 10), saw(),
		}},
	} {
		t.Run(tt.name, func(t *testing.T) { play(t, config(), tt.steps...) })
	}
}

func TestCase22_SetOpen(t *testing.T) {
	for _, tt := range []struct {
		name  string
		steps []step
	}{
		{"a shorter sleep window that is over", []step{
			set(2*sec, withSleep(2*sec, 0)), begin(2*sec, "probe"), is(2*sec, halfOpen, 0, 0),
		}},
		{"a shorter sleep window that is not over", []step{
			set(1*sec, withSleep(2*sec, 0)), reject(1*sec, 1*sec), reject(2*sec-ns, ns), begin(2*sec, "probe"),
		}},
		{"a longer sleep window", []step{
			set(1*sec, withSleep(20*sec, 0)), reject(1*sec, 19*sec), reject(20*sec-ns, ns), begin(20*sec, "probe"),
		}},
		{"a longer sleep window when the other was over", []step{
			set(6*sec, withSleep(20*sec, 0)), reject(6*sec, 14*sec),
		}},
		{"one that has doubled stays", []step{
			set(0, withSleep(5*sec, 40*sec)), begin(5*sec, ""), end(5*sec, "", failure), reject(5*sec, 10*sec),
			set(6*sec, withSleep(2*sec, 40*sec)), reject(6*sec, 9*sec),
			set(6*sec, withSleep(2*sec, 4*sec)), reject(6*sec, 3*sec),
			begin(9*sec, ""), end(9*sec, "", failure), reject(9*sec, 4*sec),
		}},
		{"and doubles from there", []step{
			set(0, withSleep(2*sec, 40*sec)), // 5 s, which is between
			begin(5*sec, ""), end(5*sec, "", failure), reject(5*sec, 10*sec),
			begin(15*sec, ""), set(15*sec, withSleep(30*sec, 40*sec)), end(15*sec, "", failure), reject(15*sec, 30*sec),
		}},
		{"other settings change nothing", []step{
			set(1*sec, withProbes(3)), set(1*sec, withWindow(1*sec)), set(1*sec, withLease(1*sec)), reject(1*sec, 4*sec), begin(5*sec, "probe"),
		}},
		{"late results are still dropped", []step{
			begin(5*sec, "a"), end(5*sec, "a", failure), set(6*sec, withSleep(1*sec, 0)), end(6*sec, "before", success), is(6*sec, open, 0, 0),
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			play(t, config(), append([]step{begin(0, "before"), calls(0, 20, failure), saw("closed>open error_percent")}, tt.steps...)...)
		})
	}
}

func TestCase22_SetHalfOpen(t *testing.T) {
	three := config()
	three.Probes = 3
	for _, tt := range []struct {
		name  string
		steps []step // three probes are out since 5, 6 and 7 s
	}{
		{"more are out than the new number", []step{
			set(7*sec, withProbes(1)), reject(7*sec, 14*sec), // until all but one are lost
			reject(21*sec-ns, ns), begin(21*sec, "d"), reject(21*sec, 5*sec),
			end(22*sec, "a", success), is(22*sec, closed, 0, 0),
		}},
		{"what is out goes down to the new number", []step{
			set(7*sec, withProbes(1)), end(7*sec, "a", ignored), reject(7*sec, 14*sec), end(7*sec, "b", ignored), reject(7*sec, 5*sec),
			end(7*sec, "c", ignored), begin(7*sec, "d"), reject(7*sec, 5*sec),
		}},
		{"as many successes close as are needed now", []step{
			end(7*sec, "a", success), set(7*sec, withProbes(2)), is(7*sec, halfOpen, 0, 0), end(7*sec, "b", success), is(7*sec, closed, 0, 0),
		}},
		{"enough successes were there before: the next one closes", []step{
			end(7*sec, "a", success), end(7*sec, "b", success), set(7*sec, withProbes(1)), is(7*sec, halfOpen, 0, 0),
			end(7*sec, "c", success), is(7*sec, closed, 0, 0),
		}},
		{"enough were there, and none is out: another probe is let in", []step{
			end(7*sec, "a", success), end(7*sec, "b", success), end(7*sec, "c", ignored), set(7*sec, withProbes(1)),
			begin(7*sec, "d"), reject(7*sec, 5*sec), end(8*sec, "d", success), is(8*sec, closed, 0, 0),
		}},
		{"a failure reopens, of any that is out", []step{
			set(7*sec, withProbes(1)), end(8*sec, "a", failure), reject(8*sec, 5*sec),
		}},
		{"more may be out", []step{
			set(7*sec, withProbes(5)), begin(7*sec, "d"), begin(7*sec, "e"), reject(7*sec, 3*sec),
		}},
		{"a shorter lease", []step{
			set(7*sec, func(c *breaker.Config) { c.Probes, c.Lease = 3, 1*sec }), begin(7*sec, "d"), begin(7*sec, "e"), reject(7*sec, 1*sec),
		}},
		{"a longer lease", []step{
			set(7*sec, func(c *breaker.Config) { c.Probes, c.Lease = 3, 100*sec }), reject(7*sec, 98*sec),
		}},
		{"another sleep window counts from the next opening on", []step{
			set(7*sec, withSleep(30*sec, 0)), end(8*sec, "a", failure), reject(8*sec, 30*sec),
		}},
		{"another window is that of the next closed state", []step{
			set(7*sec, withWindow(1*sec)), end(8*sec, "a", success), is(8*sec, closed, 0, 0),
			calls(8*sec, 10, failure), is(9*sec-ns, closed, 10, 10), is(9*sec, closed, 0, 0),
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			play(t, three, append([]step{calls(0, 20, failure), begin(5*sec, "a"), begin(6*sec, "b"), begin(7*sec, "c")}, tt.steps...)...)
		})
	}
}

// Lost probes of a larger number are forgotten at once.
func TestCase22_SetForgetsLostProbes(t *testing.T) {
	three := config()
	three.Probes = 3
	play(t, three,
		calls(0, 20, failure),
		begin(5*sec, "1"), begin(5*sec, "2"), begin(5*sec, "3"), begin(10*sec, "4"), begin(10*sec, "5"), begin(10*sec, "6"),
		set(25*sec, withProbes(1)), begin(25*sec, "7"), // five of the six are lost
		reject(25*sec, 5*sec), begin(30*sec, "8"), reject(30*sec, 10*sec),
		end(31*sec, "1", success), is(31*sec, closed, 0, 0))
}

// The configuration changes all the time while calls come and go: transitions are those
// that there are, and the breaker ends as it ought to.
func TestSetAtOnce(t *testing.T) {
	var clock atomic.Int64
	var count [3][3]atomic.Int64 // transitions, by from and to
	w := breaker.New(config(), func(tr breaker.Transition) { count[tr.From][tr.To].Add(1) })
	var left atomic.Int32
	left.Store(3)
	together(4, func(g int) {
		random := rand.New(rand.NewPCG(1, uint64(g)))
		if g == 3 {
			for left.Load() > 0 {
				cfg := config()
				cfg.Window = []time.Duration{10 * sec, 10 * sec, 5 * sec}[random.IntN(3)]
				cfg.SleepWindow = []time.Duration{5 * sec, 1 * sec, 9 * sec}[random.IntN(3)]
				cfg.MaxSleepWindow = []time.Duration{0, 20 * sec}[random.IntN(2)]
				cfg.Probes, cfg.SlowPercent, cfg.RequestVolume = 1+random.IntN(3), 50*random.Int32N(2), 1+random.IntN(10)
				w.Set(cfg, time.Duration(clock.Load()))
			}
			return
		}
		defer left.Add(-1)
		for n := range 20_000 {
			now := time.Duration(clock.Add(int64(10 * time.Millisecond)))
			w.Ready(now)
			if ticket, retryAfter, ok := w.Acquire(now); ok {
				result := success
				switch { // all goes well for 30s, then not for 30s
				case n%5 == 0:
					result = ignored
				case n%3 > 0 && now/(30*sec)%2 == 1:
					result = failure
				}
				w.Done(ticket, now, result, n%11 == 0)
			} else if retryAfter <= 0 {
				t.Errorf("rejected for %v", retryAfter)
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
	if d := opened - closings; d < 0 || d > 1 {
		t.Errorf("opened %d times, closed %d", opened, closings)
	}
	if d := opened + reopened - probed; d < 0 || d > 1 {
		t.Errorf("opened %d and reopened %d times, half-open %d", opened, reopened, probed)
	}
	w.Set(config(), time.Duration(clock.Load()))
	for range 100 { // it closes when all is well
		now := time.Duration(clock.Add(int64(time.Second)))
		if ticket, _, ok := w.Acquire(now); ok {
			w.Done(ticket, now, success, false)
		}
	}
	if s := w.Stats(time.Duration(clock.Load())); s.State != closed || s.Requests == 0 {
		t.Errorf("%+v at the end", s)
	}
}
