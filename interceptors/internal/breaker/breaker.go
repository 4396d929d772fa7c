// Package breaker decides whether a call may be tried, from the results of the
// calls before it: Window is an engine of our own, Hystrix is hystrix-go. It knows
// neither gRPC nor a clock: time is an argument, the duration since an epoch of the
// caller's choice on a monotonic clock (hystrix-go has its own clock beside it).
package breaker

import "time"

// Breaker is an engine. It is safe for concurrent use.
type Breaker interface {
	// Ready reports whether Acquire would pass a call now, and if not, after what
	// time (> 0) it may. Who is told no does not call Acquire.
	Ready(now time.Duration) (retryAfter time.Duration, ok bool)
	// Acquire passes a call or rejects it, with the time (> 0) after which another
	// may pass. Each Ticket must be given to Done exactly once.
	Acquire(now time.Duration) (t Ticket, retryAfter time.Duration, ok bool)
	// Done tells the result of a call and whether it was slow. A result that comes
	// after a transition is dropped; one of a probe counts as long as its half-open
	// period lasts, also when its lease has expired. The zero Ticket does nothing.
	Done(t Ticket, now time.Duration, r Result, slow bool)
	// Stats describes the breaker at now.
	Stats(now time.Duration) Stats
	// Idle reports whether the breaker is closed and its window empty, that is,
	// whether a new one would decide the same.
	Idle(now time.Duration) bool
}

// Config is what a Window is built from. It is not validated here: every field
// must be in the range that its comment gives.
type Config struct {
	// ErrorPercent opens the breaker when this percentage of the calls in the
	// window failed: 1 to 100.
	ErrorPercent int
	// RequestVolume is the number of calls in the window below which the breaker
	// stays closed: at least 1.
	RequestVolume int
	// Probes may run at once in half-open, and as many successes close: at
	// least 1.
	Probes int
	// Consecutive opens the breaker after this many failures in a row, whatever the
	// volume. Zero: they are not counted.
	Consecutive int32
	// SlowPercent opens the breaker when this percentage of the calls in the
	// window was slow: 1 to 100. Zero: slow calls are like all others.
	SlowPercent int32
	// Window is the length of the sliding window. It moves on in steps of a tenth,
	// so that it spans nine to ten tenths of this. Positive.
	Window time.Duration
	// SleepWindow is how long an open breaker rejects all calls. Positive.
	SleepWindow time.Duration
	// MaxSleepWindow is what the sleep window doubles up to, with each reopening
	// that no closing precedes. Less than SleepWindow: no doubling.
	MaxSleepWindow time.Duration
	// Lease is how long a probe keeps its slot without a verdict. Positive.
	Lease time.Duration
}

// State is what a breaker does with calls.
type State uint8

// Transitions: Closed -> Open -> HalfOpen -> Closed or Open.
const (
	// Closed lets all calls pass.
	Closed State = iota
	// Open rejects all calls until the sleep window is over.
	Open
	// HalfOpen lets a few calls pass, the probes, to learn whether to close.
	HalfOpen
)

// String is the state's name in metrics: closed, open or half_open.
func (s State) String() string {
	return [...]string{"closed", "open", "half_open"}[s]
}

// Result is what became of a call. There are three kinds: Success counts for the
// peer, Failure and Timeout count against it, all others say nothing about it.
type Result uint8

const (
	// Ignored says nothing about the peer. A probe gives its slot back.
	Ignored Result = iota
	// Success counts for the peer.
	Success
	// Failure counts against it.
	Failure
	// Timeout is a Failure: the peer took too long.
	Timeout
	// Canceled is Ignored: the caller gave up.
	Canceled
	// Expired is Ignored: the caller had too little time.
	Expired
)

func (r Result) failed() bool  { return r == Failure || r == Timeout }
func (r Result) counted() bool { return r == Success || r.failed() }

// Cause says why a breaker changed its state.
type Cause uint8

const (
	// ErrorPercent: closed to open, too many calls failed.
	ErrorPercent Cause = iota
	// SlowCalls: closed to open, too many calls were slow.
	SlowCalls
	// SleepWindow: open to half-open, the sleep window was over and a call came.
	SleepWindow
	// ProbeSuccess: half-open to closed, enough probes succeeded.
	ProbeSuccess
	// ProbeFailure: half-open to open, a probe failed or was slow.
	ProbeFailure
	// ConsecutiveFailures: closed to open, too many calls in a row failed.
	ConsecutiveFailures
)

// String is the cause's name in metrics.
func (c Cause) String() string {
	return [...]string{"error_percent", "slow_calls", "sleep_window", "probe_success", "probe_failure", "consecutive_failures"}[c]
}

// Transition is one change of state.
type Transition struct {
	From, To State
	Cause    Cause
}

// Ticket is the permission for one call. Its zero value belongs to no call.
type Ticket struct {
	period *period
	probe  uint64        // number of the probe in its half-open period, 0: not a probe
	start  time.Duration // of the call; Hystrix only
}

// Probe reports whether the call is a half-open probe.
func (t Ticket) Probe() bool { return t.probe != 0 }

// Stats is a consistent view of a breaker.
type Stats struct {
	Engine string // "window" or "hystrix"
	State  State
	// Requests and Failures are those in the window; 0 unless closed.
	Requests, Failures int
	// RetryAfter is the time until a call may pass; 0 if one may now.
	RetryAfter time.Duration
}
