package balance

import (
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
)

// ejection is the breaker of an endpoint and whether it is heeded. A breaker that opens
// when too many endpoints are ejected already is not.
type ejection struct {
	breaker  *breaker.Window                         // nil: there is none; guarded by pool.mu, see pool.arm
	ejected  bool                                    // guarded by pool.mu
	told     bool                                    // that it was ejected, and not yet that it is back; guarded by pool.mu
	returned time.Duration                           // when it was brought back last; guarded by pool.mu
	streak   uint                                    // ejections that followed soon on the one before; guarded by pool.mu
	causes   [breaker.ConsecutiveFailures + 1]uint64 // ejections; guarded by pool.mu
}

// gate is what a pick sees of an ejection. It is replaced, and does not change.
type gate struct {
	breaker *breaker.Window // nil: there is none
	ejected bool
}

// openGate is that of an endpoint without a breaker.
var openGate = &gate{}

// set gives living endpoints other parameters.
func (p *pool) set(s *Settings) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, e := range p.endpoints.All() {
		p.armLocked(e, s)
	}
	p.reviewLocked(s, nil)
}

// armLocked gives an endpoint the breaker and the rate limit of the settings.
func (p *pool) armLocked(e *endpoint, s *Settings) {
	switch r := e.rate.Load(); {
	case s.Rate == nil:
		e.rate.Store(nil)
	case r == nil:
		e.rate.Store(s.Rate.limit())
	case *s.Rate != *e.limit:
		r.Become(s.Rate.limit(), p.group.hooks.Now())
	}
	e.limit = s.Rate
	x := &e.ejection
	switch {
	case s.Breaker == nil:
		x.breaker, x.ejected = nil, false // together: picks ask the breaker of who is ejected
	case x.breaker == nil:
		x.breaker = breaker.New(*s.Breaker, func(tr breaker.Transition) { p.changed(e, tr) })
	default:
		x.breaker.Set(x.config(s), p.group.hooks.Now())
	}
	e.gate.Store(&gate{breaker: x.breaker, ejected: x.ejected})
}

// config lets an endpoint that does not stay well sleep longer.
func (x *ejection) config(s *Settings) breaker.Config {
	c := *s.Breaker
	for range x.streak {
		c.SleepWindow = min(2*c.SleepWindow, max(c.MaxSleepWindow, s.Breaker.SleepWindow))
	}
	return c
}

// changed is called after the breaker of an endpoint has made a transition, without any
// lock, and perhaps after the next one: what counts is the state that it is in.
func (p *pool) changed(e *endpoint, tr breaker.Transition) {
	s, now := p.group.settings.Load(), p.group.hooks.Now()
	news := Ejection{Target: p.target, Address: e.address, Cause: tr.Cause}
	p.mu.Lock()
	x := &e.ejection
	p.reviewLocked(s, e)
	news.Ejected = x.ejected
	if x.breaker != nil && x.ejected && tr.To == breaker.Open {
		if tr.From == breaker.Closed {
			if x.streak++; x.returned == 0 || now-x.returned > s.Breaker.MaxSleepWindow {
				x.streak = 0
			}
			c := x.config(s)
			exact := c
			exact.MaxSleepWindow = c.SleepWindow // this time it is neither more nor less
			x.breaker.Set(exact, now)
			x.breaker.Set(c, now)
		}
		x.causes[tr.Cause]++
		x.told, news.For = true, x.breaker.Stats(now).RetryAfter
	}
	// The review of another one's change may have brought it back before.
	back := x.told && !x.ejected
	if back {
		x.told, x.returned = false, max(now, 1)
		e.forget()
	}
	p.mu.Unlock()
	if news.For > 0 || back {
		p.group.hooks.Ejected(news)
	}
}

// reviewLocked decides which endpoints are ejected: those that are and whose breaker is
// still not closed, as many as may be, and then the one that has just changed.
func (p *pool) reviewLocked(s *Settings, changed *endpoint) {
	now := p.group.hooks.Now()
	allowed, ejected, usable := p.endpoints.Len()*s.MaxEjectionPercent/100, 0, 0
	decide := func(e *endpoint, candidate bool) {
		x := &e.ejection
		is := candidate && ejected < allowed && x.breaker != nil && x.breaker.Stats(now).State != breaker.Closed
		if is {
			ejected++
		}
		if is != x.ejected {
			x.ejected = is
			e.gate.Store(&gate{breaker: x.breaker, ejected: is})
		}
	}
	listed := false
	for _, e := range p.endpoints.All() {
		listed = listed || e == changed
		if e != changed || e.ejection.ejected {
			decide(e, e.ejection.ejected)
		}
	}
	if listed && !changed.ejection.ejected {
		decide(changed, true)
	}
	for _, e := range p.endpoints.All() {
		if e.ready && !e.ejection.ejected {
			usable++
		}
	}
	p.ejects.Store(ejected > 0)
	p.panics.Store(usable == 0 || usable*100 < s.PanicThreshold*p.endpoints.Len())
}

// verdict is what becomes of an attempt to call at an endpoint.
type verdict uint8

const (
	admitted verdict = iota
	ejected
	limited
)

// admit asks the endpoint's breaker and its rate limit. The breaker is looked at first
// and asked last: what is not admitted spends nothing. One that is open and not heeded
// does not hear of the attempt.
func (p *pool) admit(e *endpoint, now time.Duration) (t breaker.Ticket, v verdict) {
	g := e.gate.Load()
	heeded := g.ejected && !p.panics.Load()
	if heeded {
		if _, ok := g.breaker.Ready(now); !ok {
			return t, ejected
		}
	}
	if r := e.rate.Load(); r != nil && !r.Take(now) {
		return t, limited
	}
	if g.breaker != nil {
		var ok bool
		if t, _, ok = g.breaker.Acquire(now); !ok && heeded {
			return t, ejected
		}
	}
	return t, admitted
}

// due reports whether the endpoint is ejected and has slept: the next call is to find out
// how it is, whatever it would cost.
func (e *endpoint) due(now time.Duration) bool {
	g := e.gate.Load()
	if !g.ejected {
		return false
	}
	_, ok := g.breaker.Ready(now)
	return ok
}
