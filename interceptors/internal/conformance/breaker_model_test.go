package conformance

import (
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
)

// modelBreaker is the breaker as its description reads: it remembers every
// result and every probe, and looks at all of them each time.
type modelBreaker struct {
	cfg         breaker.Config
	state       breaker.State
	period      int           // number of the present period
	began       time.Duration // the present period
	sleep       time.Duration // the last sleep window since it was closed
	results     []modelResult // of the present period
	successes   int           // of probes, in the present period
	probes      []*modelCall  // of the present period
	transitions []breaker.Transition
}

type modelResult struct {
	at            time.Duration
	failure, slow bool
}

type modelCall struct {
	period  int
	probe   bool
	start   time.Duration
	verdict bool
	lost    bool // it was, when its slot was given to another
}

func (m *modelBreaker) change(now time.Duration, to breaker.State, cause breaker.Cause) {
	m.transitions = append(m.transitions, breaker.Transition{From: m.state, To: to, Cause: cause})
	switch to {
	case breaker.Closed:
		m.sleep = 0
	case breaker.Open:
		m.sleep = m.allowed(2 * m.sleep)
	}
	m.state, m.began, m.results, m.probes, m.successes = to, now, nil, nil, 0
	m.period++
}

// allowed is the sleep window nearest to d between the shortest and the longest.
func (m *modelBreaker) allowed(d time.Duration) time.Duration {
	return max(m.cfg.SleepWindow, min(d, m.cfg.MaxSleepWindow))
}

func (m *modelBreaker) set(cfg breaker.Config, now time.Duration) {
	was := m.cfg
	m.cfg = cfg
	switch {
	case m.state == breaker.Closed && cfg.Window != was.Window: // begins anew
		m.began, m.results = now, nil
		m.period++
	case m.state == breaker.Open:
		m.sleep = m.allowed(m.sleep)
	}
}

// window counts the results that are at most nine tenths, begun, old.
func (m *modelBreaker) window(now time.Duration) (requests, failures, slow int) {
	tenth := func(at time.Duration) int { return int((at - m.began) / (m.cfg.Window / 10)) }
	for _, r := range m.results {
		if tenth(now)-tenth(r.at) > 9 {
			continue
		}
		requests++
		if r.failure {
			failures++
		}
		if r.slow {
			slow++
		}
	}
	return requests, failures, slow
}

// unanswered are the probes without verdict that nobody has taken the place of.
func (m *modelBreaker) unanswered() (probes []*modelCall) {
	for _, p := range m.probes {
		if !p.verdict && !p.lost {
			probes = append(probes, p)
		}
	}
	return probes
}

// mayProbe counts one by one.
func (m *modelBreaker) mayProbe(now time.Duration) bool {
	leased, unanswered := 0, 0
	for _, p := range m.unanswered() {
		age := now - p.start
		if age < m.cfg.Lease {
			leased++
		}
		if age < 3*m.cfg.Lease {
			unanswered++
		}
	}
	return leased < m.cfg.Probes && unanswered < 2*m.cfg.Probes
}

// retryAfter tries all times at which anything can change.
func (m *modelBreaker) retryAfter(now time.Duration) time.Duration {
	switch m.state {
	case breaker.Open:
		return max(0, m.began+m.sleep-now)
	case breaker.HalfOpen:
		times := []time.Duration{now}
		for _, p := range m.probes {
			times = append(times, p.start+m.cfg.Lease, p.start+3*m.cfg.Lease)
		}
		slices.Sort(times)
		for _, at := range times {
			if at >= now && m.mayProbe(at) {
				return at - now
			}
		}
		panic("it never opens again")
	}
	return 0
}

func (m *modelBreaker) acquire(now time.Duration) *modelCall {
	if m.state == breaker.Open {
		m.change(now, breaker.HalfOpen, breaker.SleepWindow)
	}
	call := &modelCall{period: m.period, start: now, probe: m.state == breaker.HalfOpen}
	if call.probe {
		for left := m.unanswered(); len(left) >= 2*m.cfg.Probes; left = left[1:] {
			left[0].lost = true
		}
		m.probes = append(m.probes, call)
	}
	return call
}

func (m *modelBreaker) done(call *modelCall, now time.Duration, result breaker.Result, slow bool) {
	call.verdict = true
	slow = slow && m.cfg.SlowPercent > 0
	switch {
	case call.period != m.period || result == breaker.Ignored:
	case !call.probe:
		m.results = append(m.results, modelResult{now, result == breaker.Failure, slow})
		requests, failures, slowOnes := m.window(now)
		switch {
		case requests < m.cfg.RequestVolume:
		case failures*100 >= requests*m.cfg.ErrorPercent:
			m.change(now, breaker.Open, breaker.ErrorPercent)
		case m.cfg.SlowPercent > 0 && slowOnes*100 >= requests*int(m.cfg.SlowPercent):
			m.change(now, breaker.Open, breaker.SlowCalls)
		}
	case result == breaker.Failure || slow:
		m.change(now, breaker.Open, breaker.ProbeFailure)
	default:
		m.successes++
		if m.successes >= m.cfg.Probes {
			m.change(now, breaker.Closed, breaker.ProbeSuccess)
		}
	}
}

