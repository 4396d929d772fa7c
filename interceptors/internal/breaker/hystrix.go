package breaker

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/afex/hystrix-go/hystrix"
)

// Hystrix is a circuit of github.com/afex/hystrix-go: AllowRequest decides and
// ReportEvent is told of each result, so that hystrix-go's dashboards, its metric
// collectors and GetCircuit see what happens here. It costs a call no goroutine of
// its own (hystrix-go spawns one a collector for each update) and two short
// sections under one lock.
//
// Three faults of hystrix-go are made good. A success closes an open circuit,
// whichever call it belongs to: results of calls from before a transition are
// dropped, by period, as Window does. Updates are applied later, by a goroutine,
// and those still queued when the circuit closes would count in its new life and
// reopen it: it closes when the queue is empty (see closing). A probe that is
// granted to a call which another gate then refuses would be lost for a sleep
// window: it is kept for the next (see granted).
//
// What differs from Window: results are applied a few microseconds late, so that
// a call or two more may pass before it opens; a cancelled probe costs a sleep
// window; a call that says nothing about the peer is an attempt without an error,
// which counts in the request volume. hystrix-go drops updates when 2,000 are
// queued.
type Hystrix struct {
	*circuit
	onTransition func(Transition)
	onPanic      func(any)
}

// HystrixConfig is what a Hystrix is built from, in hystrix-go's terms. As in
// Config, every field must be in range.
type HystrixConfig struct {
	Name          string // of the circuit, from HystrixScope.Name
	ErrorPercent  int
	RequestVolume int
	SleepWindow   time.Duration // whole milliseconds
	Epoch         time.Time     // of the times that the methods are given

	// Only shown by hystrix-go, 0 for its defaults: this package has no timeouts and
	// no limits.
	Timeout       time.Duration
	MaxConcurrent int

	// OnPanic is told what a logger or a collector that was given to hystrix-go
	// panicked with. Not nil; called outside of all locks.
	OnPanic func(any)
}

// maxCircuits bounds the circuits of the process: hystrix-go never ends the two
// goroutines of a circuit and never frees its 20 KB.
const maxCircuits = 256

// maxPool bounds the places that hystrix-go makes for a circuit's pool, which is
// only shown.
const maxPool = 10_000

// maxQueued is how many updates may be queued for one of a refused call to be
// queued too. A collector that is slow would keep the circuit from closing.
const maxQueued = 200

var (
	errTooManyCircuits = fmt.Errorf("this process has %d hystrix circuits already, and hystrix-go cannot free one", maxCircuits)
	errForeignCircuit  = errors.New("hystrix-go had a circuit of this name before the guard was made")
)

// circuits holds the circuits of the process. A circuit outlives its Hystrix: who
// comes back to a name finds it again.
var circuits = struct {
	mu     sync.Mutex
	byName map[string]*circuit
}{byName: map[string]*circuit{}}

// NewHystrix returns the breaker of a name; onTransition as in New. Two of the
// same name are one circuit, with the configuration of the later one.
func NewHystrix(cfg HystrixConfig, onTransition func(Transition)) (*Hystrix, error) {
	circuits.mu.Lock()
	defer circuits.mu.Unlock()
	c := circuits.byName[cfg.Name]
	if c == nil && len(circuits.byName) >= maxCircuits {
		return nil, errTooManyCircuits
	}
	hystrix.ConfigureCommand(cfg.Name, hystrix.CommandConfig{
		Timeout:                int(cfg.Timeout.Milliseconds()),
		MaxConcurrentRequests:  min(cfg.MaxConcurrent, maxPool),
		RequestVolumeThreshold: cfg.RequestVolume,
		SleepWindow:            int(cfg.SleepWindow.Milliseconds()),
		ErrorPercentThreshold:  cfg.ErrorPercent,
	})
	if c == nil {
		c = &circuit{name: cfg.Name, epoch: cfg.Epoch}
		c.connectLocked(Closed)
		switch {
		case c.news.panicked != nil:
			return nil, fmt.Errorf("a collector that was given to hystrix-go panicked: %v", c.news.panicked)
		case c.feed == nil:
			return nil, errForeignCircuit
		}
		circuits.byName[cfg.Name] = c
	}
	c.sleep.Store(int64(cfg.SleepWindow))
	return &Hystrix{circuit: c, onTransition: onTransition, onPanic: cfg.OnPanic}, nil
}

// circuit is what all Hystrix of one name share.
type circuit struct {
	name  string
	epoch time.Time
	sleep atomic.Int64 // not under mu: who comes back to the name must not wait for foreign code

	period atomic.Pointer[period] // the current one; replaced under mu

	// One section under mu is AllowRequest and the look at the period, or the look
	// at the period and ReportEvent: between the two, the circuit could open or
	// close.
	mu      sync.Mutex
	hystrix *hystrix.CircuitBreaker
	feed    *feed
	resets  uint64        // of the feed, when the registry was last looked at
	sent    uint64        // applied once hystrix-go has applied all of ours
	probes  uint64        // so far
	since   time.Duration // while open: of its opening or its last probe, as far as is known
	pause   time.Duration // after its last probe, 0: none; the sleep window that hystrix-go had then
	granted bool          // hystrix-go has granted a probe and no call has taken it
	closing *call         // the probe whose success waits for the queue to be empty
	news    news
}

