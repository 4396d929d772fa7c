package breaker_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
)

const (
	closed   = breaker.Closed
	open     = breaker.Open
	halfOpen = breaker.HalfOpen

	ignored = breaker.Ignored
	success = breaker.Success
	failure = breaker.Failure

	sec = time.Second
	ns  = time.Nanosecond
)

func config() breaker.Config {
	return breaker.Config{
		ErrorPercent: 50, RequestVolume: 20, Probes: 1,
		Window: 10 * sec, SleepWindow: 5 * sec, Lease: 5 * sec,
	}
}

// run is one breaker under test, with its calls by name.
type run struct {
	*testing.T
	*breaker.Window
	calls       map[string]breaker.Ticket
	state       breaker.State // as of transitions: Stats would move the window on
	transitions []string
}

// step is one row of a table.
type step func(*run)

func play(t *testing.T, cfg breaker.Config, steps ...step) {
	t.Helper()
	r := &run{T: t, calls: map[string]breaker.Ticket{}}
	r.Window = breaker.New(cfg, func(tr breaker.Transition) {
		r.Idle(0) // would deadlock under the lock
		r.state = tr.To
		r.transitions = append(r.transitions, fmt.Sprintf("%v>%v %v", tr.From, tr.To, tr.Cause))
	})
	for i, s := range steps {
		s(r)
		if t.Failed() {
			t.Fatalf("in step %d", i)
		}
	}
}

// acquire looks first, twice, and expects Acquire to agree.
func (r *run) acquire(at time.Duration) (t breaker.Ticket, retryAfter time.Duration, ok bool) {
	ready1, ok1 := r.Ready(at)
	ready2, ok2 := r.Ready(at)
	t, retryAfter, ok = r.Acquire(at)
	if ready1 != retryAfter || ready2 != retryAfter || ok1 != ok || ok2 != ok {
		r.Errorf("at %v: Ready %v %v, %v %v; Acquire %v %v", at, ready1, ok1, ready2, ok2, retryAfter, ok)
	}
	if ok != (retryAfter == 0) {
		r.Errorf("at %v: ok %v with retry after %v", at, ok, retryAfter)
	}
	return t, retryAfter, ok
}

// begin admits a call.
func begin(at time.Duration, call string) step {
	return func(r *run) {
		t, retryAfter, ok := r.acquire(at)
		if !ok {
			r.Errorf("at %v: %s rejected, retry after %v", at, call, retryAfter)
		}
		if r.state == halfOpen != t.Probe() {
			r.Errorf("at %v: %s: Probe() = %v", at, call, t.Probe())
		}
		r.calls[call] = t
	}
}

// end ends a call.
func end(at time.Duration, call string, result breaker.Result) step {
	return func(r *run) { r.Done(r.calls[call], at, result, false) }
}

func endSlow(at time.Duration, call string, result breaker.Result) step {
	return func(r *run) { r.Done(r.calls[call], at, result, true) }
}

// calls admits and ends n calls.
func calls(at time.Duration, n int, result breaker.Result) step {
	return func(r *run) {
		for range n {
			begin(at, "")(r)
			end(at, "", result)(r)
		}
	}
}

func slowCalls(at time.Duration, n int, result breaker.Result) step {
	return func(r *run) {
		for range n {
			begin(at, "")(r)
			endSlow(at, "", result)(r)
		}
	}
}

// reject expects a rejection.
func reject(at, retryAfter time.Duration) step {
	return func(r *run) {
		if _, got, ok := r.acquire(at); ok || got != retryAfter {
			r.Errorf("at %v: admitted %v, retry after %v, want rejected, %v", at, ok, got, retryAfter)
		}
		if s := r.Stats(at); s.RetryAfter != retryAfter {
			r.Errorf("at %v: %+v, want retry after %v", at, s, retryAfter)
		}
	}
}

// is expects a state and the counts of the window.
func is(at time.Duration, state breaker.State, requests, failures int) step {
	return func(r *run) {
		got := r.Stats(at)
		if got.State != state || got.Requests != requests || got.Failures != failures {
			r.Errorf("at %v: %+v, want %v, requests %d, failures %d", at, got, state, requests, failures)
		}
		if idle := r.Idle(at); idle != (state == closed && requests == 0) {
			r.Errorf("at %v: Idle() = %v in %+v", at, idle, got)
		}
	}
}

// saw expects the transitions since the last saw.
func saw(want ...string) step {
	return func(r *run) {
		if !slices.Equal(r.transitions, want) {
			r.Errorf("transitions %q, want %q", r.transitions, want)
		}
		r.transitions = nil
	}
}

