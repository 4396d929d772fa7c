package limiter

import (
	"container/list"
	"context"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// Rate limits calls per second: what a bucket or a pacer has to give, and one
// queue. Calls may wait for their turn, first come first served; newcomers never
// overtake them. A Rate is safe for concurrent use and holds no goroutine. Time
// that goes backwards admits no call too many.
type Rate struct {
	limit   atomic.Pointer[limit] // the one in force; replaced under mu
	waiting atomic.Int64          // queue.Len(), for readers without the lock
	mu      sync.Mutex
	queue   list.List // of *waiter; guarded by mu
}

// limit is what a Rate decides by, until Become replaces it.
type limit struct {
	source   source
	maxWait  time.Duration
	precise  bool          // waits end to 0.1 ms, where that can be had
	replaced atomic.Bool   // is being replaced: what the source says does not count
	since    time.Duration // it is in force; whoever read the clock before that is given this time
}

// waiter is a call in the queue.
type waiter struct {
	wake  chan struct{} // has room for one: it is the head now, or something has changed
	until time.Duration // when its max wait or its deadline is over
}

func (w *waiter) rouse() {
	select {
	case w.wake <- struct{}{}:
	default: // it has not seen the last one
	}
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
	// close ends the source: from then on there are no permissions. It returns how many
	// there were, and when: at now, or at the last call if now is from before that.
	close(now time.Duration) (at time.Duration, permissions float64)
	// open makes a new source begin with these permissions, or as many as it can hold.
	open(at time.Duration, permissions float64)
}

// NewBucket returns a token bucket that is full: rate in calls per second, 0.001
// to 1e7; burst 1 to 1e7; burst/rate at most 30 days; maxWait 0: Wait refuses at
// once. No span w sees more than rate*w + burst + 1 calls.
func NewBucket(rate float64, burst int, maxWait time.Duration) *Rate {
	return newRate(&limit{source: newBucket(rate, burst), maxWait: maxWait})
}

// NewPacer returns a limit that spaces calls 1/rate apart: rate in calls per
// second, 0.001 to 1e6; after a pause up to slack of them may come early, 0 to 1e7,
// slack/rate at most 30 days; maxWait as in NewBucket.
func NewPacer(rate float64, slack int, maxWait time.Duration) *Rate {
	return newRate(&limit{source: newPacer(rate, slack), maxWait: maxWait, precise: true})
}

func newRate(l *limit) *Rate {
	r := new(Rate)
	r.limit.Store(l)
	return r
}

// Become gives the limit the rate, burst, max wait and kind of next, which is new
// and not used again. Permissions that are there at now are kept, up to the new
// burst, a part of one too; now may be from before the last call. Calls that wait keep
// their place and their own max wait; those whose turn would now come later than that
// are refused at once.
func (r *Rate) Become(next *Rate, now time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	old, l := r.limit.Load(), next.limit.Load()
	old.replaced.Store(true) // before it is closed
	at, permissions := old.source.close(now)
	l.source.open(at, permissions)
	l.since = at
	r.limit.Store(l)
	ahead := 0
	for e := r.queue.Front(); e != nil; e = e.Next() {
		w := e.Value.(*waiter)
		if late := now+l.source.delay(now, ahead) > w.until; !late {
			ahead++
		} else {
			w.rouse()
		}
	}
	r.rouseHeadLocked()
}

func (r *Rate) rouseHeadLocked() {
	if head := r.queue.Front(); head != nil {
		head.Value.(*waiter).rouse()
	}
}

// Take takes a permission if there is one and nobody waits. It does not allocate.
func (r *Rate) Take(now time.Duration) bool {
	return r.waiting.Load() == 0 && r.take(now)
}

func (r *Rate) take(now time.Duration) bool {
	for {
		l := r.limit.Load()
		if l.source.take(max(now, l.since)) {
			return true
		}
		if !l.replaced.Load() {
			return false
		}
		runtime.Gosched() // the other is in force in a matter of nanoseconds
	}
}

// delay may be called with the lock: then no limit is being replaced.
func (r *Rate) delay(now time.Duration, ahead int) time.Duration {
	for {
		l := r.limit.Load()
		d := l.source.delay(now, ahead)
		if !l.replaced.Load() {
			return d
		}
		runtime.Gosched()
	}
}

// RetryAfter is the time until a permission is there for a newcomer, behind those
// who wait now; at least 1ns, since it is asked after Take has failed.
func (r *Rate) RetryAfter(now time.Duration) time.Duration {
	return max(1, r.delay(now, int(r.waiting.Load())))
}

// Wait waits for a permission after Take has failed. A call whose turn would come
// later than the max wait or the deadline of ctx is refused at once and spends
// nothing; so at most burst + rate*maxWait calls wait. clock is the time
// that Take is given; it must run as fast as the timers of package time do.
//
// Only the head of the queue holds a timer: the turn of each is known when it comes,
// and known anew when the limit changes.
func (r *Rate) Wait(ctx context.Context, clock func() time.Duration) Verdict {
	if r.limit.Load().maxWait <= 0 {
		return Refused
	}
	if ctx.Err() != nil {
		return Ended
	}
	deadline, ok := ctx.Deadline() // not under the lock: it may panic
	r.mu.Lock()
	now := clock()
	until := now + r.limit.Load().maxWait
	if ok {
		until = min(until, now+time.Until(deadline))
	}
	if now+r.delay(now, r.queue.Len()) > until {
		r.mu.Unlock()
		return Refused
	}
	w := &waiter{wake: make(chan struct{}, 1), until: until}
	place := r.queue.PushBack(w)
	r.waiting.Add(1)
	if place == r.queue.Front() {
		w.rouse()
	}
	r.mu.Unlock()
	defer r.leave(place)

	select {
	case <-w.wake:
	case <-ctx.Done():
		return Ended
	}
	if !r.heads(place) {
		return TimedOut // the limit has changed
	}
	return r.waitAsHead(ctx, clock, w)
}

// heads reports whether a waiter is the head of the queue.
func (r *Rate) heads(place *list.Element) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return place == r.queue.Front()
}

