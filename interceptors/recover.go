package interceptors

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"slices"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
)

// recovers is go-grpc-middleware's recovery with our handler: its default tells
// the client the panic's text, stack and file paths.
type recovers struct {
	unary  grpc.UnaryServerInterceptor
	stream grpc.StreamServerInterceptor
}

func newRecovers(g *Guard) recovers {
	handle := recovery.WithRecoveryHandlerContext(func(ctx context.Context, p any) error {
		method, _ := grpc.Method(ctx)
		return g.panicked(ctx, method, p)
	})
	return recovers{
		unary:  recovery.UnaryServerInterceptor(handle),
		stream: recovery.StreamServerInterceptor(handle),
	}
}

// leave, deferred, is the end of a call on the server. It answers for a handler or a
// callback that called runtime.Goexit: nobody else would. The status is deferred,
// because the panic handler may call it too.
func (g *Guard) leave(ctx context.Context, rec *record, returned *bool) {
	if *returned {
		rec.end()
		return
	}
	defer rec.end()
	err := newPanicError(*rec.method)
	defer writeStatus(ctx, err.GRPCStatus())
	g.report(ctx, err, ErrGoexit)
}

// panicked reports a panic and returns the error for the client, which says
// nothing but where to look.
func (g *Guard) panicked(ctx context.Context, method string, p any) error {
	err := newPanicError(method)
	g.report(ctx, err, p)
	return err
}

// report counts and logs a panic.
func (g *Guard) report(ctx context.Context, err *panicError, p any) {
	stack := debug.Stack()
	g.panics.Add(1)
	g.contain("logger", func() {
		g.opts.logger.ErrorContext(ctx, "handler panicked",
			"method", err.method, "incident", err.incident, "panic", fmt.Sprint(p), "stack", string(stack))
	})
	if f := g.opts.panicHandler; f != nil {
		g.contain("panic handler", func() { f(ctx, err.method, p, stack) })
	}
}

// panicError is what the client learns of a panic.
type panicError struct{ method, incident string }

func newPanicError(method string) *panicError {
	return &panicError{method: method, incident: fmt.Sprintf("%016x", rand.Uint64())}
}

func (e *panicError) Error() string { return "internal error" }

func (e *panicError) GRPCStatus() *status.Status {
	return withDetails(codes.Internal, e.Error(), &errdetails.ErrorInfo{
		Reason:   reasonPanic,
		Domain:   Domain,
		Metadata: map[string]string{"method": clip(e.method), "incident": e.incident},
	})
}

// settle makes a handler's error fit to be answered: one whose Error method
// panics would take the process down in gRPC's hands; and the RetryInfo of a
// rejection by this process's own client is meant for this process.
func (g *Guard) settle(ctx context.Context, err error) (answer error) {
	if err == nil {
		return nil
	}
	defer func() {
		if p := recover(); p != nil {
			method, _ := grpc.Method(ctx)
			answer = g.panicked(ctx, method, p)
		}
	}()
	st, ok := status.FromError(err)
	if !ok {
		st = status.FromContextError(err) // as gRPC will: it calls err's Is method
	}
	var rejected *RejectedError
	if !errors.As(err, &rejected) || rejected.Side != Client {
		return err
	}
	kept := st.Proto() // a copy
	kept.Details = slices.DeleteFunc(kept.Details, func(d *anypb.Any) bool {
		return d.MessageIs((*errdetails.RetryInfo)(nil))
	})
	return status.FromProto(kept).Err()
}
