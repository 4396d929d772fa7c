package limiter

import "time"

// TakeAsIfNobodyWaited is the second half of Take, for a call that was
// descheduled in the middle of it.
func (b *Bucket) TakeAsIfNobodyWaited(now time.Duration) bool { return b.take(now) }
