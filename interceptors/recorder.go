package interceptors

import (
	"math"
	"sync"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
)

// The windows of a recorder are Hystrix's defaults: counts over 10 s in buckets of
// 1 s (metrics.rollingStats), latencies over 60 s in buckets of 10 s, of which each
// keeps its 100 latest samples (metrics.rollingPercentile, HystrixRollingPercentile).
// The bucket that is being filled counts, so that the windows span 9 to 10 s and 50
// to 60 s.
const (
	countBuckets  = 10
	countSpan     = time.Second
	sampleBuckets = 6
	sampleSpan    = 10 * time.Second
	sampleSize    = 100
)

// event is one of the things that a recorder counts, in Hystrix's words.
type event uint8

const (
	eventSuccess         event = iota // also of a call that was not recorded, see call.recorded
	eventFailure                      // ended badly, but not late
	eventTimeout                      // ended late
	eventCanceled                     // the caller gave up
	eventBadRequest                   // says nothing about the peer, or was not worth a try
	eventShortCircuited               // refused by the breaker
	eventRejected                     // refused by a rate limit or a drain
	eventNoPlace                      // refused by the concurrency limit
	eventFallbackSuccess              // answered by a fallback
	eventFallbackFailure              // the fallback failed too
	eventFallbackNotBad               // of these two, those for what is a bad request
	events
)

// kind is whether a method is a stream, which only its calls tell.
type kind uint8

const (
	kindUnknown kind = iota
	kindUnary
	kindStream
)

func kindOf(stream bool) kind {
	if stream {
		return kindStream
	}
	return kindUnary
}

// recorder keeps of one method what the Hystrix event stream shows and nobody else
// needs: what happened lately and how long calls took. Its buckets advance when it
// is used; time is an argument, and time that runs backwards stands still. It does
// not allocate.
type recorder struct {
	mu      sync.Mutex // guards everything below
	second  int64      // number of the newest bucket of counts
	counts  [countBuckets]countBucket
	tens    int64 // number of the newest bucket of samples
	samples [sampleBuckets]sampleBucket
	kind    kind // of the latest call
}

type countBucket struct {
	events        [events]uint32
	calls, places int32 // the most in flight
}

type sampleBucket struct {
	taken   uint32 // the latest sampleSize of these are kept
	samples [sampleSize]sample
}

// sample is how long a call took, in whole milliseconds as in Hystrix.
type sample struct{ execute, total uint32 }

// advanceLocked empties the buckets whose time has come round again.
func (r *recorder) advanceLocked(now time.Duration) {
	if newest := int64(now / countSpan); newest > r.second {
		r.second = max(r.second, newest-countBuckets)
		for r.second < newest {
			r.second++
			r.counts[r.second%countBuckets] = countBucket{}
		}
	}
	if newest := int64(now / sampleSpan); newest > r.tens {
		r.tens = max(r.tens, newest-sampleBuckets)
		for r.tens < newest {
			r.tens++
			r.samples[r.tens%sampleBuckets].taken = 0
		}
	}
}

// count notes an event that is not the end of an admitted call, or several of one call.
func (r *recorder) count(now time.Duration, es ...event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.advanceLocked(now)
	for _, e := range es {
		r.counts[r.second%countBuckets].events[e]++
	}
}

// ended notes that an admitted call has ended: how long it ran, how long it took
// with its waits, and how many calls of the method and of the pool were in flight
// to the end, this one included. A maximum can be read at the ends alone: what is
// in flight grows no more until one ends, and what has not ended is in flight.
func (r *recorder) ended(e event, now, execute, total time.Duration, calls, places int, k kind) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.advanceLocked(now)
	c := &r.counts[r.second%countBuckets]
	c.events[e]++
	c.calls, c.places = max(c.calls, int32(calls)), max(c.places, int32(places))
	s := &r.samples[r.tens%sampleBuckets]
	s.samples[s.taken%sampleSize] = sample{millis(execute), millis(total)}
	s.taken++
	r.kind = k
}

func millis(d time.Duration) uint32 {
	return uint32(min(max(d.Milliseconds(), 0), math.MaxUint32))
}

// recent is what a recorder has seen in its windows.
type recent struct {
	events         [events]uint64
	calls, places  int      // the most in flight
	execute, total []uint32 // milliseconds, unsorted
	kind           kind
}

