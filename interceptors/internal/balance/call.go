package balance

import (
	"context"
	"sync/atomic"
)

// Call is the context of a call whose picks need to know more than gRPC tells them. gRPC
// makes the picks of one call one after the other, under contexts made from this one.
type Call struct {
	context.Context
	stream bool                     // its life is no latency
	last   atomic.Pointer[endpoint] // of the attempt before
}

type callKey struct{}

// NewStream returns the context for a stream.
func NewStream(ctx context.Context) *Call { return &Call{Context: ctx, stream: true} }

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
