package breaker

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/afex/hystrix-go/hystrix"
	metriccollector "github.com/afex/hystrix-go/hystrix/metric_collector"
	"github.com/afex/hystrix-go/hystrix/rolling"
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
}

// maxCircuits bounds the circuits of the process: hystrix-go never ends the two
// goroutines of a circuit and never frees its 20 KB.
const maxCircuits = 256

// maxPool bounds the places that hystrix-go makes for a circuit's pool, which is
// only shown.
const maxPool = 10_000

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
		if c.connectLocked(Closed); c.feed == nil {
			return nil, errForeignCircuit
		}
		circuits.byName[cfg.Name] = c
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sleep = cfg.SleepWindow
	return &Hystrix{circuit: c, onTransition: onTransition}, nil
}

// circuit is what all Hystrix of one name share.
type circuit struct {
	name  string
	epoch time.Time

	period atomic.Pointer[period] // the current one; replaced under mu

	// One section under mu is AllowRequest and the look at the period, or the look
	// at the period and ReportEvent: between the two, the circuit could open or
	// close.
	mu      sync.Mutex
	hystrix *hystrix.CircuitBreaker
	feed    *feed
	sleep   time.Duration
	sent    uint64        // applied once hystrix-go has applied all of ours
	probes  uint64        // so far
	retryAt time.Duration // while open: when hystrix-go grants the next probe, as far as is known
	granted bool          // hystrix-go has granted a probe and no call has taken it
	closing *call         // the probe whose success waits for the queue to be empty
}

// call is one that has ended.
type call struct{ start, end time.Duration }

// connectLocked finds the circuit in hystrix-go's registry, or makes it: at first,
// and after hystrix.Flush, which ends the period: calls from before are not to
// count in the new circuit. (Done does not look, for 40 ns: before the next call
// comes, results go to the old one.)
func (c *circuit) connectLocked(state State) {
	if current, _, _ := hystrix.GetCircuit(c.name); current != c.hystrix { // it never fails
		c.hystrix, c.feed, c.sent, c.closing, c.granted = current, feedOf(c.name), 0, nil, false
		c.period.Store(&period{state: state})
	}
}

// Ready implements Breaker; it is exact: if hystrix-go would grant a probe, it is
// asked for and kept for Acquire.
func (h *Hystrix) Ready(now time.Duration) (retryAfter time.Duration, ok bool) {
	if h.period.Load().state == Closed {
		return 0, true // Acquire asks
	}
	changed, retryAfter, ok := h.ready(now)
	h.notify(changed)
	return retryAfter, ok
}

// Acquire implements Breaker.
func (h *Hystrix) Acquire(now time.Duration) (t Ticket, retryAfter time.Duration, ok bool) {
	changed, t, retryAfter, ok := h.acquire(now)
	h.notify(changed)
	return t, retryAfter, ok
}

// Done implements Breaker; hystrix-go does not know slow calls.
func (h *Hystrix) Done(t Ticket, now time.Duration, r Result, _ bool) {
	if t.period != nil {
		h.notify(h.done(t, now, r))
	}
}

// Stats implements Breaker. Requests and Failures are hystrix-go's own: what its
// queue still holds is not in them.
func (h *Hystrix) Stats(now time.Duration) Stats {
	changed, s := h.stats(now)
	h.notify(changed)
	return s
}

// Idle implements Breaker. It does not ask hystrix-go, and so calls nobody back: a
// circuit that is open there is found open when it is used again.
func (h *Hystrix) Idle(time.Duration) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	requests, _ := h.feed.sums()
	return h.period.Load().state == Closed && h.closing == nil && requests == 0 && !h.queuedLocked()
}

func (h *Hystrix) notify(changed []Transition) {
	if h.onTransition == nil {
		return
	}
	for _, t := range changed {
		h.onTransition(t)
	}
}

// These four hold mu to their end, also when a logger that was given to hystrix-go
// panics.

func (c *circuit) ready(now time.Duration) (changed []Transition, retryAfter time.Duration, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.connectLocked(c.period.Load().state)
	changed = c.followLocked(now)
	if c.period.Load().state == Closed || c.grantedLocked(now) {
		return changed, 0, true
	}
	return changed, c.refuseLocked(now), false
}

func (c *circuit) acquire(now time.Duration) (changed []Transition, t Ticket, retryAfter time.Duration, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.connectLocked(c.period.Load().state)
	changed = c.followLocked(now)
	switch p := c.period.Load(); {
	case c.closing != nil: // no ticket: its result is not to be queued
		return changed, Ticket{}, 0, true
	case p.state == Closed:
		return changed, Ticket{period: p, start: now}, 0, true
	case !c.grantedLocked(now):
		return changed, Ticket{}, c.refuseLocked(now), false
	case p.state == Open:
		changed = append(changed, c.switchLocked(HalfOpen, SleepWindow))
	}
	c.granted = false
	c.probes++
	return changed, Ticket{period: c.period.Load(), probe: c.probes, start: now}, 0, true
}

