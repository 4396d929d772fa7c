package interceptors

import (
	"errors"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Domain is the ErrorInfo.domain of every status that this package makes.
const Domain = "grpc-resilience"

// Side tells the two ends of a call apart.
type Side uint8

// The sides.
const (
	Client Side = iota // a call that this process makes
	Server             // a call that this process serves
)

// String returns "client" or "server".
func (s Side) String() string {
	if s == Client {
		return "client"
	}
	return "server"
}

// Reason says why a call was rejected. It is the ErrorInfo.reason of the
// status.
type Reason string

// The reasons of a RejectedError.
const (
	ReasonBreakerOpen        Reason = "BREAKER_OPEN"        // UNAVAILABLE
	ReasonRateLimited        Reason = "RATE_LIMITED"        // RESOURCE_EXHAUSTED
	ReasonConcurrencyLimited Reason = "CONCURRENCY_LIMITED" // RESOURCE_EXHAUSTED; no place, and none in the queue
	ReasonQueueTimeout       Reason = "QUEUE_TIMEOUT"       // RESOURCE_EXHAUSTED; waited max_queue_wait for a place
	ReasonDraining           Reason = "DRAINING"            // UNAVAILABLE; only with drain.reject_new
	ReasonBudgetTooSmall     Reason = "BUDGET_TOO_SMALL"    // DEADLINE_EXCEEDED
)

// reasonPanic marks the status of a recovered panic; it is not a rejection.
const reasonPanic = "PANIC"

// Sentinels for errors.Is: a *RejectedError is the one of its reason.
var (
	ErrBreakerOpen        = errors.New("circuit breaker is open")
	ErrRateLimited        = errors.New("rate limited")
	ErrConcurrencyLimited = errors.New("concurrency limit reached")
	ErrQueueTimeout       = errors.New("no place became free in time")
	ErrDraining           = errors.New("server is draining")
	ErrBudgetTooSmall     = errors.New("deadline is too near")
)

// ErrGoexit is the panic value that the log and WithPanicHandler's function see when
// a handler ended its goroutine with runtime.Goexit.
var ErrGoexit = errors.New("the handler called runtime.Goexit")

// reasons is indexed by the position that counts.rejected uses.
var reasons = [...]struct {
	reason Reason
	err    error
	code   codes.Code
	kind   string // the gate that decided, in metrics
}{
	{ReasonBreakerOpen, ErrBreakerOpen, codes.Unavailable, "breaker"},
	{ReasonRateLimited, ErrRateLimited, codes.ResourceExhausted, "rate_limit"},
	{ReasonConcurrencyLimited, ErrConcurrencyLimited, codes.ResourceExhausted, "concurrency_limit"},
	{ReasonQueueTimeout, ErrQueueTimeout, codes.ResourceExhausted, "concurrency_limit"},
	{ReasonDraining, ErrDraining, codes.Unavailable, "drain"},
	{ReasonBudgetTooSmall, ErrBudgetTooSmall, codes.DeadlineExceeded, "budget"},
}

func (r Reason) index() int {
	for i := range reasons {
		if reasons[i].reason == r {
			return i
		}
	}
	return -1
}

// RejectedError is a call that a gate of this process refused: it was not sent
// (Client) or not handed to its handler (Server). It is immutable once returned.
type RejectedError struct {
	Side       Side
	Method     string // full name, "/pkg.Service/Method"
	Rule       string // name of the rule that gave the gate, or its pattern
	Reason     Reason
	RetryAfter time.Duration // when a retry has a chance; 0: not known
}

// Error says which gate refused which call, and when to come back.
func (e *RejectedError) Error() string {
	text := clip(e.Method) + ": " + e.what()
	if e.Rule != "" {
		text += " (" + e.Side.String() + " rule " + strconv.Quote(clip(e.Rule)) + ")"
	}
	if e.RetryAfter > 0 {
		text += ", retry in " + roundUp(e.RetryAfter).String()
	}
	return text
}

func (e *RejectedError) what() string {
	if i := e.Reason.index(); i >= 0 {
		return reasons[i].err.Error()
	}
	return "rejected: " + string(e.Reason)
}

// Unwrap returns the sentinel of the reason, so that errors.Is(err,
// ErrBreakerOpen) holds.
func (e *RejectedError) Unwrap() error {
	if i := e.Reason.index(); i >= 0 {
		return reasons[i].err
	}
	return nil
}

// Is makes a call that timed out in the queue of a concurrency limit an
// ErrConcurrencyLimited too.
func (e *RejectedError) Is(target error) bool {
	return target == ErrConcurrencyLimited && e.Reason == ReasonQueueTimeout
}

// GRPCStatus returns the status with its details (ErrorInfo, and RetryInfo and
// QuotaFailure where they apply). It is built on each call: a client that only
// looks at the error never pays for it.
func (e *RejectedError) GRPCStatus() *status.Status {
	code := codes.Unavailable
	if i := e.Reason.index(); i >= 0 {
		code = reasons[i].code
	}
	details := []protoadapt.MessageV1{&errdetails.ErrorInfo{
		Reason:   string(e.Reason),
		Domain:   Domain,
		Metadata: map[string]string{"method": clip(e.Method), "rule": clip(e.Rule)},
	}}
	if e.Reason == ReasonRateLimited {
		details = append(details, &errdetails.QuotaFailure{Violations: []*errdetails.QuotaFailure_Violation{{
			Subject:     clip(e.Rule),
			Description: "requests per second",
		}}})
	}
	if e.RetryAfter > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(e.RetryAfter)})
	}
	return withDetails(code, e.Error(), details...)
}

// withDetails never fails: the details are our own messages of valid UTF-8.
func withDetails(code codes.Code, msg string, details ...protoadapt.MessageV1) *status.Status {
	st := status.New(code, msg)
	if detailed, err := st.WithDetails(details...); err == nil {
		return detailed
	}
	return st
}

// clip bounds what a hostile peer can make us send back, and keeps it valid
// UTF-8 (protobuf refuses to marshal anything else).
func clip(s string) string {
	const limit = 128
	if len(s) > limit {
		s = s[:limit] + "..."
	}
	return strings.ToValidUTF8(s, "?")
}

// roundUp makes a duration readable; never down to zero.
func roundUp(d time.Duration) time.Duration {
	return (d + time.Millisecond - 1).Truncate(time.Millisecond)
}
