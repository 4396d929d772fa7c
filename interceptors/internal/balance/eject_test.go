package balance

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
)

func ejecting() Settings {
	s := settings()
	s.Breaker = &breaker.Config{
		Consecutive: 5, ErrorPercent: 50, RequestVolume: 20, Probes: 1, Window: 10 * sec,
		SleepWindow: 5 * sec, MaxSleepWindow: 60 * sec, Lease: 5 * sec, SlowPercent: 50,
	}
	s.LatencyFactor, s.MaxEjectionPercent, s.PanicThreshold = 5, 50, 30
	return s
}

// ejected are the addresses of the endpoints that are.
func (m *sim) ejected() (names []string) {
	for _, e := range m.pool.endpoints.All() {
		if e.gate.Load().ejected {
			names = append(names, e.address)
		}
	}
	slices.Sort(names)
	return names
}

// failInARow ends n attempts at an endpoint with a failure.
func (m *sim) failInARow(name string, n int) {
	e := m.endpoint(name)
	for range n {
		t, v := m.pool.admit(e, m.now)
		if v != admitted {
			m.Fatalf("%s admits nobody", name)
		}
		e.settle(t, m.now, breaker.Failure, false)
	}
}

func TestConsecutiveFailuresEject(t *testing.T) {
	for _, n := range []int{2, 10, 200} {
		m := newSim(t, ejecting(), n, takes(10*ms))
		m.run(ms, 2*sec)
		m.server["e000"] = fails(errDown)
		m.failInARow("e000", 4)
		if m.ejected() != nil {
			t.Fatal("ejected after four failures")
		}
		m.failInARow("e000", 1)
		if got := m.ejected(); !slices.Equal(got, []string{"e000"}) {
			t.Fatalf("of %d are ejected: %v", n, got)
		}
		m.until(m.now + sec)
		m.reset()
		m.run(ms, 3900*ms)
		m.wantShare("e000", 0, 0)
		m.run(ms, 2*sec) // one probe, which fails
		if m.took["e000"] != 1 || m.errs != 1 {
			t.Errorf("%d probes, %d errors", m.took["e000"], m.errs)
		}
		m.run(ms, 7*sec)
		m.server["e000"] = takes(10 * ms)
		m.run(ms, 3*sec+5*sec) // what is left of 10s, and 5s
		m.reset()
		m.run(ms, 20*sec)
		m.wantShare("e000", 0.8/float64(n), 1)
		if want := []string{"e000 true 5s", "e000 true 10s", "e000 false 0s"}; !slices.Equal(m.news, want) {
			t.Errorf("news %q, want %q", m.news, want)
		}
	}
}

// A probe comes when it is time, and a return is to a full share, whatever is remembered of
// the endpoint.
func TestReturnIsToAFullShare(t *testing.T) {
	s := ejecting()
	s.Decay = time.Hour
	m := newSim(t, s, 10, takes(10*ms))
	m.run(ms, 2*sec)
	m.failInARow("e000", 5)
	m.until(m.now + 5*sec)
	store(&m.endpoint("e000").peak, float64(10*sec)) // it was slow
	m.reset()
	m.run(ms, 100*ms)
	if m.took["e000"] == 0 {
		t.Error("no probe")
	}
	m.reset()
	m.run(ms, 10*sec)
	m.wantShare("e000", 0.08, 0.12)
}

func TestErrorPercentEjects(t *testing.T) {
	m := newSim(t, ejecting(), 10, takes(10*ms))
	flip := false
	m.server["e000"] = func(time.Duration) (time.Duration, error) {
		if flip = !flip; flip {
			return 10 * ms, errDown
		}
		return 10 * ms, nil
	}
	for i := range 20 {
		if m.ejected() != nil {
			t.Fatalf("ejected after %d", i)
		}
		e := m.endpoint("e000")
		ticket, _ := m.pool.admit(e, m.now)
		result := breaker.Success
		if i%2 == 0 {
			result = breaker.Failure
		}
		e.settle(ticket, m.now, result, false)
	}
	e := m.endpoint("e000")
	ticket, _ := m.pool.admit(e, m.now)
	e.settle(ticket, m.now, breaker.Failure, false)
	if m.ejected() == nil || e.ejection.causes[breaker.ErrorPercent] != 1 {
		t.Errorf("ejected: %v, by %v", m.ejected(), e.ejection.causes)
	}
}

