package balance

import (
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/resolver"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/limiter"
)

// endpoint is the state of one endpoint. Picks read it without a lock.
type endpoint struct {
	address string
	old     bool         // was in the channel's first list: no slow start
	ready   bool         // has a connection; guarded by pool.mu
	begun   atomic.Int64 // when it first had a connection; 0: not yet

	ejection ejection
	gate     atomic.Pointer[gate]         // for picks
	rate     atomic.Pointer[limiter.Rate] // nil: there is no limit
	limit    *Rate                        // that rate was made from; guarded by pool.mu

	inFlight atomic.Int64
	failing  atomic.Bool // the attempt that ended last did not succeed

	// The peak-EWMA of its latency in nanoseconds, and when that was; written under mu. A
	// reader may see a new one with an old time: it has then faded a little too much.
	peak  atomic.Uint64 // bits of a float64; 0: nothing is known
	since atomic.Int64
	mu    sync.Mutex
	mean  atomic.Uint64 // bits of a float64: the EWMA of successful calls, for people and as a measure for others
}

func newEndpoint(r resolver.Endpoint, old bool) *endpoint {
	names := make([]string, len(r.Addresses))
	for i, a := range r.Addresses {
		names[i] = a.Addr
	}
	e := &endpoint{address: strings.Join(names, ","), old: old}
	e.gate.Store(openGate)
	return e
}

// observe takes the latency of an attempt that succeeded, in the way of Finagle's
// PeakEwma (com.twitter.finagle.loadbalancer.PeakEwma): a longer one counts at once, a
// shorter one by the time since the last one, 1 - exp(-t/decay). Not so Finagle: it counts
// for no more than twice what was there, or one call that takes a second, as some do
// anywhere, would keep its endpoint idle for many.
func (e *endpoint) observe(now, latency, decay time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	v, old := float64(max(latency, 1)), load(&e.peak)
	if e.failing.Load() { // old is a penalty, and this its end
		old = 0
		e.failing.Store(false)
	}
	keep := fade(now-time.Duration(e.since.Load()), decay)
	if mean := load(&e.mean); mean > 0 {
		store(&e.mean, mean*keep+v*(1-keep))
	} else {
		store(&e.mean, v)
	}
	switch {
	case v < old:
		v = old*keep + v*(1-keep)
	case old > 0:
		v = min(v, 2*old)
	}
	store(&e.peak, v)
	e.since.Store(int64(now))
}

// exceed takes an attempt that ended without an answer after a time: the latency is longer.
// Without that, who never answers would look idle, and be asked for it.
func (e *endpoint) exceed(now, least, decay time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	v, old := float64(least), load(&e.peak)
	if old > 0 {
		v = max(min(v, 2*old), old*fade(now-time.Duration(e.since.Load()), decay))
	}
	store(&e.peak, v)
	e.since.Store(int64(now))
}

// penalize takes an attempt that did not succeed: however long it took, it makes the
// endpoint look no better than it was, and worse than others, whose cost is given.
func (e *endpoint) penalize(now time.Duration, others float64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if others == 0 {
		others = float64(unknownLatency)
	}
	store(&e.peak, max(load(&e.peak), penalty*others))
	e.failing.Store(true)
	e.since.Store(int64(now))
}

// succeed takes an attempt that succeeded and whose time is no latency. It ends a penalty:
// there may never be a latency to replace it.
func (e *endpoint) succeed() {
	if !e.failing.Load() {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.failing.Store(false)
	store(&e.peak, load(&e.mean))
}

// forget makes the endpoint's latency unknown.
func (e *endpoint) forget() {
	e.mu.Lock()
	defer e.mu.Unlock()
	store(&e.peak, 0)
	store(&e.mean, 0)
	e.failing.Store(false)
}

const (
	// A failure costs this many times what one call more does elsewhere: it is forgotten
	// in 3.4 times the decay.
	penalty = 30
	// unknownLatency takes the place of a latency that nobody has seen.
	unknownLatency = time.Second
)

// cost is what one call more has to expect: the latency times the calls that share it.
// Latencies fade while nothing is in flight, so that an endpoint which nobody asks is
// asked again; one that holds its calls back does not look better for that. What is not
// known costs nothing, once: Finagle too asks a new endpoint at once, and waits for its
// first answer. What has faded to a tenth of what others take is as good as not known.
func (e *endpoint) cost(now, decay, others time.Duration) float64 {
	if others == 0 {
		others = unknownLatency
	}
	n, latency := e.inFlight.Load(), load(&e.peak)
	switch {
	case n == 0:
		if latency *= fade(now-time.Duration(e.since.Load()), decay); latency < float64(others)/10 {
			return 0
		}
	case latency == 0:
		latency = float64(others)
	}
	return latency * float64(n+1)
}

// weight is the endpoint's share of a full one: it grows with the time since its first
// connection, from a tenth.
func (e *endpoint) weight(now, slowStart time.Duration) float64 {
	age := now - time.Duration(e.begun.Load())
	if e.old || age >= slowStart {
		return 1
	}
	return max(0.1, float64(age)/float64(slowStart))
}

// fade is what is left of a value after a time.
func fade(t, decay time.Duration) float64 {
	x := float64(max(t, 0)) / float64(decay)
	if x < 1e-3 {
		return 1 - x // to a millionth, and in a tenth of the time
	}
	return math.Exp(-x)
}

func load(a *atomic.Uint64) float64     { return math.Float64frombits(a.Load()) }
func store(a *atomic.Uint64, v float64) { a.Store(math.Float64bits(v)) }
