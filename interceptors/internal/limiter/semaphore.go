package limiter

import (
	"container/list"
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// Semaphore limits calls in flight. Calls may wait for a place, first come first
// served; newcomers never overtake them. It is safe for concurrent use and holds
// no goroutine.
type Semaphore struct {
	limit    int64
	maxQueue int
	maxWait  time.Duration

	// While calls wait, this is the limit: who queues has seen it under mu, and it
	// goes down under mu only, when nobody waits. So newcomers need not look.
	inFlight atomic.Int64
	mu       sync.Mutex
	queue    list.List // of chan struct{}, which is closed when its waiter gets a place; guarded by mu
}

// NewSemaphore returns a semaphore without calls. limit 0: unlimited, but
// counted; maxQueue 0: nobody waits; maxWait 0: a call waits until its context
// ends.
func NewSemaphore(limit, maxQueue int, maxWait time.Duration) *Semaphore {
	return &Semaphore{limit: int64(limit), maxQueue: maxQueue, maxWait: maxWait}
}

// TryAcquire takes a place if there is one and nobody waits. It takes no lock and
// does not allocate. Adding first and undoing what was too much would make others
// fail that have a place: hence the loop.
func (s *Semaphore) TryAcquire() bool {
	for {
		n := s.inFlight.Load()
		if s.limit > 0 && n >= s.limit {
			return false
		}
		if s.inFlight.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// Acquire waits for a place after TryAcquire has failed. When the turn comes is
// unknown, so a deadline of ctx is waited for.
func (s *Semaphore) Acquire(ctx context.Context) Verdict {
	if s.maxQueue == 0 {
		return Refused
	}
	if ctx.Err() != nil {
		return Ended
	}
	s.mu.Lock()
	if s.TryAcquire() {
		s.mu.Unlock()
		return Admitted
	}
	if s.queue.Len() >= s.maxQueue {
		s.mu.Unlock()
		return Refused
	}
	turn := make(chan struct{})
	place := s.queue.PushBack(turn)
	s.mu.Unlock()

	var timeout <-chan time.Time
	if s.maxWait > 0 {
		timer := time.NewTimer(s.maxWait)
		defer timer.Stop()
		timeout = timer.C
	}
	select {
	case <-turn:
		return Admitted
	case <-ctx.Done():
		s.leave(turn, place)
		return Ended
	case <-timeout:
		s.leave(turn, place)
		return TimedOut
	}
}

// leave takes a waiter out of the queue. If it was handed a place at the same
// moment, the place goes to the next.
func (s *Semaphore) leave(turn chan struct{}, place *list.Element) {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-turn:
		s.releaseLocked()
	default:
		s.queue.Remove(place)
	}
}

// Release gives the place of a call back, once per call admitted: to the head of
// the queue, if there is one.
func (s *Semaphore) Release() {
	if s.maxQueue == 0 {
		s.inFlight.Add(-1)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.releaseLocked()
}

func (s *Semaphore) releaseLocked() {
	if head := s.queue.Front(); head != nil {
		close(s.queue.Remove(head).(chan struct{}))
		return
	}
	s.inFlight.Add(-1)
}

// InFlight returns the number of calls in flight, without a lock.
func (s *Semaphore) InFlight() int { return int(s.inFlight.Load()) }

// Stats returns the number of calls in flight and of those that wait.
func (s *Semaphore) Stats() (inFlight, queued int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return int(s.inFlight.Load()), s.queue.Len()
}