// Who takes five times as long as the median is slow; if all do, nobody is.
func TestLatencyEjects(t *testing.T) {
	s := ejecting()
	s.Decay, s.Breaker.Window, s.Breaker.RequestVolume = 100*ms, sec, 3
	for _, n := range []int{2, 10} {
		m := newSim(t, s, n, takes(10*ms))
		m.run(ms, 2*sec)
		m.server["e000"] = takes(60 * ms)
		m.run(ms, 10*sec)
		if got := m.ejected(); !slices.Equal(got, []string{"e000"}) || m.endpoint("e000").ejection.causes[breaker.SlowCalls] == 0 {
			t.Errorf("of %d are ejected: %v, news %q", n, got, m.news)
		}
	}
	m := newSim(t, s, 10, takes(10*ms))
	m.run(ms, 2*sec)
	for _, name := range m.list {
		m.server[name] = takes(30 * ms)
	}
	m.run(ms, 2*sec)
	for _, name := range m.list {
		m.server[name] = takes(100 * ms)
	}
	m.run(ms, 10*sec)
	if len(m.news) > 0 {
		t.Errorf("all are slow: %q", m.news)
	}
}

// No more than the percentage is ejected, rounded down, however many fail.
func TestMaxEjectionPercent(t *testing.T) {
	for _, c := range []struct{ n, percent, most int }{
		{1, 50, 0}, {2, 50, 1}, {3, 50, 1}, {10, 50, 5}, {10, 0, 0}, {10, 19, 1}, {10, 100, 10}, {200, 50, 100},
	} {
		s := ejecting()
		s.MaxEjectionPercent = c.percent
		m := newSim(t, s, c.n, fails(errDown))
		for _, name := range m.list {
			m.failInARow(name, 5)
		}
		if got := len(m.ejected()); got != c.most {
			t.Errorf("of %d, %d%%: %d are ejected, want %d", c.n, c.percent, got, c.most)
		}
		// Ejected ones that go make room for others no sooner than those fail again; a list that gets
		// shorter takes ejections back.
		m.resolve(m.list[:(c.n+1)/2]...)
		if got, most := len(m.ejected()), (c.n+1)/2*c.percent/100; got > most {
			t.Errorf("of %d that are left %d are ejected, want at most %d", (c.n+1)/2, got, most)
		}
		// All fail and all that may be are ejected: calls still go somewhere, and when all heal all
		// are back.
		m.run(10*ms, 10*sec)
		for _, name := range m.list {
			m.server[name] = takes(10 * ms)
		}
		m.run(10*ms, 120*sec)
		m.reset()
		m.run(10*ms, 10*sec)
		if m.errs > 0 || len(m.ejected()) > 0 {
			t.Errorf("%d of %d healed ones are still ejected, %d errors", len(m.ejected()), c.n, m.errs)
		}
	}
}

// The calls of those that are ejected go to all others, whatever their place in the list.
func TestCallsOfEjectedOnesAreSpread(t *testing.T) {
	m := newSim(t, ejecting(), 10, takes(10*ms))
	m.run(ms, 2*sec)
	for _, name := range m.list[:5] {
		m.failInARow(name, 5)
	}
	m.reset()
	m.run(ms, 4900*ms)
	for _, name := range m.list[5:] {
		m.wantShare(name, 0.15, 0.25)
	}
}

// Whose ejection was told is told to be back, also when it had to be taken back before,
// because the list got shorter.
func TestReturnsAreTold(t *testing.T) {
	m := newSim(t, ejecting(), 4, takes(10*ms))
	m.run(ms, sec)
	m.failInARow("e000", 5)
	m.failInARow("e001", 5)
	m.resolve("e000", "e001")
	if n := len(m.ejected()); n != 1 {
		t.Fatalf("%d of 2 are ejected", n)
	}
	m.run(ms, 20*sec)
	slices.Sort(m.news)
	if want := []string{"e000 false 0s", "e000 true 5s", "e001 false 0s", "e001 true 5s"}; !slices.Equal(m.news, want) {
		t.Errorf("news: %q, want %q", m.news, want)
	}
}