// waitAsHead waits for the permission. It is taken when its time has come and
// not before, so that a head which leaves has nothing to give back. It may find it
// gone: a call that saw an empty queue can be slow to take.
//
// Timers are late, and with burst 1 each delay would be lost for good. So it is
// taken as of when it was due. That is never before the last call was
// admitted, so it adds at most the first call to what a span may see: the + 1 of
// the promise.
func (r *Rate) waitAsHead(ctx context.Context, clock func() time.Duration, w *waiter) Verdict {
	for due := clock(); ctx.Err() == nil; {
		now := clock()
		delay := r.delay(now, 0)
		if delay == 0 && r.take(min(due, now)) { // it is not due yet if it was roused
			return Admitted
		}
		if now+delay > w.until {
			return TimedOut
		}
		due = now + delay
		rest(ctx, delay, r.limit.Load().precise && clock() > now, w.wake)
	}
	return Ended
}

// rest waits for about d, or less if ctx ends or something comes from wake. An idle process serves timers up to
// 1 ms late, since the runtime's poller counts in whole milliseconds, which is five
// intervals at 5,000 calls per second. So the last millisecond of a precise rest is
// a nap, during which neither is seen. Where time stands still between two looks at
// it (testing/synctest), it moves for timers alone, and no rest is precise.
func rest(ctx context.Context, d time.Duration, precise bool, wake <-chan struct{}) {
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
	case <-wake:
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
	if wasHead {
		r.rouseHeadLocked()
	}
}

// Stats returns the permissions available at now, fractions of a bucket's tokens
// included, and the number of calls that wait.
func (r *Rate) Stats(now time.Duration) (available float64, waiting int) {
	r.mu.Lock() // or the limit may be closed
	defer r.mu.Unlock()
	return r.limit.Load().source.available(now), r.queue.Len()
}

// Idle reports whether nobody waits and a new limit would decide the same, or,
// with pacing, be stricter: the first call of a new one is alone.
func (r *Rate) Idle(now time.Duration) bool {
	return r.limit.Load().source.idle(now) && r.waiting.Load() == 0
}
