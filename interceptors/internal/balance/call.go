package balance

import (
	"context"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/balancer"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
)

// Call is the context of a call whose picks need to know more than gRPC tells them. gRPC
// makes the picks of one call one after the other, under contexts made from this one.
type Call struct {
	context.Context
	stream bool                     // its life is no latency
	sends  bool                     // more than one message, and learns of a failure by io.EOF
	last   atomic.Pointer[endpoint] // of the attempt before
	open   atomic.Pointer[attempt]  // has ended, and how is not known; a copy
}

type callKey struct{}

// NewStream returns the context for a stream. Of one whose client sends several messages
// Ended is to be told how it ended.
func NewStream(ctx context.Context, sends bool) *Call {
	return &Call{Context: ctx, stream: true, sends: sends}
}

// NewRetried returns the context for a unary call that may be retried.
func NewRetried(ctx context.Context) *Call { return &Call{Context: ctx} }

// Value finds the call itself, from the contexts made from it.
func (c *Call) Value(key any) any {
	if key == (callKey{}) {
		return c
	}
	return c.Context.Value(key)
}

// callOf returns nil for a call that may be made without a Call.
func callOf(ctx context.Context) *Call {
	c, _ := ctx.Value(callKey{}).(*Call)
	return c
}

// Ended is told the status of a stream that has ended, nil for OK. When a SendMsg finds
// that the stream is over, gRPC ends the attempt with io.EOF, which it then takes for
// success: the status is known to RecvMsg alone.
func (c *Call) Ended(err error) {
	if a := c.open.Swap(nil); a != nil {
		a.judge(balancer.DoneInfo{Err: err, BytesSent: true, BytesReceived: true}, a.pool.group.hooks.Now())
	}
}

// retried settles the attempt before: whatever its status was, it was worth another one.
func (c *Call) retried(now time.Duration) {
	if a := c.open.Swap(nil); a != nil {
		a.settle(now, Failure)
	}
}

// settle tells the endpoint's breaker.
func (e *endpoint) settle(t breaker.Ticket, now time.Duration, r breaker.Result, slow bool) {
	if b := e.gate.Load().breaker; b != nil {
		b.Done(t, now, r, slow)
	}
}