// read fills in v, whose slices are used again.
func (r *recorder) read(v *recent, now time.Duration) {
	*v = recent{execute: v.execute[:0], total: v.total[:0]}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.advanceLocked(now)
	for i := range r.counts {
		c := &r.counts[i]
		for e, n := range c.events {
			v.events[e] += uint64(n)
		}
		v.calls, v.places = max(v.calls, int(c.calls)), max(v.places, int(c.places))
	}
	for i := range r.samples {
		b := &r.samples[i]
		for _, s := range b.samples[:min(b.taken, sampleSize)] {
			v.execute, v.total = append(v.execute, s.execute), append(v.total, s.total)
		}
	}
	v.kind = r.kind
}

// executed is the number of admitted calls that ended.
func (v *recent) executed() uint64 {
	e := &v.events
	return e[eventSuccess] + e[eventFailure] + e[eventTimeout] + e[eventCanceled] + e[eventBadRequest]
}

// mean is rounded down, and 0 without samples.
func mean(samples []uint32) uint32 {
	if len(samples) == 0 {
		return 0
	}
	var sum uint64
	for _, s := range samples {
		sum += uint64(s)
	}
	return uint32(sum / uint64(len(samples)))
}

// percentile interpolates between the sorted samples next to rank p/100 × n, counted
// from 0, and rounds down, as HystrixRollingPercentile does. It is 0 without samples.
func percentile(sorted []uint32, p float64) uint32 {
	if len(sorted) == 0 {
		return 0
	}
	rank := p / 100 * float64(len(sorted))
	low := int(rank)
	if low >= len(sorted)-1 {
		return sorted[len(sorted)-1]
	}
	between := rank - float64(low)
	return uint32(float64(sorted[low]) + between*float64(sorted[low+1]-sorted[low]))
}

// startRecording gives every method of the side a recorder, now or when it is made.
func (s *side) startRecording() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.recording = true
	for _, t := range s.distinctLocked() {
		for _, m := range t.allLocked() {
			m.startRecording()
		}
	}
}

// startRecording gives the method a recorder if it is shown; the caller holds side.mu. The overflow is not,
// because it is no method and has no breaker, but its calls are in the limits that it
// shares with methods.
func (m *gates) startRecording() {
	l := m.policy.Concurrency
	shown := m.breaker != nil || l != nil
	if m.method == overflow {
		shown = l != nil && l.Shared != 0
	}
	if shown && m.recorder.Load() == nil {
		m.recorder.Store(new(recorder))
	}
}

// recordEnd notes the end of an admitted call that has not been counted yet.
func (c *call) recordEnd(r *recorder, result breaker.Result, now time.Duration) {
	places := 0
	if c.slot != nil {
		places = c.slot.InFlight()
	}
	e := eventBadRequest
	switch result {
	case breaker.Success:
		e = eventSuccess
	case breaker.Failure:
		e = eventFailure
	case breaker.Timeout:
		e = eventTimeout
	case breaker.Canceled:
		e = eventCanceled
	}
	c.recorded = e
	r.ended(e, now, now-c.start, now-c.arrived, int(c.gates.counts.inFlight()), places, kindOf(c.stream))
}

// recordRejection notes a rejection, if there is a recorder, and returns as what.
func (m *gates) recordRejection(reason Reason, g *Guard) (e event) {
	r := m.recorder.Load()
	if r == nil {
		return e
	}
	switch reason {
	case ReasonBreakerOpen:
		e = eventShortCircuited
	case ReasonBudgetTooSmall: // the caller asked for what cannot be
		e = eventBadRequest
	case ReasonConcurrencyLimited, ReasonQueueTimeout:
		e = eventNoPlace
	default:
		e = eventRejected
	}
	r.count(g.now(), e)
	return e
}

// recordFallback notes that a fallback answered or failed. What the call was is
// recorded by itself; if it is not (its context ended before it was admitted, or
// recording has just begun), its fallback is not either.
func (c *call) recordFallback(succeeded bool) {
	r := c.gates.recorder.Load()
	if r == nil || c.recorded == eventSuccess || c.recorded == eventCanceled {
		return
	}
	e, now := eventFallbackFailure, c.guard.now()
	if succeeded {
		e = eventFallbackSuccess
	}
	if c.recorded == eventBadRequest {
		r.count(now, e, eventFallbackNotBad)
	} else {
		r.count(now, e)
	}
}
