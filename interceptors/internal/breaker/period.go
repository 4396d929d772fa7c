package breaker

import (
	"slices"
	"sync/atomic"
	"time"
)

const (
	buckets = 10 // of a window
	// A probe that has no verdict for this many leases is given up as lost.
	leasesUntilLost = 3
)

// period is the time between two transitions. Every result is counted in the
// period that its call began in, so one that comes after a transition ends up in
// an object that nobody looks at any more: a period is what others call a
// generation.
type period struct {
	state  State         // immutable
	inARow atomic.Uint32 // closed: failures since the last success; here it takes no room
	start  time.Duration // immutable
	sleep  time.Duration // immutable; the latest sleep window, 0 if closed
	width  time.Duration // immutable; of a bucket, 0 unless closed

	// Closed. Counters need no lock; Window.mu guards the advance to the next
	// bucket.
	newest  atomic.Uint64 // number of the newest bucket, since start
	dirty   atomic.Uint64 // the first bucket number at which the window is free of failures and slow calls
	buckets [buckets]bucket

	// Half-open, all guarded by Window.mu.
	probes    []probe // without verdict, oldest first; at most twice Config.Probes
	started   uint64  // probes so far
	successes int
}

// bucket counts the results of a tenth of the window.
type bucket struct {
	successes, failures, slow atomic.Uint32
}

// probe is a call in half-open that has no verdict.
type probe struct {
	number uint64
	start  time.Duration
}

// advanceLocked moves the window on to now. A writer that still holds an older
// bucket number adds to a bucket that counts for at least nine tenths of a
// window more; one that sleeps for all of that adds to a newer bucket. Time that
// goes backwards moves nothing: late results count in the newest bucket.
func (p *period) advanceLocked(now time.Duration) {
	next, newest := uint64(max(0, now-p.start)/p.width), p.newest.Load()
	if next <= newest {
		return
	}
	for n := max(newest+1, next-min(next, buckets-1)); n <= next; n++ {
		b := &p.buckets[n%buckets]
		b.successes.Store(0)
		b.failures.Store(0)
		b.slow.Store(0)
	}
	p.newest.Store(next)
}

// markDirty notes that bucket n has a failure or a slow call.
func (p *period) markDirty(n uint64) {
	for {
		until := p.dirty.Load()
		if until >= n+buckets || p.dirty.CompareAndSwap(until, n+buckets) {
			return
		}
	}
}

// sum counts the window. Successes are read last: what is added meanwhile can
// only make the share of failures look smaller, never larger.
func (p *period) sum() (requests, failures, slow uint64) {
	for i := range p.buckets {
		b := &p.buckets[i]
		slow += uint64(b.slow.Load())
		f := uint64(b.failures.Load())
		failures += f
		requests += f + uint64(b.successes.Load())
	}
	return requests, failures, slow
}

// tripped reports whether the window is a reason to open, and which.
func (p *period) tripped(cfg *Config) (Cause, bool) {
	requests, failures, slow := p.sum()
	switch {
	case cfg.Consecutive > 0 && p.inARow.Load() >= uint32(cfg.Consecutive):
		return ConsecutiveFailures, true
	case requests < uint64(cfg.RequestVolume):
		return 0, false
	case failures*100 >= uint64(cfg.ErrorPercent)*requests:
		return ErrorPercent, true
	default:
		return SlowCalls, cfg.SlowPercent > 0 && slow*100 >= uint64(cfg.SlowPercent)*requests
	}
}

// sleepLeft is how long an open period still rejects.
func (p *period) sleepLeft(now time.Duration) time.Duration {
	return max(0, p.sleep-max(0, now-p.start))
}

// slotInLocked is the time until a probe may start: fewer than cfg.Probes have
// an unexpired lease, and fewer than twice as many are neither answered nor
// lost. Probes are sorted, so the n-th newest tells whether there are n.
func (p *period) slotInLocked(now time.Duration, cfg *Config) time.Duration {
	now = p.notBeforeLocked(now)
	until := now
	if i := len(p.probes) - cfg.Probes; i >= 0 {
		until = max(until, p.probes[i].start+cfg.Lease)
	}
	if i := len(p.probes) - 2*cfg.Probes; i >= 0 {
		until = max(until, p.probes[i].start+leasesUntilLost*cfg.Lease)
	}
	return until - now
}

// startProbeLocked admits a probe. The oldest of twice cfg.Probes is lost, or
// there would be no slot: it is forgotten, and its verdict still counts.
func (p *period) startProbeLocked(now time.Duration, cfg *Config) Ticket {
	if lost := len(p.probes) - 2*cfg.Probes + 1; lost > 0 {
		p.probes = slices.Delete(p.probes, 0, lost)
	}
	p.started++
	p.probes = append(p.probes, probe{number: p.started, start: p.notBeforeLocked(now)})
	return Ticket{period: p, probe: p.started}
}

// notBeforeLocked is now, or the newest probe's start if time went backwards.
func (p *period) notBeforeLocked(now time.Duration) time.Duration {
	if n := len(p.probes); n > 0 {
		return max(now, p.probes[n-1].start)
	}
	return now
}

// endProbeLocked gives the slot of a probe back.
func (p *period) endProbeLocked(number uint64) {
	p.probes = slices.DeleteFunc(p.probes, func(q probe) bool { return q.number == number })
}