func TestOpens(t *testing.T) {
	for _, tt := range []struct {
		name  string
		steps []step
	}{
		{"at the request volume", []step{
			calls(0, 19, failure), is(0, closed, 19, 19),
			calls(0, 1, failure), is(0, open, 0, 0), saw("closed>open error_percent"),
		}},
		{"with a success that reaches the volume", []step{
			calls(0, 10, failure), calls(0, 9, success), is(0, closed, 19, 10),
			calls(0, 1, success), saw("closed>open error_percent"),
		}},
		{"at the percentage", []step{
			calls(0, 51, success), calls(0, 50, failure), is(0, closed, 101, 50),
			calls(0, 1, failure), saw("closed>open error_percent"),
		}},
		{"not below the percentage", []step{
			calls(0, 11, success), calls(0, 9, failure), is(0, closed, 20, 9), saw(),
		}},
		{"when old successes leave the window", []step{
			calls(0, 100, success), calls(9*sec, 30, failure), is(9*sec, closed, 130, 30),
			calls(10*sec, 1, failure), saw("closed>open error_percent"),
		}},
		{"with the success after old successes left the window", []step{
			calls(0, 100, success), calls(9*sec, 30, failure),
			calls(10*sec, 1, success), saw("closed>open error_percent"),
		}},
		{"with a success while failures of any age are in the window", []step{
			calls(0, 5, failure), calls(5*sec, 10, failure), calls(12*sec, 9, success), is(12*sec, closed, 19, 10),
			calls(12*sec, 1, success), saw("closed>open error_percent"),
		}},
		{"not with a success when old failures have left the window", []step{
			calls(0, 19, failure), calls(10*sec, 1, success), is(10*sec, closed, 1, 0), saw(),
		}},
		{"never with ignored results", []step{
			calls(0, 10_000, ignored), is(0, closed, 0, 0), saw(),
		}},
	} {
		t.Run(tt.name, func(t *testing.T) { play(t, config(), tt.steps...) })
	}
}

func TestSlowCalls(t *testing.T) {
	cfg := config()
	cfg.SlowPercent = 30
	t.Run("open", func(t *testing.T) {
		play(t, cfg,
			calls(0, 14, success), slowCalls(0, 5, success), is(0, closed, 19, 0),
			slowCalls(0, 1, success), saw("closed>open slow_calls"))
	})
	t.Run("open with the fast call that reaches the volume", func(t *testing.T) {
		play(t, cfg, slowCalls(0, 6, success), calls(0, 13, success), calls(0, 1, success), saw("closed>open slow_calls"))
	})
	t.Run("are failures too", func(t *testing.T) {
		play(t, cfg,
			calls(0, 18, success), slowCalls(0, 1, failure), is(0, closed, 19, 1),
			calls(0, 10, success), slowCalls(0, 10, failure), is(0, closed, 39, 11),
			slowCalls(0, 1, success), saw("closed>open slow_calls"))
	})
	t.Run("leave the window", func(t *testing.T) {
		play(t, cfg,
			calls(0, 14, success), slowCalls(0, 5, success),
			calls(10*sec, 1, success), is(10*sec, closed, 1, 0),
			slowCalls(10*sec, 5, success), calls(10*sec, 14, success), is(10*sec, closed, 20, 0), saw())
	})
	t.Run("of ignored calls are not counted", func(t *testing.T) {
		play(t, cfg, slowCalls(0, 100, ignored), is(0, closed, 0, 0), saw())
	})
	t.Run("reopen", func(t *testing.T) {
		play(t, cfg, calls(0, 20, failure), begin(5*sec, "probe"), endSlow(6*sec, "probe", success), reject(6*sec, 5*sec),
			saw("closed>open error_percent", "open>half_open sleep_window", "half_open>open probe_failure"))
	})
	t.Run("do nothing when an ignored probe was slow", func(t *testing.T) {
		play(t, cfg, calls(0, 20, failure), begin(5*sec, "probe"), endSlow(6*sec, "probe", ignored), is(6*sec, halfOpen, 0, 0))
	})
	t.Run("are not counted unless asked for", func(t *testing.T) {
		play(t, config(),
			slowCalls(0, 100, success), is(0, closed, 100, 0),
			calls(0, 100, failure), begin(5*sec, "probe"), endSlow(6*sec, "probe", success), is(6*sec, closed, 0, 0))
	})
}

func TestSleepWindow(t *testing.T) {
	play(t, config(),
		calls(1*sec, 20, failure), saw("closed>open error_percent"),
		reject(1*sec, 5*sec), reject(6*sec-ns, ns), is(6*sec-ns, open, 0, 0),
		is(6*sec, open, 0, 0), // a look does not change the state
		begin(6*sec, "probe"), is(6*sec, halfOpen, 0, 0), saw("open>half_open sleep_window"),
		end(7*sec, "probe", success), saw("half_open>closed probe_success"), is(7*sec, closed, 0, 0),
		calls(7*sec, 19, failure), is(7*sec, closed, 19, 19))
}

