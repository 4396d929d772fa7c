package limiter

import (
	"container/list"
	"context"
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// Bucket limits calls per second: a token bucket that starts full, kept as the
// one word of the generic cell rate algorithm, its equal (GCRA, ITU-T I.371;
// ATM Forum, Traffic Management 4.0). The word is the theoretical arrival time:
// when the bucket is full again. A token moves it by 1/rate; a call conforms
// while it stays within burst/rate of now. No span w sees more than
// rate*w + burst + 1 calls.
//
// Calls may wait for a token, first come first served; newcomers never overtake
// them. A Bucket is safe for concurrent use and holds no goroutine. Time that
// goes backwards admits no call too many.
type Bucket struct {
	full     atomic.Uint64 // time at which the bucket is full
	interval uint64        // 1/rate, rounded up
	capacity uint64        // burst * interval
	maxWait  time.Duration

	waiting atomic.Int64 // queue.Len(), for readers without the lock
	mu      sync.Mutex
	queue   list.List // of chan struct{}, which is closed when its waiter becomes the head; guarded by mu
}

// Times of a Bucket are 64ths of a nanosecond, in a uint64. At 1e7/s a whole
// nanosecond would be 1 % of the interval; a 64th, always rounded up, keeps every
// rate exact to 0.02 % and never above its limit. The range is nine years.
const unitBits = 6

func units(d time.Duration) uint64 { return uint64(max(d, 0)) << unitBits }

// duration is rounded up, so that who comes back after it finds its token.
func duration(u uint64) time.Duration { return time.Duration((u + 1<<unitBits - 1) >> unitBits) }

// NewBucket returns a full bucket: rate in calls per second, 0.001 to 1e7; burst
// 1 to 1e7; burst/rate at most 30 days; maxWait 0: Wait refuses at once.
func NewBucket(rate float64, burst int, maxWait time.Duration) *Bucket {
	interval := uint64(math.Ceil(float64(units(time.Second)) / rate))
	return &Bucket{interval: interval, capacity: uint64(burst) * interval, maxWait: maxWait}
}

// Take takes a token if there is one and nobody waits. It takes no lock and does
// not allocate.
func (b *Bucket) Take(now time.Duration) bool {
	return b.waiting.Load() == 0 && b.take(now)
}

func (b *Bucket) take(now time.Duration) bool {
	for t := units(now); ; {
		old := b.full.Load()
		next := max(old, t) + b.interval
		if next > t+b.capacity {
			return false
		}
		if b.full.CompareAndSwap(old, next) {
			return true
		}
	}
}

// delay is the time until a token is there for who has ahead others before it.
func (b *Bucket) delay(now time.Duration, ahead int) time.Duration {
	t := units(now)
	full := max(b.full.Load(), t) + uint64(ahead+1)*b.interval
	return duration(full - min(full, t+b.capacity))
}

// RetryAfter is the time until a token is free for a newcomer, behind those who
// wait now; at least 1ns, since it is asked after Take has failed.
func (b *Bucket) RetryAfter(now time.Duration) time.Duration {
	return max(1, b.delay(now, int(b.waiting.Load())))
}

// Wait waits for a token after Take has failed. A call whose turn would come
// later than the bucket's max wait or the deadline of ctx is refused at once and
// spends nothing; so at most burst + rate*maxWait calls wait. clock is the time
// that Take is given; it must run as fast as the timers of package time do.
//
// Only the head of the queue holds a timer. As all wait equally long at most,
// its limit is the earliest, and whoever becomes head later is still within
// their own.
func (b *Bucket) Wait(ctx context.Context, clock func() time.Duration) Verdict {
	if b.maxWait <= 0 {
		return Refused
	}
	if ctx.Err() != nil {
		return Ended
	}
	b.mu.Lock()
	now := clock()
	turn := b.delay(now, b.queue.Len())
	if deadline, ok := ctx.Deadline(); turn > b.maxWait || ok && turn > time.Until(deadline) {
		b.mu.Unlock()
		return Refused
	}
	head := make(chan struct{})
	place := b.queue.PushBack(head)
	b.waiting.Add(1)
	if place == b.queue.Front() {
		close(head)
	}
	b.mu.Unlock()
	defer b.leave(place)

	select {
	case <-head:
		return b.waitAsHead(ctx, clock, now+b.maxWait)
	case <-ctx.Done():
		return Ended
	}
}

// waitAsHead waits until limit. The token is taken when its time has come and
// not before, so that a head which leaves has nothing to give back. It may find
// the token gone: a call that saw an empty queue can be slow to take.
//
// Timers are late, and with burst 1 each delay would be lost for good. So the
// token is taken as of when it was due. That is never before the last call was
// admitted, so it adds at most the first call to what a span may see: the + 1 of
// the promise.
func (b *Bucket) waitAsHead(ctx context.Context, clock func() time.Duration, limit time.Duration) Verdict {
	for due := clock(); ctx.Err() == nil; {
		now := clock()
		delay := b.delay(now, 0)
		if delay == 0 && b.take(due) {
			return Admitted
		}
		if now+delay > limit {
			return TimedOut
		}
		due = now + delay
		timer := time.NewTimer(delay)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
	}
	return Ended
}

// leave takes a waiter out of the queue. If it was the head, the next one is.
func (b *Bucket) leave(place *list.Element) {
	b.mu.Lock()
	defer b.mu.Unlock()
	wasHead := place == b.queue.Front()
	b.queue.Remove(place)
	b.waiting.Add(-1)
	if next := b.queue.Front(); wasHead && next != nil {
		close(next.Value.(chan struct{}))
	}
}

// Stats returns the tokens available at now, fractions included, and the number
// of calls that wait.
func (b *Bucket) Stats(now time.Duration) (available float64, waiting int) {
	t := units(now)
	used := max(b.full.Load(), t) - t
	return float64(b.capacity-min(used, b.capacity)) / float64(b.interval), int(b.waiting.Load())
}

// Idle reports whether the bucket is full and nobody waits, that is, whether a
// new one would decide the same.
func (b *Bucket) Idle(now time.Duration) bool {
	return b.full.Load() <= units(now) && b.waiting.Load() == 0
}
