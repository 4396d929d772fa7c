package limiter

import (
	"math"
	"sync/atomic"
	"time"
)

// bucket is a token bucket that starts full, kept as the one word of the generic
// cell rate algorithm, its equal (GCRA, ITU-T I.371; ATM Forum, Traffic Management
// 4.0). The word is the theoretical arrival time: when the bucket is full again. A
// token moves it by 1/rate; a call conforms while it stays within burst/rate of
// now. take needs no lock.
type bucket struct {
	full     atomic.Uint64 // time at which the bucket is full
	interval uint64        // 1/rate, rounded up
	capacity uint64        // burst * interval
}

// Times of a bucket are 64ths of a nanosecond, in a uint64. At 1e7/s a whole
// nanosecond would be 1 % of the interval; a 64th, always rounded up, keeps every
// rate exact to 0.02 % and never above its limit. The range is nine years.
const unitBits = 6

func units(d time.Duration) uint64 { return uint64(max(d, 0)) << unitBits }

// duration is rounded up, so that who comes back after it finds its token.
func duration(u uint64) time.Duration { return time.Duration((u + 1<<unitBits - 1) >> unitBits) }

func newBucket(rate float64, burst int) *bucket {
	interval := uint64(math.Ceil(float64(units(time.Second)) / rate))
	return &bucket{interval: interval, capacity: uint64(burst) * interval}
}

func (b *bucket) take(now time.Duration) bool {
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

func (b *bucket) delay(now time.Duration, ahead int) time.Duration {
	t := units(now)
	full := max(b.full.Load(), t) + uint64(ahead+1)*b.interval
	return duration(full - min(full, t+b.capacity))
}

func (b *bucket) available(now time.Duration) float64 {
	return b.left(b.full.Load(), now)
}

// left is what there is in the bucket at now, if it is full at the time full.
func (b *bucket) left(full uint64, now time.Duration) float64 {
	t := units(now)
	used := max(full, t) - t
	return float64(b.capacity-min(used, b.capacity)) / float64(b.interval)
}

// never is when a closed bucket is full: so late that its first token, up to thirty days
// before, is beyond the range, and early enough to add an interval.
const never = math.MaxUint64 - 1<<56

// close knows that the last call came no earlier than when the bucket was empty.
func (b *bucket) close(now time.Duration) (at time.Duration, permissions float64) {
	full := b.full.Swap(never)
	at = max(now, duration(full-min(full, b.capacity)))
	return at, b.left(full, at)
}

// open rounds, so that who becomes the same again has not lost a part of a unit.
func (b *bucket) open(at time.Duration, permissions float64) {
	had := min(math.Round(permissions*float64(b.interval)), float64(b.capacity))
	b.full.Store(units(at) + b.capacity - min(uint64(had), b.capacity))
}

func (b *bucket) idle(now time.Duration) bool { return b.full.Load() <= units(now) }