// check is rapid.Check with ten times as many runs.
func check(t *testing.T, prop func(*rapid.T)) {
	t.Helper()
	for range 10 {
		rapid.Check(t, prop)
	}
}

var breakerConfigs = rapid.Custom(func(t *rapid.T) breaker.Config {
	seconds := func(name string, of ...time.Duration) time.Duration {
		return rapid.SampledFrom(of).Draw(t, name) * time.Second
	}
	return breaker.Config{
		ErrorPercent:   rapid.SampledFrom([]int{1, 30, 50, 100}).Draw(t, "error percent"),
		RequestVolume:  rapid.IntRange(1, 6).Draw(t, "request volume"),
		Probes:         rapid.IntRange(1, 3).Draw(t, "probes"),
		SlowPercent:    rapid.SampledFrom([]int32{0, 0, 40, 100}).Draw(t, "slow percent"),
		Window:         seconds("window", 10, 10, 10, 5),
		SleepWindow:    seconds("sleep window", 5, 5, 5, 1, 20),
		MaxSleepWindow: seconds("max sleep window", 0, 5, 12, 60),
		Lease:          seconds("lease", 2, 5, 9),
	}
})

func TestBreakerAgainstModel(t *testing.T) {
	reached := map[breaker.Transition]int{}
	set := map[breaker.State]int{}
	check(t, func(t *rapid.T) {
		cfg := breakerConfigs.Draw(t, "config")
		var transitions []breaker.Transition
		real := breaker.New(cfg, func(tr breaker.Transition) { transitions = append(transitions, tr) })
		model := &modelBreaker{cfg: cfg}

		type call struct {
			ticket breaker.Ticket
			model  *modelCall
		}
		var calls []call
		// The first period may begin long after the epoch.
		now := rapid.SampledFrom([]time.Duration{0, time.Nanosecond, 300 * 24 * time.Hour}).Draw(t, "now")

		begin := func(t *rapid.T) {
			wait := model.retryAfter(now)
			ready, readyOK := real.Ready(now)
			ticket, retry, ok := real.Acquire(now)
			if ok != (wait == 0) || retry != wait || ready != wait || readyOK != ok {
				t.Fatalf("Ready %v %v, Acquire %v %v, model %v", ready, readyOK, retry, ok, wait)
			}
			if !ok {
				return
			}
			calls = append(calls, call{ticket, model.acquire(now)})
			if c := calls[len(calls)-1]; c.ticket.Probe() != c.model.probe {
				t.Fatalf("Probe() = %v", c.ticket.Probe())
			}
		}
		end := func(t *rapid.T) {
			if len(calls) == 0 {
				t.Skip("no call")
			}
			i := len(calls) - 1
			if rapid.Bool().Draw(t, "old") {
				i = rapid.IntRange(0, i).Draw(t, "call")
			}
			c := calls[i]
			calls = slices.Delete(calls, i, i+1)
			result := rapid.SampledFrom([]breaker.Result{breaker.Ignored, breaker.Success, breaker.Success, breaker.Failure}).Draw(t, "result")
			slow := rapid.IntRange(0, 3).Draw(t, "slow") == 0
			real.Done(c.ticket, now, result, slow)
			model.done(c.model, now, result, slow)
		}
		sleep := func(t *rapid.T) {
			now += rapid.OneOf(
				rapid.SampledFrom([]time.Duration{1, time.Second - 1, time.Second, 2 * time.Second, 5 * time.Second, 9 * time.Second, 10 * time.Second, 11 * time.Second, 7 * time.Hour}),
				rapid.Custom(func(t *rapid.T) time.Duration {
					return time.Duration(rapid.Int64Range(0, int64(12*time.Second)).Draw(t, "d"))
				}),
				// To the very edge of what the breaker says of itself.
				rapid.Custom(func(t *rapid.T) time.Duration {
					return max(0, model.retryAfter(now)-time.Duration(rapid.IntRange(0, 1).Draw(t, "early")))
				}),
			).Draw(t, "sleep")
		}
		t.Repeat(map[string]func(*rapid.T){
			"begin 1": begin, "begin 2": begin, "begin 3": begin,
			"end 1": end, "end 2": end, "end 3": end,
			"sleep": sleep,
			"set": func(t *rapid.T) {
				cfg := breakerConfigs.Draw(t, "config")
				real.Set(cfg, now)
				model.set(cfg, now)
				set[model.state]++
			},
			"look": func(t *rapid.T) { // not after each step: it moves the window on
				requests, failures, _ := model.window(now)
				want := breaker.Stats{Engine: "window", State: model.state, Requests: requests, Failures: failures, RetryAfter: model.retryAfter(now)}
				if got := real.Stats(now); got != want {
					t.Fatalf("at %v: %+v, model %+v", now, got, want)
				}
				if idle := real.Idle(now); idle != (model.state == breaker.Closed && requests == 0) {
					t.Fatalf("at %v: Idle() = %v in %+v", now, idle, want)
				}
			},
			"": func(t *rapid.T) {
				if !slices.Equal(transitions, model.transitions) {
					t.Fatalf("transitions %v, model %v", transitions, model.transitions)
				}
			},
		})
		for _, tr := range transitions {
			reached[tr]++
		}
	})
	if len(reached) != 5 || len(set) != 3 {
		t.Errorf("not all transitions were reached: %v, or not set in all states: %v", reached, set)
	}
}
