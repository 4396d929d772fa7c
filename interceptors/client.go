package interceptors

import (
	"context"
	"io"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/balance"
)

// UnaryClientInterceptor guards unary calls, for those who chain by hand;
// DialOptions is the usual way. It sits above gRPC's retries: one call here may
// be several attempts on the server.
func (g *Guard) UnaryClientInterceptor() grpc.UnaryClientInterceptor {
	if g == nil {
		return func(context.Context, string, any, any, *grpc.ClientConn, grpc.UnaryInvoker, ...grpc.CallOption) error {
			return nilGuardStatus()
		}
	}
	return g.unaryClient
}

// StreamClientInterceptor guards streams, for those who chain by hand;
// DialOptions is the usual way. A stream ends, and gives its permit back, when
// RecvMsg, SendMsg or Header fail, at the single response of a stream that the
// server does not stream, when its context ends, or when the channel is closed.
func (g *Guard) StreamClientInterceptor() grpc.StreamClientInterceptor {
	if g == nil {
		return func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, grpc.Streamer, ...grpc.CallOption) (grpc.ClientStream, error) {
			return nil, nilGuardStatus()
		}
	}
	return g.streamClient
}

func nilGuardStatus() error {
	return status.Error(codes.FailedPrecondition, errNilGuard.Error())
}

func (g *Guard) unaryClient(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if g.balancing.on.Load() {
		defer g.lookAtConfig(cc)
	}
	m := g.client.lookup(cc, method)
	if m == nil {
		return invoker(ctx, method, req, reply, cc, opts...)
	}
	c := call{guard: g, gates: m, method: method}
	fs := g.opts.fallbacks
	var q *question
	if fs != nil && fs.learn {
		q = c.ask(ctx, req, cc, opts) // now: interceptors further in may change the request
	}
	out, err := c.unary(ctx, req, reply, cc, invoker, opts)
	switch {
	case fs == nil:
		return err
	case err != nil:
		return c.orFallback(ctx, q, req, reply, cc, out, err)
	case q != nil && out == Success:
		g.contain("LastGood", func() { q.to.learn(q.key, reply, g.now()) })
	}
	return nil
}

// unary takes a unary call through its gates and sends it. A call that was not
// admitted has no outcome: out is Neutral.
func (c *call) unary(ctx context.Context, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts []grpc.CallOption) (out Outcome, err error) {
	if err := c.admit(ctx, c.guard.now()); err != nil {
		return Neutral, err
	}
	e := ending{unwound: true, cc: cc, req: req}
	defer func() { out = c.end(ctx, &e) }()
	callCtx, cancel := c.withTimeout(ctx)
	if cancel != nil {
		defer cancel()
	}
	if c.gates.policy.Retry != nil && c.guard.balancing.balanced.Load() {
		callCtx = balance.NewRetried(callCtx)
	}
	err = invoker(callCtx, c.method, req, reply, cc, opts...)
	e.err, e.unwound = err, false
	return out, err
}

// withTimeout applies the policy's timeout unless the caller's deadline is
// sooner. cancel is nil if there is nothing to apply.
func (c *call) withTimeout(ctx context.Context) (context.Context, context.CancelFunc) {
	timeout := c.gates.timeout(c.stream)
	if timeout == 0 {
		return ctx, nil
	}
	deadline := c.guard.epoch.Add(c.start + timeout)
	if sooner, ok := ctx.Deadline(); ok && !sooner.After(deadline) {
		return ctx, nil
	}
	return context.WithDeadline(ctx, deadline)
}

func (g *Guard) streamClient(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	m := g.client.lookup(cc, method)
	if g.balancing.on.Load() {
		defer g.lookAtConfig(cc)
	}
	if g.balancing.balanced.Load() {
		b := balance.NewStream(ctx, desc.ClientStreams)
		if ctx = b; desc.ClientStreams {
			streamer = balancedStreamer(streamer, b)
		}
	}
	if m == nil {
		return streamer(ctx, desc, cc, method, opts...)
	}
	single := !desc.ServerStreams
	c := call{guard: g, gates: m, method: method, stream: true}
	err := c.admit(ctx, g.now())
	if err != nil {
		return nil, err
	}
	s := &clientStream{streamCall: streamCall{call: c}, cc: cc, single: single, probing: c.ticket.Probe()}
	s.ctx, s.cancel = c.withTimeout(ctx)
	s.inside.Add(1)
	returned := false
	defer s.unwind(&returned)
	// The options are the caller's slice: never append to it in place.
	opts = append(opts[:len(opts):len(opts)], grpc.OnFinish(s.onFinish))
	s.ClientStream, err = streamer(s.ctx, desc, cc, method, opts...)
	returned = true
	if err != nil {
		s.end(ending{err: err})
		return nil, err
	}
	return s, nil
}

