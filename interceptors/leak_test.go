package interceptors_test

import (
	"log/slog"
	"testing"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// mustGuard makes a guard of a policy in YAML. It logs nothing, unless opts say
// otherwise, and is closed when the test ends.
func mustGuard(t testing.TB, yaml string, opts ...interceptors.Option) *interceptors.Guard {
	t.Helper()
	p, err := interceptors.Parse("policy.yaml", []byte(yaml))
	if err != nil {
		t.Fatal(err)
	}
	quiet := interceptors.WithLogger(slog.New(slog.DiscardHandler))
	guard, err := interceptors.New(p, append([]interceptors.Option{quiet}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := guard.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return guard
}

// checkIdle is the check for leaked permits: no call is in flight, queued or
// waiting, and every admitted call has had exactly one outcome.
func checkIdle(t testing.TB, guard *interceptors.Guard) {
	t.Helper()
	s := guard.Snapshot()
	if s.Drain.InFlight != 0 {
		t.Errorf("%d calls are still being handled", s.Drain.InFlight)
	}
	for _, m := range s.Methods {
		if l := m.ConcurrencyLimit; l != nil && (l.InFlight != 0 || l.Streams != 0 || l.Queued != 0) {
			t.Errorf("%v %s: %+v, want nothing in flight or queued", m.Side, m.Method, *l)
		}
		if r := m.RateLimit; r != nil && r.Waiting != 0 {
			t.Errorf("%v %s: %d calls wait for a token", m.Side, m.Method, r.Waiting)
		}
		c := m.Counts
		if ended := c.Success + c.Failure + c.Neutral + c.Dropped; ended != c.Admitted {
			t.Errorf("%v %s: %d admitted, %d ended: %+v", m.Side, m.Method, c.Admitted, ended, c)
		}
	}
}

// gatesOf is the snapshot of the only method of a name on a side; zero if it was
// never called.
func gatesOf(t testing.TB, guard *interceptors.Guard, side interceptors.Side, method string) interceptors.MethodSnapshot {
	t.Helper()
	var found []interceptors.MethodSnapshot
	for _, m := range guard.Snapshot().Methods {
		if m.Side == side && m.Method == method {
			found = append(found, m)
		}
	}
	switch len(found) {
	case 0:
		return interceptors.MethodSnapshot{}
	case 1:
		return found[0]
	}
	t.Fatalf("%d targets have %s", len(found), method)
	return interceptors.MethodSnapshot{}
}

// ended is how many calls had each outcome.
type ended struct{ success, failure, neutral, dropped uint64 }

// wantEnded checks the outcomes of a method, and that none of its calls is left.
func wantEnded(t testing.TB, guard *interceptors.Guard, side interceptors.Side, method string, want ended) {
	t.Helper()
	c := gatesOf(t, guard, side, method).Counts
	if got := (ended{c.Success, c.Failure, c.Neutral, c.Dropped}); got != want {
		t.Errorf("%v %s ended %+v, want %+v", side, method, got, want)
	}
	checkIdle(t, guard)
}

// wantState checks the state of a method's breaker.
func wantState(t testing.TB, guard *interceptors.Guard, side interceptors.Side, method, want string) {
	t.Helper()
	b := gatesOf(t, guard, side, method).Breaker
	switch {
	case b == nil:
		t.Fatalf("%v %s has no breaker", side, method)
	case b.State != want:
		t.Fatalf("the breaker of %v %s is %s, want %s", side, method, b.State, want)
	}
}