// news is what is to be told when mu is free.
type news struct {
	transitions []Transition
	panicked    any
}

// unlock takes the news.
func (c *circuit) unlock(n *news) {
	*n, c.news = c.news, news{}
	c.mu.Unlock()
}

// tryLocked calls hystrix-go, whose logger and collectors are foreign code: when
// one panics, the answer is no.
func (c *circuit) tryLocked(f func() bool) (yes bool) {
	defer func() {
		if p := recover(); p != nil {
			c.news.panicked = p
		}
	}()
	return f()
}

// call is one that has ended.
type call struct{ start, end time.Duration }

// connectLocked finds the circuit in hystrix-go's registry, or makes it: at first,
// and after hystrix.Flush, which ends the period: calls from before are not to
// count in the new circuit. Flush, as closing, resets the collectors: the registry
// is looked at only then, for it costs a call 70 ns.
func (c *circuit) connectLocked(state State) {
	var resets uint64
	if c.feed != nil {
		if resets = c.feed.resets.Load(); resets == c.resets {
			return
		}
	}
	current := c.hystrix
	// A collector may panic while the circuit is made; no error is ever returned.
	if !c.tryLocked(func() bool { current, _, _ = hystrix.GetCircuit(c.name); return true }) {
		return
	}
	if c.resets = resets; current != c.hystrix {
		c.hystrix, c.feed, c.sent, c.closing, c.granted, c.pause = current, feedOf(c.name), 0, nil, false, 0
		c.period.Store(&period{state: state})
	}
}

// Ready implements Breaker; it is exact: if hystrix-go would grant a probe, it is
// asked for and kept for Acquire.
func (h *Hystrix) Ready(now time.Duration) (retryAfter time.Duration, ok bool) {
	if h.period.Load().state == Closed {
		return 0, true // Acquire asks
	}
	n, retryAfter, ok := h.ready(now)
	h.tell(n)
	return retryAfter, ok
}

// Acquire implements Breaker.
func (h *Hystrix) Acquire(now time.Duration) (t Ticket, retryAfter time.Duration, ok bool) {
	n, t, retryAfter, ok := h.acquire(now)
	h.tell(n)
	return t, retryAfter, ok
}

// Done implements Breaker; hystrix-go does not know slow calls.
func (h *Hystrix) Done(t Ticket, now time.Duration, r Result, _ bool) {
	if t.period != nil {
		h.tell(h.done(t, now, r))
	}
}

// Stats implements Breaker. Requests and Failures are hystrix-go's own: what its
// queue still holds is not in them.
func (h *Hystrix) Stats(now time.Duration) Stats {
	n, s := h.stats(now)
	h.tell(n)
	return s
}

// Idle implements Breaker. It does not ask hystrix-go, and so calls nobody back: a
// circuit that is open there is found open when it is used again. One that is in use
// is not idle, and not waited for.
func (h *Hystrix) Idle(time.Duration) bool {
	if !h.mu.TryLock() {
		return false
	}
	defer h.mu.Unlock()
	requests, _ := h.feed.sums()
	return h.period.Load().state == Closed && h.closing == nil && requests == 0 && !h.queuedLocked()
}

func (h *Hystrix) tell(n news) {
	if n.panicked != nil {
		h.onPanic(n.panicked)
	}
	if h.onTransition == nil {
		return
	}
	for _, t := range n.transitions {
		h.onTransition(t)
	}
}

func (c *circuit) ready(now time.Duration) (n news, retryAfter time.Duration, ok bool) {
	c.mu.Lock()
	defer c.unlock(&n)
	c.followLocked(now)
	if c.period.Load().state == Closed || c.grantedLocked(now) {
		return n, 0, true
	}
	return n, c.refuseLocked(now), false
}

func (c *circuit) acquire(now time.Duration) (n news, t Ticket, retryAfter time.Duration, ok bool) {
	c.mu.Lock()
	defer c.unlock(&n)
	c.followLocked(now)
	switch p := c.period.Load(); {
	case c.closing != nil: // no ticket: its result is not to be queued
		return n, Ticket{}, 0, true
	case p.state == Closed:
		return n, Ticket{period: p, start: now}, 0, true
	case !c.grantedLocked(now):
		return n, Ticket{}, c.refuseLocked(now), false
	case p.state == Open:
		c.switchLocked(HalfOpen, SleepWindow)
	}
	c.granted = false
	c.since = now
	c.pause = hystrix.GetCircuitSettings()[c.name].SleepWindow // others may have set it anew
	c.probes++
	return n, Ticket{period: c.period.Load(), probe: c.probes, start: now}, 0, true
}

