package interceptors

import (
	"context"
	"errors"
	"math"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/policy"
)

// Outcome is what an admitted call says about the health of the other side. In
// the absence of a Classifier, in this order:
//
//   - a rejection made in this process: Neutral; a panic or Goexit: Failure
//   - the caller cancelled or closed the channel: Neutral, whatever the code; but
//     a call that ends cancelled less than 20 ms before its deadline, or after it,
//     has run out of time: that is how a deadline often reaches a server
//   - a peer's rejection by this package: RATE_LIMITED, CONCURRENCY_LIMITED and
//     QUEUE_TIMEOUT: Dropped; BREAKER_OPEN: Failure; DRAINING and
//     BUDGET_TOO_SMALL: Neutral
//   - DEADLINE_EXCEEDED of a call that had less than breaker.min_deadline when it
//     started, and messages that this process could not marshal or, on streams,
//     send: Neutral
//   - one of the policy's failure_codes: Failure
//   - another RESOURCE_EXHAUSTED: Dropped if it carries RetryInfo or, on
//     streams, a pushback trailer, else Neutral (it also means "message too large")
//   - everything else: Success
type Outcome uint8

// The outcomes.
const (
	Success Outcome = iota // counts for the breaker
	Failure                // counts against the breaker
	Neutral                // says nothing; the breaker does not see it
	Dropped                // the peer shed load; the breaker does not see it
)

// String returns "success", "failure", "neutral" or "dropped".
func (o Outcome) String() string {
	switch o {
	case Success:
		return "success"
	case Failure:
		return "failure"
	case Neutral:
		return "neutral"
	case Dropped:
		return "dropped"
	}
	return "unknown"
}

// Classifier judges the error (never nil) of an admitted call in place of the
// status code rules of Outcome: it is asked after rejections of this process,
// panics and the caller's cancellation have been judged, and its word is final.
// It must be safe for concurrent use. If it panics or returns anything else than
// an Outcome, the default judgement holds.
type Classifier func(ctx context.Context, side Side, method string, err error) Outcome

// pushbackTrailer is how gRPC's built-in retry is told when to come back, or,
// when negative, not to (gRFC A6).
const pushbackTrailer = "grpc-retry-pushback-ms"

// ending is how an admitted call ended.
type ending struct {
	unwound bool // by a panic or runtime.Goexit on its way up to the caller
	err     error
	cc      *grpc.ClientConn   // of a client call
	req     any                // of a unary client call
	local   bool               // SendMsg made the error: the message never left
	late    bool               // set by judge: the status is DEADLINE_EXCEEDED
	trailer func() metadata.MD // of the status; nil: not known
}

// pushed reports whether the status came with a pushback trailer.
func (e *ending) pushed() bool {
	return e.trailer != nil && len(e.trailer().Get(pushbackTrailer)) > 0
}

// judge applies the rules of Outcome. ctx is the caller's; on the server it has
// the policy's timeout too, because the handler's time is what was spent.
func (c *call) judge(ctx context.Context, e *ending) Outcome {
	switch {
	case e.unwound:
		return Failure
	case e.err != nil:
		return c.judgeError(ctx, e)
	case ctx.Err() == context.Canceled:
		return Neutral
	}
	return Success
}

func (c *call) judgeError(ctx context.Context, e *ending) (out Outcome) {
	// The error is foreign code: its methods may panic.
	defer func() {
		if recover() != nil {
			out = Failure
		}
	}()
	var rejected *RejectedError
	var panicked *panicError
	switch {
	case errors.As(e.err, &rejected):
		return Neutral
	case errors.As(e.err, &panicked):
		return Failure
	case cancelled(ctx), isClosed(e.cc):
		return Neutral
	}
	st, ok := status.FromError(e.err)
	if !ok {
		st = status.FromContextError(e.err)
	}
	e.late = st.Code() == codes.DeadlineExceeded
	if f := c.guard.opts.classifier; f != nil {
		out := Outcome(255)
		c.guard.contain("classifier", func() { out = f(ctx, c.gates.side, c.method, e.err) })
		if out <= Dropped {
			return out
		}
	}
	return c.judgeStatus(ctx, e, st)
}

