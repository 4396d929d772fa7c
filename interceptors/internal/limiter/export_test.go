package limiter

import "time"

// TakeAsIfNobodyWaited is the second half of Take, for a call that was
// descheduled in the middle of it.
func (r *Rate) TakeAsIfNobodyWaited(now time.Duration) bool { return r.take(now) }

// Locked reports whether somebody holds the lock.
func (r *Rate) Locked() bool {
	if !r.mu.TryLock() {
		return true
	}
	r.mu.Unlock()
	return false
}

// Close ends the limit that is in force, as Become does on its way.
func (r *Rate) Close(now time.Duration) { r.limit.Load().source.close(now) }

// Hold keeps the queue as it is until letGo.
func (s *Semaphore) Hold() (letGo func()) {
	s.mu.Lock()
	return s.mu.Unlock
}
