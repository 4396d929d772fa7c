// Package limiter decides whether a call may start now, wait, or not start at
// all: Rate by the calls per second, Semaphore by the calls in flight. It knows
// neither gRPC nor a clock: time is an argument, the duration since an epoch of
// the caller's choice on a monotonic clock.
package limiter

// Verdict is the end of a wait.
type Verdict uint8

const (
	// Refused: the limit is reached and the call may not wait, the queue is full,
	// or its turn would come too late.
	Refused Verdict = iota
	// Admitted: the call has its token or place.
	Admitted
	// TimedOut: the turn did not come within the max wait.
	TimedOut
	// Ended: the context was done first.
	Ended
)
