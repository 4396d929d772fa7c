package balance

import (
	"context"
	"errors"
	"testing"
)

// The rate is that of each endpoint: what finds its endpoint at the limit goes to another
// one, and only when all are it is refused, with the time to the first free one.
func TestRatePerEndpoint(t *testing.T) {
	for _, pacing := range []bool{false, true} {
		s := ejecting()
		s.Rate = &Rate{PerSecond: 100, Burst: 1, Pacing: pacing}
		if pacing {
			s.Rate.Burst = 0
		}
		m := newSim(t, s, 4, takes(ms))
		m.server["e000"] = takes(4 * ms) // the others are liked better, and full
		m.run(10*ms, sec)
		m.reset()
		m.run(2500*us, 10*sec) // 400 a second
		if part := float64(m.errs) / float64(m.calls); part > 0.02 {
			t.Errorf("pacing %v: %.3f refused at the rate of all", pacing, part)
		}
		m.wantShare("e000", 0.23, 0.27)
		m.reset()
		m.run(1250*us, 10*sec)
		if part := float64(m.errs) / float64(m.calls); part < 0.49 || part > 0.51 {
			t.Errorf("pacing %v: %.3f refused at twice the rate", pacing, part)
		}
		var limit *limitedError
		for {
			if _, err := m.call(context.Background()); errors.As(err, &limit) {
				break
			}
		}
		if limit.retryAfter <= 0 || limit.retryAfter > 10*ms {
			t.Errorf("pacing %v: again in %v", pacing, limit.retryAfter)
		}
		m.until(m.now + limit.retryAfter)
		if _, err := m.call(context.Background()); err != nil {
			t.Errorf("pacing %v: after %v: %v", pacing, limit.retryAfter, err)
		}
		if m.pool.refused.Load() == 0 {
			t.Error("refusals are not counted")
		}
	}
}

// An ejected endpoint spends no token, and does not make others refuse.
func TestRateBesideEjection(t *testing.T) {
	s := ejecting()
	s.Rate = &Rate{PerSecond: 100, Burst: 5}
	m := newSim(t, s, 2, takes(ms))
	m.failInARow("e000", 5)
	m.until(m.now + sec)
	before, _ := m.endpoint("e000").rate.Load().Stats(m.now)
	m.run(20*ms, 2*sec)
	if after, _ := m.endpoint("e000").rate.Load().Stats(m.now); m.errs > 0 || after != before {
		t.Errorf("%d errors, %v tokens, before %v", m.errs, after, before)
	}
	m.reset()
	m.run(5*ms, sec)
	if _, err := m.call(context.Background()); err != nil && err.(*limitedError).retryAfter < us {
		t.Errorf("the ejected one counts as free: %v", err.(*limitedError).retryAfter)
	}
	if m.errs < 90 || m.errs > 110 {
		t.Errorf("%d of 200 refused, want a half: only one endpoint is left", m.errs)
	}
}

func TestSetReachesRates(t *testing.T) {
	s := ejecting()
	m := newSim(t, s, 2, takes(ms))
	count := func(want int) {
		t.Helper()
		m.until(m.now + 10*sec)
		m.reset()
		m.run(ms, 10*sec)
		if served := m.calls - m.errs; served < want*95/100 || served > want*105/100 {
			t.Errorf("%d calls served, want about %d", served, want)
		}
	}
	count(10000)
	if again := m.picker.retryAfter(m.now); again != 0 { // the limits were taken away meanwhile
		t.Errorf("again in %v, though there is no limit", again)
	}
	s.Rate = &Rate{PerSecond: 100, Burst: 1}
	m.group.Set(s)
	count(2000)
	s.Rate = &Rate{PerSecond: 200, Burst: 1}
	m.group.Set(s)
	count(4000)
	s.Rate = nil
	m.group.Set(s)
	count(10000)
}