// With too few that are connected and not ejected, all are used.
func TestPanic(t *testing.T) {
	m := newSim(t, ejecting(), 4, takes(10*ms))
	m.run(ms, sec)
	m.failInARow("e000", 5)
	m.failInARow("e001", 5)
	m.reset()
	m.run(ms, sec)
	if m.took["e000"]+m.took["e001"] > 0 {
		t.Error("ejected endpoints are used while half of all are there")
	}
	m.server["e002"] = nil
	m.connect()
	m.reset()
	m.run(ms, sec)
	m.wantShare("e000", 0.2, 0.5)
	m.wantShare("e003", 0.2, 0.5)
	m.server["e003"] = nil // none at all is usable
	m.connect()
	m.reset()
	m.run(ms, sec)
	m.wantShare("e000", 0.3, 0.7)
	m.server["e002"], m.server["e003"] = takes(10*ms), takes(10*ms)
	m.connect()
	m.reset()
	m.run(ms, sec)
	if m.took["e000"]+m.took["e001"] > 0 {
		t.Error("ejected endpoints are used after the panic")
	}
}

// An endpoint that returns and fails again soon is ejected for longer, up to the most;
// one that stays well for that long begins anew.
func TestEjectionsGrow(t *testing.T) {
	m := newSim(t, ejecting(), 10, takes(10*ms))
	m.run(ms, sec)
	for range 6 {
		m.failInARow("e000", 5)
		for m.ejected() != nil {
			m.run(10*ms, sec)
		}
	}
	m.run(10*ms, 61*sec)
	m.failInARow("e000", 5)
	var got []string
	for _, n := range m.news {
		var name, for_ string
		var ejected bool
		if _, _ = fmt.Sscan(n, &name, &ejected, &for_); ejected {
			got = append(got, for_)
		}
	}
	if want := []string{"5s", "10s", "20s", "40s", "1m0s", "1m0s", "5s"}; !slices.Equal(got, want) {
		t.Errorf("ejected for %v, want %v", got, want)
	}
}

// Parameters reach living endpoints.
func TestSetReachesBreakers(t *testing.T) {
	m := newSim(t, ejecting(), 4, takes(10*ms))
	m.run(ms, sec)
	m.failInARow("e000", 5)
	m.failInARow("e001", 5)
	s := ejecting()
	s.MaxEjectionPercent = 25
	m.group.Set(s)
	if len(m.ejected()) != 1 {
		t.Errorf("ejected: %v", m.ejected())
	}
	s.Breaker = nil
	m.group.Set(s)
	if len(m.ejected()) != 0 {
		t.Errorf("without a breaker: %v", m.ejected())
	}
	m.failInARow("e000", 50)
	s = ejecting()
	s.Breaker.Consecutive = 2
	m.group.Set(s)
	m.failInARow("e000", 2)
	if len(m.ejected()) != 1 {
		t.Errorf("with a breaker again: %v", m.ejected())
	}
}

// Breakers can be switched off while calls look at them: an endpoint without one is never
// an ejected one.
func TestSwitchOffWhileEjected(t *testing.T) {
	m := newSim(t, ejecting(), 4, takes(10*ms))
	m.run(ms, sec)
	m.failInARow("e000", 5)
	s := ejecting()
	s.Breaker = nil
	e := m.endpoint("e000")
	m.pool.mu.Lock()
	m.pool.armLocked(e, &s) // and before the review that follows
	m.pool.mu.Unlock()
	if _, v := m.pool.admit(e, m.now); v != admitted || e.due(m.now) {
		t.Errorf("admit says %v", v)
	}
}

// Neither a rejection nor a neutral end ejects.
func TestRejectionsDoNotEject(t *testing.T) {
	m := newSim(t, ejecting(), 2, fails(errFull))
	m.run(ms, 10*sec)
	m.server["e000"], m.server["e001"] = fails(context.Canceled), fails(context.Canceled)
	m.run(ms, 10*sec)
	if len(m.news) > 0 {
		t.Errorf("news: %q", m.news)
	}
}