// result is the judgement in a breaker's words.
func (e *ending) result(ctx context.Context, out Outcome) breaker.Result {
	switch {
	case out == Success:
		return breaker.Success
	case out == Failure && e.late:
		return breaker.Timeout
	case out == Failure:
		return breaker.Failure
	case out == Neutral && e.late:
		return breaker.Expired
	case out == Neutral && ctx.Err() == context.Canceled:
		return breaker.Canceled
	}
	return breaker.Ignored
}

// resetSlack bounds how far apart a server's own timer and the reset of the
// client whose deadline it is may be.
const resetSlack = 20 * time.Millisecond

// cancelled reports whether the caller gave up, rather than ran out of time: at
// its deadline a client resets the stream, often before the server's timer fires.
func cancelled(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ctx.Err() == context.Canceled && (!ok || time.Until(deadline) > resetSlack)
}

func isClosed(cc *grpc.ClientConn) bool {
	return cc != nil && cc.GetState() == connectivity.Shutdown
}

func (c *call) judgeStatus(ctx context.Context, e *ending, st *status.Status) Outcome {
	code := st.Code()
	switch {
	case code == codes.OK:
		return Success
	case code == codes.Canceled && ctx.Err() == context.Canceled:
		code, e.late = codes.DeadlineExceeded, true // or judgeError would have called it cancelled
	}
	info, retryInfo := ownDetails(st)
	if info != nil {
		switch Reason(info.GetReason()) {
		case ReasonRateLimited, ReasonConcurrencyLimited, ReasonQueueTimeout:
			return Dropped
		case ReasonDraining, ReasonBudgetTooSmall:
			return Neutral
		case ReasonBreakerOpen:
			return Failure
		}
	}
	// Without a breaker they only matter to the counts.
	failures, minDeadline := uint32(policy.DefaultFailureCodes), time.Duration(0)
	if b := c.gates.policy.Breaker; b != nil {
		failures, minDeadline = b.FailureCodes, b.MinDeadline
	}
	if t := c.gates.timeout(c.stream); t > 0 {
		minDeadline = min(minDeadline, t)
	}
	switch {
	case code == codes.DeadlineExceeded && c.had(ctx) < minDeadline, e.local, unsendable(code, st.Message(), e.req), tooLarge(code, st.Message()):
		return Neutral
	case failures&(1<<code) != 0:
		return Failure
	case code == codes.ResourceExhausted && (retryInfo || e.pushed()):
		return Dropped
	case code == codes.ResourceExhausted:
		return Neutral
	}
	return Success
}

// had returns how much time the caller gave the call when it started.
func (c *call) had(ctx context.Context) time.Duration {
	if deadline, ok := ctx.Deadline(); ok {
		return deadline.Sub(c.guard.epoch) - c.start
	}
	return math.MaxInt64
}

// ownDetails finds this package's ErrorInfo, and whether there is a RetryInfo.
func ownDetails(st *status.Status) (own *errdetails.ErrorInfo, retryInfo bool) {
	for _, d := range st.Proto().GetDetails() {
		switch {
		case d.MessageIs((*errdetails.ErrorInfo)(nil)):
			info := new(errdetails.ErrorInfo)
			if d.UnmarshalTo(info) == nil && info.GetDomain() == Domain {
				own = info
			}
		case d.MessageIs((*errdetails.RetryInfo)(nil)):
			retryInfo = true
		}
	}
	return own, retryInfo
}

// tooLarge reports whether gRPC, on either side, refused a message for its size.
func tooLarge(code codes.Code, msg string) bool {
	return code == codes.ResourceExhausted && strings.Contains(msg, "larger than max")
}

// unsendable reports whether gRPC refused to marshal the request. The server
// uses the same words when it cannot marshal its response, so the request is
// tried again: only one that really does not marshal was never sent.
func unsendable(code codes.Code, msg string, req any) bool {
	if !unmarshalled(code, msg) {
		return false
	}
	m, ok := req.(proto.Message)
	if !ok {
		return req != nil
	}
	_, err := proto.Marshal(m)
	return err != nil
}

func unmarshalled(code codes.Code, msg string) bool {
	return code == codes.Internal && strings.HasPrefix(msg, "grpc: error while marshaling")
}