// clientStream reports the end of a stream, once, from whichever of its
// methods, gRPC's callback, or a panic sees it first.
type clientStream struct {
	grpc.ClientStream
	cc      *grpc.ClientConn
	ctx     context.Context    // the stream's, with stream_timeout
	cancel  context.CancelFunc // nil without stream_timeout
	single  bool               // one response message ends the stream
	probing bool               // of RecvMsg alone, which is never called concurrently

	inside atomic.Int32 // methods that run now, NewStream included

	streamCall
	finished bool  // gRPC said so in onFinish; guarded by mu
	status   error // with this; guarded by mu
}

// RecvMsg ends the stream with its error, and with the only message of a stream
// that the server does not stream. The first message of a half-open probe is
// its verdict: a stream may live for days.
func (s *clientStream) RecvMsg(m any) error {
	returned := false
	s.inside.Add(1)
	defer s.unwind(&returned)
	err := s.ClientStream.RecvMsg(m)
	returned = true
	switch {
	case err == io.EOF:
		s.end(ending{})
	case err != nil:
		s.end(ending{err: err, local: s.sending(err), trailer: s.Trailer})
	case s.single:
		s.end(ending{})
	case s.probing:
		s.probing = false
		s.answered()
	}
	return err
}

// sending reports whether a RecvMsg was given the error of a SendMsg that runs: gRPC
// ends the stream with a message that does not marshal before SendMsg returns. (A
// server whose response does not marshal while something is sent is taken for it.)
func (s *clientStream) sending(err error) (yes bool) {
	if s.inside.Load() < 2 {
		return false
	}
	defer func() { _ = recover() }() // the error may be foreign code
	st, _ := status.FromError(err)
	return unmarshalled(st.Code(), st.Message())
}

// SendMsg ends the stream with its error, except for io.EOF: then the status is
// still to be had from RecvMsg. What is neither the context's end nor the last
// of gRPC's own attempts (its error wraps io.EOF) was made on this side.
func (s *clientStream) SendMsg(m any) error {
	returned := false
	s.inside.Add(1)
	defer s.unwind(&returned)
	err := s.ClientStream.SendMsg(m)
	returned = true
	if err != nil && err != io.EOF {
		code := status.Code(err)
		s.end(ending{err: err, local: code == codes.Internal || code == codes.ResourceExhausted})
	}
	return err
}

// Header ends the stream with its error. Without headers the stream is over too:
// gRPC keeps the status for RecvMsg, but nobody need call that.
func (s *clientStream) Header() (metadata.MD, error) {
	returned := false
	s.inside.Add(1)
	defer s.unwind(&returned)
	md, err := s.ClientStream.Header()
	returned = true
	if err != nil {
		s.end(ending{err: err})
		return md, err
	}
	s.mu.Lock()
	over, err := md == nil && s.finished, s.status
	s.mu.Unlock()
	if over {
		s.end(ending{err: err, trailer: s.Trailer})
	}
	return md, nil
}

// unwind, deferred by a method, ends the stream when a panic or runtime.Goexit
// passes through it: the caller is not likely to come back.
func (s *clientStream) unwind(returned *bool) {
	s.inside.Add(-1)
	if !*returned {
		s.end(ending{unwound: true})
	}
}

// onFinish is gRPC's word that the stream is over. It is heeded only where no
// method of the stream need ever tell: its context ended, the channel was closed,
// or the service config's timeout ran out while no method was running. Anything
// else may be one attempt of a retrying interceptor further in, for which gRPC
// calls this too: it is kept for Header.
func (s *clientStream) onFinish(err error) {
	if s.ctx.Err() != nil || isClosed(s.cc) || s.inside.Load() == 0 && status.Code(err) == codes.DeadlineExceeded {
		s.end(ending{err: err})
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.finished, s.status = true, err
}

// end is for the first that sees the end. It runs on any goroutine.
func (s *clientStream) end(e ending) {
	if !s.over() {
		return
	}
	if s.cancel != nil {
		defer s.cancel()
	}
	e.cc = s.cc
	s.call.end(s.ctx, &e)
}