func (c *circuit) done(t Ticket, now time.Duration, r Result) (n news) {
	c.mu.Lock()
	defer c.unlock(&n)
	c.followLocked(now)
	switch {
	case c.period.Load() != t.period:
		return n
	case t.Probe() && r == Success:
		c.switchLocked(Closed, ProbeSuccess)
		if c.closing = (&call{t.start, now}); !c.closeLocked() {
			c.closeLater(time.Millisecond)
		}
		return n
	case t.Probe() && r.failed():
		c.switchLocked(Open, ProbeFailure)
	}
	c.reportLocked(events[r], t.start, now)
	return n
}

func (c *circuit) stats(now time.Duration) (n news, s Stats) {
	c.mu.Lock()
	defer c.unlock(&n)
	c.followLocked(now)
	s.Engine, s.State = "hystrix", c.period.Load().state
	if s.State == Closed {
		s.Requests, s.Failures = c.feed.sums()
	} else if !c.granted {
		s.RetryAfter = c.retryInLocked(now)
	}
	return n, s
}

// followLocked makes the period that of hystrix-go's circuit. It opens when it is
// asked whether it is open, by anybody: hystrix-go's own dashboard asks every
// second.
func (c *circuit) followLocked(now time.Duration) {
	c.connectLocked(c.period.Load().state)
	if c.closing != nil && !c.closeLocked() {
		return
	}
	// It is open, too, if the logger that was to be told so panicked.
	switch closed, state := c.tryLocked(func() bool { return !c.hystrix.IsOpen() }), c.period.Load().state; {
	case !closed && state == Closed:
		c.since = now
		c.switchLocked(Open, ErrorPercent)
	case closed && state != Closed: // somebody else reported a success, or flushed
		c.switchLocked(Closed, ProbeSuccess)
	}
}

// closeLocked reports the success that closes the circuit, if the queue is empty:
// what hystrix-go applies after it has closed would count in its new window. It
// says whether it has. The period is closed already; until hystrix-go is too, for
// some microseconds, calls pass and are not counted, and nothing is queued.
func (c *circuit) closeLocked() bool {
	if c.queuedLocked() {
		return false
	}
	c.reportLocked(events[Success], c.closing.start, c.closing.end)
	c.closing = nil
	return true
}

// closeLater closes the circuit if no call comes to do so: others would find it
// open for as long.
func (c *circuit) closeLater(after time.Duration) {
	time.AfterFunc(after, func() {
		c.mu.Lock()
		defer c.mu.Unlock() // the next call takes the news
		if c.closing != nil && !c.closeLocked() {
			c.closeLater(min(2*after, time.Second))
		}
	})
}

// queuedLocked reports whether hystrix-go has updates that it has not applied. (A
// collector that is told of an update is told before hystrix-go is done with it,
// but closing waits for that.) What others have queued on this circuit may be
// taken for ours.
func (c *circuit) queuedLocked() bool { return c.feed.applied.Load() < c.sent }

// grantedLocked asks hystrix-go for a probe, if there is none in hand. hystrix-go
// counts the sleep window from the grant, we from the probe, which may be later. (If
// ours is longer now than it was then, hystrix-go counts it.)
func (c *circuit) grantedLocked(now time.Duration) bool {
	slept := now >= c.since+min(c.pause, time.Duration(c.sleep.Load()))
	c.granted = c.granted || slept && c.tryLocked(c.hystrix.AllowRequest)
	return c.granted
}

// refuseLocked tells hystrix-go of a call that is refused.
func (c *circuit) refuseLocked(now time.Duration) (retryAfter time.Duration) {
	if c.sent < c.feed.applied.Load()+maxQueued {
		c.reportLocked("short-circuit", now, now)
	}
	return c.retryInLocked(now)
}

// retryInLocked is never 0: hystrix-go does not say when it opened, and another
// may have been granted the probe.
func (c *circuit) retryInLocked(now time.Duration) time.Duration {
	return max(c.since+time.Duration(c.sleep.Load())-now, time.Millisecond)
}

// events are hystrix-go's words. It counts a word that it does not know as an
// attempt.
var events = [...]string{
	Ignored:  "neutral",
	Success:  "success",
	Failure:  "failure",
	Timeout:  "timeout",
	Canceled: "context_canceled",
	Expired:  "context_deadline_exceeded",
}

// reportLocked queues an update; hystrix-go drops it if 2,000 are queued. Those of
// others that were applied before are as if we had sent them.
func (c *circuit) reportLocked(event string, start, now time.Duration) {
	applied := c.feed.applied.Load()
	if c.tryLocked(func() bool { return c.hystrix.ReportEvent([]string{event}, c.epoch.Add(start), now-start) == nil }) {
		c.sent = max(c.sent, applied) + 1
	}
}

func (c *circuit) switchLocked(to State, cause Cause) {
	from := c.period.Load().state
	c.granted = false
	if to == Closed {
		c.pause = 0
	}
	c.period.Store(&period{state: to})
	c.news.transitions = append(c.news.transitions, Transition{From: from, To: to, Cause: cause})
}
