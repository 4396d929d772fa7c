package breaker

import (
	"sync"
	"sync/atomic"
	"time"
)

// Window is a circuit breaker over a sliding window of ten buckets, after
// M. Nygard, "Release It!" (2007), with the thresholds of Netflix's Hystrix. It
// is safe for concurrent use, holds no goroutine and no timer, and costs a call
// of a closed breaker no lock and no allocation.
//
// It opens with the result that makes requests >= RequestVolume together with
// failures >= ErrorPercent of them, or slow calls >= SlowPercent of them; a
// failure may be slow as well. As many failures in a row as Consecutive open it, too.
// A probe that is slow reopens like one that failed, when slow calls are counted at
// all (resilience4j too counts slow calls in half-open).
type Window struct {
	onTransition func(Transition)

	cfg    atomic.Pointer[Config] // replaced under mu
	period atomic.Pointer[period] // the current one; replaced under mu
	mu     sync.Mutex
}

// New returns a closed breaker. onTransition, if not nil, is called after each
// transition by the call that caused it, outside of all locks; calls for
// successive transitions may overlap.
func New(cfg Config, onTransition func(Transition)) *Window {
	w := &Window{onTransition: onTransition}
	w.cfg.Store(cfg.complete())
	w.period.Store(&period{state: Closed, width: cfg.width()})
	return w
}

// Set changes the configuration. State, results and probes are kept, and are judged by
// the new one from the next result on; only another Window begins an empty one, in
// which results of calls from before do not count. An open breaker sleeps as long as
// the new one allows.
func (w *Window) Set(cfg Config, now time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cfg.Store(cfg.complete())
	switch p := w.period.Load(); {
	case p.state == Closed && p.width != cfg.width():
		w.period.Store(&period{state: Closed, start: max(now, p.start), width: cfg.width()})
	case p.state == Open:
		w.period.Store(&period{state: Open, start: p.start, sleep: w.sleep(p.sleep)})
	}
}

// sleep is the sleep window nearest to d that the configuration allows.
func (w *Window) sleep(d time.Duration) time.Duration {
	cfg := w.cfg.Load()
	return min(max(d, cfg.SleepWindow), cfg.MaxSleepWindow)
}

func (c Config) complete() *Config {
	c.MaxSleepWindow = max(c.MaxSleepWindow, c.SleepWindow)
	return &c
}

// width is that of a bucket.
func (c *Config) width() time.Duration { return (c.Window + buckets - 1) / buckets }

// Ready implements Breaker. It changes nothing.
func (w *Window) Ready(now time.Duration) (retryAfter time.Duration, ok bool) {
	p := w.period.Load()
	switch p.state {
	case Closed:
		return 0, true
	case Open:
		retryAfter = p.sleepLeft(now)
	default:
		w.mu.Lock()
		retryAfter = w.retryAfterLocked(now)
		w.mu.Unlock()
	}
	return retryAfter, retryAfter == 0
}

// Acquire implements Breaker.
func (w *Window) Acquire(now time.Duration) (t Ticket, retryAfter time.Duration, ok bool) {
	p := w.period.Load()
	if p.state == Closed {
		return Ticket{period: p}, 0, true
	}
	if p.state == Open {
		if retryAfter = p.sleepLeft(now); retryAfter > 0 {
			return Ticket{}, retryAfter, false
		}
	}
	return w.acquireProbe(now)
}

func (w *Window) acquireProbe(now time.Duration) (t Ticket, retryAfter time.Duration, ok bool) {
	w.mu.Lock()
	if retryAfter = w.retryAfterLocked(now); retryAfter > 0 {
		w.mu.Unlock()
		return Ticket{}, retryAfter, false
	}
	var done Transition
	if w.period.Load().state == Open {
		done = w.switchLocked(now, HalfOpen, SleepWindow)
	}
	if p := w.period.Load(); p.state == HalfOpen {
		t = p.startProbeLocked(now, w.cfg.Load())
	} else {
		t = Ticket{period: p} // closed since Acquire looked
	}
	w.mu.Unlock()
	w.notify(done)
	return t, 0, true
}