func TestSleepWindowDoubles(t *testing.T) {
	reopen := func(at, sleep time.Duration) step {
		return func(r *run) {
			begin(at, "probe")(r)
			end(at, "probe", failure)(r)
			reject(at, sleep)(r)
		}
	}
	cfg := config()
	cfg.MaxSleepWindow = 15 * sec
	play(t, cfg,
		calls(0, 20, failure), reject(0, 5*sec),
		reopen(5*sec, 10*sec), reopen(15*sec, 15*sec), reopen(30*sec, 15*sec),
		begin(45*sec, "probe"), end(45*sec, "probe", success), // closing resets it
		calls(45*sec, 20, failure), reject(45*sec, 5*sec), reopen(50*sec, 10*sec))
	play(t, config(), calls(0, 20, failure), reopen(5*sec, 5*sec), reopen(10*sec, 5*sec))
}

func TestProbes(t *testing.T) {
	toHalfOpen := []step{calls(0, 20, failure), saw("closed>open error_percent")} // probes from 5s on
	for _, tt := range []struct {
		name   string
		probes int
		steps  []step
	}{
		{"as many successes close as probes are allowed", 3, []step{
			begin(5*sec, "a"), begin(6*sec, "b"), begin(7*sec, "c"),
			reject(7*sec, 3*sec), // until the lease of a expires
			end(8*sec, "c", success), begin(8*sec, "d"), reject(8*sec, 2*sec),
			end(8*sec, "d", success), is(8*sec, halfOpen, 0, 0),
			end(9*sec, "a", success), is(9*sec, closed, 0, 0),
			saw("open>half_open sleep_window", "half_open>closed probe_success"),
			end(9*sec, "b", failure), is(9*sec, closed, 0, 0),
		}},
		{"one failure reopens", 3, []step{
			begin(5*sec, "a"), begin(5*sec, "b"), begin(5*sec, "c"),
			end(6*sec, "a", success), end(6*sec, "b", success), end(7*sec, "c", failure),
			reject(7*sec, 5*sec), saw("open>half_open sleep_window", "half_open>open probe_failure"),
		}},
		{"successes do not outlast a reopening", 2, []step{
			begin(5*sec, "a"), begin(5*sec, "b"), end(5*sec, "a", success), end(5*sec, "b", failure),
			begin(10*sec, "c"), end(10*sec, "c", success), is(10*sec, halfOpen, 0, 0),
		}},
		{"an expired lease lets another probe in", 1, []step{
			begin(5*sec, "a"), reject(5*sec, 5*sec), reject(10*sec-ns, ns), begin(10*sec, "b"),
			end(11*sec, "b", success), is(11*sec, closed, 0, 0),
		}},
		{"a late failure reopens", 1, []step{
			begin(5*sec, "a"), begin(10*sec, "b"), end(11*sec, "a", failure), reject(11*sec, 5*sec),
			end(12*sec, "b", success), reject(12*sec, 4*sec),
		}},
		{"twice as many without a verdict, then none until one is lost", 1, []step{
			begin(5*sec, "a"), begin(10*sec, "b"), reject(10*sec, 10*sec), reject(15*sec, 5*sec), reject(20*sec-ns, ns),
			begin(20*sec, "c"), reject(20*sec, 5*sec), // the lease of c and the loss of b
			begin(25*sec, "d"), reject(25*sec, 10*sec), // the loss of c
		}},
		{"the lease counts when it ends after the loss", 1, []step{
			begin(5*sec, "a"), begin(18*sec, "b"), reject(18*sec, 5*sec), reject(20*sec, 3*sec), begin(23*sec, "c"),
		}},
		{"a lost probe still closes", 1, []step{
			begin(5*sec, "a"), begin(10*sec, "b"), begin(20*sec, "c"), begin(25*sec, "d"), begin(35*sec, "e"),
			end(100*sec, "a", success), is(100*sec, closed, 0, 0),
		}},
		{"a lost probe still reopens", 1, []step{
			begin(5*sec, "a"), begin(10*sec, "b"), begin(20*sec, "c"), end(21*sec, "a", failure), reject(21*sec, 5*sec),
		}},
		{"an ignored one gives back a slot that has expired", 1, []step{
			begin(5*sec, "a"), begin(10*sec, "b"), reject(16*sec, 4*sec), end(16*sec, "a", ignored), begin(16*sec, "c"),
		}},
		{"an ignored lost one gives nothing back", 1, []step{
			begin(5*sec, "a"), begin(10*sec, "b"), begin(20*sec, "c"), end(21*sec, "a", ignored), reject(21*sec, 4*sec),
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := config()
			cfg.Probes = tt.probes
			play(t, cfg, append(toHalfOpen, tt.steps...)...)
		})
	}
}

func TestZeroTicket(t *testing.T) {
	play(t, config(), func(r *run) {
		for range 100 {
			r.Done(breaker.Ticket{}, 0, failure, true)
		}
	}, is(0, closed, 0, 0))
}

func TestNames(t *testing.T) {
	got := fmt.Sprint(closed, open, halfOpen, breaker.ErrorPercent, breaker.SlowCalls, breaker.SleepWindow, breaker.ProbeSuccess, breaker.ProbeFailure)
	if want := "closed open half_open error_percent slow_calls sleep_window probe_success probe_failure"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
