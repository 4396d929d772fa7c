package limiter

import (
	"container/list"
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// Rate limits calls per second: what a bucket or a pacer has to give, and one
// queue. Calls may wait for their turn, first come first served; newcomers never
// overtake them. A Rate is safe for concurrent use and holds no goroutine. Time
// that goes backwards admits no call too many.
type Rate struct {
	source  source
	maxWait time.Duration
	precise bool // waits end to 0.1 ms, where that can be had

	waiting atomic.Int64 // queue.Len(), for readers without the lock
	mu      sync.Mutex
	queue   list.List // of chan struct{}, which is closed when its waiter becomes the head; guarded by mu
}

// source is what calls take their permission from; it is safe for concurrent use.
type source interface {
	// take takes a permission if there is one at now.
	take(now time.Duration) bool
	// delay is the time until there is one for who has ahead others before it.
	delay(now time.Duration, ahead int) time.Duration
	// available is the number of permissions at now, as far as it is known.
	available(now time.Duration) float64
	// idle reports whether a new source would decide the same, or be stricter.
	idle(now time.Duration) bool
}

// NewBucket returns a token bucket that is full: rate in calls per second, 0.001
// to 1e7; burst 1 to 1e7; burst/rate at most 30 days; maxWait 0: Wait refuses at
// once. No span w sees more than rate*w + burst + 1 calls.
func NewBucket(rate float64, burst int, maxWait time.Duration) *Rate {
	return &Rate{source: newBucket(rate, burst), maxWait: maxWait}
}

// NewPacer returns a limit that spaces calls 1/rate apart: rate in calls per
// second, 0.001 to 1e6; after a pause up to slack of them may come early, 0 to 1e7,
// slack/rate at most 30 days; maxWait as in NewBucket.
func NewPacer(rate float64, slack int, maxWait time.Duration) *Rate {
	return &Rate{source: newPacer(rate, slack), maxWait: maxWait, precise: true}
}

// Take takes a permission if there is one and nobody waits. It does not allocate.
func (r *Rate) Take(now time.Duration) bool {
	return r.waiting.Load() == 0 && r.source.take(now)
}

// RetryAfter is the time until a permission is there for a newcomer, behind those
// who wait now; at least 1ns, since it is asked after Take has failed.
func (r *Rate) RetryAfter(now time.Duration) time.Duration {
	return max(1, r.source.delay(now, int(r.waiting.Load())))
}

// Wait waits for a permission after Take has failed. A call whose turn would come
// later than the max wait or the deadline of ctx is refused at once and spends
// nothing; so at most burst + rate*maxWait calls wait. clock is the time
// that Take is given; it must run as fast as the timers of package time do.
//
// Only the head of the queue holds a timer. As all wait equally long at most,
// its limit is the earliest, and whoever becomes head later is still within
// their own.
func (r *Rate) Wait(ctx context.Context, clock func() time.Duration) Verdict {
	if r.maxWait <= 0 {
		return Refused
	}
	if ctx.Err() != nil {
		return Ended
	}
	deadline, ok := ctx.Deadline() // not under the lock: it may panic
	r.mu.Lock()
	now := clock()
	turn := r.source.delay(now, r.queue.Len())
	if turn > r.maxWait || ok && turn > time.Until(deadline) {
		r.mu.Unlock()
		return Refused
	}
	head := make(chan struct{})
	place := r.queue.PushBack(head)
	r.waiting.Add(1)
	if place == r.queue.Front() {
		close(head)
	}
	r.mu.Unlock()
	defer r.leave(place)

	select {
	case <-head:
		return r.waitAsHead(ctx, clock, now+r.maxWait)
	case <-ctx.Done():
		return Ended
	}
}

// waitAsHead waits until limit. The permission is taken when its time has come and
// not before, so that a head which leaves has nothing to give back. It may find it
// gone: a call that saw an empty queue can be slow to take.
//
// Timers are late, and with burst 1 each delay would be lost for good. So it is
// taken as of when it was due. That is never before the last call was
// admitted, so it adds at most the first call to what a span may see: the + 1 of
// the promise.
func (r *Rate) waitAsHead(ctx context.Context, clock func() time.Duration, limit time.Duration) Verdict {
	for due := clock(); ctx.Err() == nil; {
		now := clock()
		delay := r.source.delay(now, 0)
		if delay == 0 && r.source.take(due) {
			return Admitted
		}
		if now+delay > limit {
			return TimedOut
		}
		due = now + delay
		rest(ctx, delay, r.precise && clock() > now)
	}
	return Ended
}

// rest waits for about d, or less if ctx ends. An idle process serves timers up to
// 1 ms late, since the runtime's poller counts in whole milliseconds, which is five
// intervals at 5,000 calls per second. So the last millisecond of a precise rest is
// a nap, during which ctx is not seen. Where time stands still between two looks at
// it (testing/synctest), it moves for timers alone, and no rest is precise.
func rest(ctx context.Context, d time.Duration, precise bool) {
	const last = time.Millisecond
	if precise && d > last {
		d -= last
	} else if precise && d > 0 && nap(d) {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// leave takes a waiter out of the queue. If it was the head, the next one is.
func (r *Rate) leave(place *list.Element) {
	r.mu.Lock()
	defer r.mu.Unlock()
	wasHead := place == r.queue.Front()
	r.queue.Remove(place)
	r.waiting.Add(-1)
	if next := r.queue.Front(); wasHead && next != nil {
		close(next.Value.(chan struct{}))
	}
}

// Stats returns the permissions available at now, fractions of a bucket's tokens
// included, and the number of calls that wait.
func (r *Rate) Stats(now time.Duration) (available float64, waiting int) {
	return r.source.available(now), int(r.waiting.Load())
}

// Idle reports whether nobody waits and a new limit would decide the same, or,
// with pacing, be stricter: the first call of a new one is alone.
func (r *Rate) Idle(now time.Duration) bool {
	return r.source.idle(now) && r.waiting.Load() == 0
}