// Done implements Breaker.
func (w *Window) Done(t Ticket, now time.Duration, r Result, slow bool) {
	slow = slow && w.cfg.Load().SlowPercent > 0
	switch {
	case t.Probe():
		w.verdict(t, now, r, slow)
	case t.period != nil && r.counted():
		w.record(t.period, now, r, slow)
	}
}

// record counts the result of a call that began in the closed period p.
func (w *Window) record(p *period, now time.Duration, r Result, slow bool) {
	n := p.newest.Load()
	if now-p.start >= time.Duration(n+1)*p.width {
		w.mu.Lock()
		p.advanceLocked(now)
		w.mu.Unlock()
		n = p.newest.Load()
	}
	if slow || r.failed() {
		p.markDirty(n) // first: a success that misses the mark has been counted when this is evaluated
	}
	b := &p.buckets[n%buckets]
	if r.failed() {
		b.failures.Add(1)
		p.inARow.Add(1)
	} else {
		b.successes.Add(1)
		if p.inARow.Load() > 0 {
			p.inARow.Store(0)
		}
	}
	if slow {
		b.slow.Add(1)
	}
	if n < p.dirty.Load() {
		w.evaluate(p, now)
	}
}

// evaluate opens the breaker if the window of the closed period p says so.
func (w *Window) evaluate(p *period, now time.Duration) {
	if _, tripped := p.tripped(w.cfg.Load()); !tripped {
		return
	}
	var done Transition
	w.mu.Lock()
	// Again: another call may have opened it, long ago even, or moved the window on.
	if cause, tripped := p.tripped(w.cfg.Load()); tripped && w.period.Load() == p {
		done = w.switchLocked(now, Open, cause)
	}
	w.mu.Unlock()
	w.notify(done)
}

// verdict counts the result of a probe.
func (w *Window) verdict(t Ticket, now time.Duration, r Result, slow bool) {
	var done Transition
	w.mu.Lock()
	if p := w.period.Load(); p == t.period {
		p.endProbeLocked(t.probe)
		switch {
		case !r.counted():
		case r.failed() || slow:
			done = w.switchLocked(now, Open, ProbeFailure)
		default:
			if p.successes++; p.successes >= w.cfg.Load().Probes {
				done = w.switchLocked(now, Closed, ProbeSuccess)
			}
		}
	}
	w.mu.Unlock()
	w.notify(done)
}

// Stats implements Breaker.
func (w *Window) Stats(now time.Duration) Stats {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := w.period.Load()
	var requests, failures uint64
	if p.state == Closed {
		p.advanceLocked(now)
		requests, failures, _ = p.sum()
	}
	return Stats{
		Engine:     "window",
		State:      p.state,
		Requests:   int(requests),
		Failures:   int(failures),
		RetryAfter: w.retryAfterLocked(now),
	}
}

// Idle implements Breaker.
func (w *Window) Idle(now time.Duration) bool {
	s := w.Stats(now)
	return s.State == Closed && s.Requests == 0
}

// retryAfterLocked is the time until Acquire may pass a call.
func (w *Window) retryAfterLocked(now time.Duration) time.Duration {
	switch p := w.period.Load(); p.state {
	case Open:
		return p.sleepLeft(now)
	case HalfOpen:
		return p.slotInLocked(now, w.cfg.Load())
	default:
		return 0
	}
}

// switchLocked replaces the current period.
func (w *Window) switchLocked(now time.Duration, to State, cause Cause) Transition {
	old := w.period.Load()
	p := &period{state: to, start: max(now, old.start)}
	switch to {
	case Closed:
		p.width = w.cfg.Load().width()
	case Open:
		p.sleep = w.sleep(2 * old.sleep)
	case HalfOpen:
		p.sleep = old.sleep
	}
	w.period.Store(p)
	return Transition{From: old.state, To: to, Cause: cause}
}

// notify reports a transition; the zero Transition is none.
func (w *Window) notify(t Transition) {
	if w.onTransition != nil && t.From != t.To {
		w.onTransition(t)
	}
}
