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
	limit    atomic.Int64
	maxQueue int           // guarded by mu
	maxWait  time.Duration // guarded by mu

	// Who waits is in waiting before it looks for a place for the last time, and who
	// gives one back looks at waiting after that: one of the two sees the other.
	inFlight atomic.Int64
	waiting  atomic.Int64 // queue.Len()
	mu       sync.Mutex
	queue    list.List // of chan struct{}, which is closed when its waiter gets a place; guarded by mu
}

// NewSemaphore returns a semaphore without calls. limit 0: unlimited, but
// counted; maxQueue 0: nobody waits; maxWait 0: a call waits until its context
// ends.
func NewSemaphore(limit, maxQueue int, maxWait time.Duration) *Semaphore {
	s := new(Semaphore)
	s.Set(limit, maxQueue, maxWait)
	return s
}

// Set changes what NewSemaphore was given. A higher limit admits at once those who
// wait for it; a lower one ends no call: none is admitted until fewer are in flight.
// Calls that wait go on waiting, as long as they would have.
func (s *Semaphore) Set(limit, maxQueue int, maxWait time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limit.Store(int64(limit))
	s.maxQueue = maxQueue
	s.maxWait = maxWait
	s.admitLocked()
}

// TryAcquire takes a place if there is one and nobody waits. It takes no lock and
// does not allocate.
func (s *Semaphore) TryAcquire() bool { return s.waiting.Load() == 0 && s.take() }

// take takes a place if there is one. Adding first and undoing what was too much would
// make others fail that have a place: hence the loop.
func (s *Semaphore) take() bool {
	for {
		n := s.inFlight.Load()
		if limit := s.limit.Load(); limit > 0 && n >= limit {
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
	if ctx.Err() != nil {
		return Ended
	}
	s.mu.Lock()
	if s.queue.Len() >= s.maxQueue {
		defer s.mu.Unlock()
		if s.TryAcquire() { // Set may have made a place, and taken the queue away
			return Admitted
		}
		return Refused
	}
	turn := make(chan struct{})
	place := s.queue.PushBack(turn)
	s.waiting.Add(1)
	s.admitLocked() // a place may have come since TryAcquire
	maxWait := s.maxWait
	s.mu.Unlock()

	var timeout <-chan time.Time
	if maxWait > 0 {
		timer := time.NewTimer(maxWait)
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
		s.inFlight.Add(-1)
		s.admitLocked()
	default:
		s.queue.Remove(place)
		s.waiting.Add(-1)
	}
}

// Release gives the place of a call back, once per call admitted, and lets those who
// wait have it.
func (s *Semaphore) Release() {
	s.inFlight.Add(-1)
	if s.waiting.Load() > 0 {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.admitLocked()
	}
}

// admitLocked admits from the head of the queue as many as there are places for.
func (s *Semaphore) admitLocked() {
	for head := s.queue.Front(); head != nil && s.take(); head = s.queue.Front() {
		close(s.queue.Remove(head).(chan struct{}))
		s.waiting.Add(-1)
	}
}

// InFlight returns the number of calls in flight, without a lock.
func (s *Semaphore) InFlight() int { return int(s.inFlight.Load()) }

// Stats returns the number of calls in flight and of those that wait.
func (s *Semaphore) Stats() (inFlight, queued int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return int(s.inFlight.Load()), s.queue.Len()
}
