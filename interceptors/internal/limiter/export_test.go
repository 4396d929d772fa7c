package limiter

import "time"

// TakeAsIfNobodyWaited is the second half of Take, for a call that was
// descheduled in the middle of it.
func (r *Rate) TakeAsIfNobodyWaited(now time.Duration) bool { return r.source.take(now) }