func (c *circuit) done(t Ticket, now time.Duration, r Result) (changed []Transition) {
	c.mu.Lock()
	defer c.mu.Unlock()
	changed = c.followLocked(now)
	switch {
	case c.period.Load() != t.period:
		return changed
	case t.Probe() && r == Success:
		changed = append(changed, c.switchLocked(Closed, ProbeSuccess))
		if c.closing = (&call{t.start, now}); !c.closeLocked() {
			c.closeLater(time.Millisecond)
		}
		return changed
	case t.Probe() && r.failed():
		changed = append(changed, c.switchLocked(Open, ProbeFailure))
	}
	c.reportLocked(events[r], t.start, now)
	return changed
}

func (c *circuit) stats(now time.Duration) (changed []Transition, s Stats) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.connectLocked(c.period.Load().state)
	changed = c.followLocked(now)
	s.Engine, s.State = "hystrix", c.period.Load().state
	if s.State == Closed {
		s.Requests, s.Failures = c.feed.sums()
	} else if !c.granted {
		s.RetryAfter = c.retryInLocked(now)
	}
	return changed, s
}

// followLocked makes the period that of hystrix-go's circuit. It opens when it is
// asked whether it is open, by anybody: hystrix-go's own dashboard asks every
// second.
func (c *circuit) followLocked(now time.Duration) []Transition {
	if c.closing != nil && !c.closeLocked() {
		return nil
	}
	switch open, state := c.hystrix.IsOpen(), c.period.Load().state; {
	case open && state == Closed:
		c.retryAt = now + c.sleep
		return []Transition{c.switchLocked(Open, ErrorPercent)}
	case !open && state != Closed: // somebody else reported a success, or flushed
		return []Transition{c.switchLocked(Closed, ProbeSuccess)}
	}
	return nil
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
		defer c.mu.Unlock()
		defer func() { _ = recover() }() // of hystrix-go's logger: it meets the next call again
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

// grantedLocked asks hystrix-go for a probe, if there is none in hand. One that is
// older than a sleep window is asked for again: if it fails, hystrix-go counts the
// sleep window from the grant.
func (c *circuit) grantedLocked(now time.Duration) bool {
	if c.granted && now <= c.retryAt {
		return true
	}
	if c.granted = c.hystrix.AllowRequest(); c.granted {
		c.retryAt = now + c.sleep
	}
	return c.granted
}

// refuseLocked tells hystrix-go of a call that is refused.
func (c *circuit) refuseLocked(now time.Duration) (retryAfter time.Duration) {
	c.reportLocked("short-circuit", now, now)
	return c.retryInLocked(now)
}

// retryInLocked is never 0: hystrix-go does not say when it opened, and another
// may have been granted the probe.
func (c *circuit) retryInLocked(now time.Duration) time.Duration {
	return max(c.retryAt-now, time.Millisecond)
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
	if c.hystrix.ReportEvent([]string{event}, c.epoch.Add(start), now-start) == nil {
		c.sent = max(c.sent, applied) + 1
	}
}

func (c *circuit) switchLocked(to State, cause Cause) Transition {
	from := c.period.Load().state
	c.granted = false
	c.period.Store(&period{state: to})
	return Transition{From: from, To: to, Cause: cause}
}

// HystrixScope is the name space of a guard in hystrix-go's registry, which is
// the process's.
type HystrixScope uint64

var (
	scopes atomic.Uint64
	feeds  sync.Map // of *feed, by circuit; filled by hystrix-go under its locks, so no lock of ours
	listen = sync.OnceFunc(func() { metriccollector.Registry.Register(newFeed) })
)

// NewHystrixScope returns a name space that no other has. Circuits that are made
// from now on tell us what they apply.
func NewHystrixScope() HystrixScope {
	listen()
	return HystrixScope(scopes.Add(1))
}

const namePrefix = "grpc"

// Name is that of a method's circuit: "grpc.client/TARGET/pkg.Service/Method",
// "grpc.server/pkg.Service/Method", with grpc2 in place of grpc in the second
// scope, and so on.
func (s HystrixScope) Name(side, target, method string) string {
	number := ""
	if s > 1 {
		number = strconv.FormatUint(uint64(s), 10)
	}
	if target != "" {
		target = "/" + target
	}
	return namePrefix + number + "." + side + target + method
}

// feed hears what hystrix-go applies to a circuit, beside its own collector: the
// same numbers, which that one does not show.
type feed struct {
	applied atomic.Uint64

	mu               sync.Mutex // guards the pointers
	requests, errors *rolling.Number
}

func newFeed(name string) metriccollector.MetricCollector {
	if !strings.HasPrefix(name, namePrefix) {
		return deaf{}
	}
	f := new(feed)
	f.Reset()
	feeds.Store(name, f)
	return f
}

func feedOf(name string) *feed {
	f, _ := feeds.Load(name)
	found, _ := f.(*feed)
	return found
}

// Update implements metriccollector.MetricCollector.
func (f *feed) Update(r metriccollector.MetricResult) {
	f.mu.Lock()
	f.requests.Increment(r.Attempts)
	f.errors.Increment(r.Errors)
	f.mu.Unlock()
	f.applied.Add(1)
}

// Reset implements metriccollector.MetricCollector.
func (f *feed) Reset() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.requests, f.errors = rolling.NewNumber(), rolling.NewNumber()
}

func (f *feed) sums() (requests, errors int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	return int(f.requests.Sum(now)), int(f.errors.Sum(now))
}

// deaf is for the circuits of others.
type deaf struct{}

func (deaf) Update(metriccollector.MetricResult) {}
func (deaf) Reset()                              {}
