package interceptors

import (
	"context"
	"errors"
	"math/rand/v2"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// UnaryServerInterceptor guards unary handlers, for those who chain by hand;
// ServerOptions is the usual way. Recovery of panics is included.
func (g *Guard) UnaryServerInterceptor() grpc.UnaryServerInterceptor {
	if g == nil {
		return func(context.Context, any, *grpc.UnaryServerInfo, grpc.UnaryHandler) (any, error) {
			return nil, nilGuardStatus()
		}
	}
	return g.unaryServer
}

// StreamServerInterceptor guards stream handlers, for those who chain by hand;
// ServerOptions is the usual way. Recovery of panics is included.
func (g *Guard) StreamServerInterceptor() grpc.StreamServerInterceptor {
	if g == nil {
		return func(any, grpc.ServerStream, *grpc.StreamServerInfo, grpc.StreamHandler) error {
			return nilGuardStatus()
		}
	}
	return g.streamServer
}

func (g *Guard) unaryServer(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	now := g.now()
	rec := g.inflight.begin(ctx, &info.FullMethod, now, nil)
	returned := false
	defer g.leave(ctx, rec, &returned)
	resp, err := g.guardUnary(ctx, now, req, info, handler)
	returned = true
	return resp, err
}

func (g *Guard) guardUnary(ctx context.Context, now time.Duration, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, _ error) {
	m, err := g.admitServer(info.FullMethod)
	if err != nil {
		return nil, err
	}
	if m == nil {
		resp, err = g.recovers.unary(ctx, req, info, handler)
		return g.answer(info.FullMethod, resp), g.settle(ctx, err)
	}
	c := call{guard: g, gates: m, method: info.FullMethod}
	if err := c.admit(ctx, now); err != nil {
		return nil, refused(ctx, err)
	}
	ctx, cancel := c.withTimeout(ctx)
	if cancel != nil {
		defer cancel()
	}
	e := ending{unwound: true}
	defer func() { c.end(ctx, &e) }()
	resp, err = g.recovers.unary(ctx, req, info, handler)
	e.err, e.unwound = err, false
	return g.answer(info.FullMethod, resp), g.settle(ctx, err)
}

func (g *Guard) streamServer(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, now := ss.Context(), g.now()
	s := &serverStream{ServerStream: ss, ctx: ctx}
	rec := g.inflight.begin(ctx, &info.FullMethod, now, &s.wire)
	returned := false
	defer g.leave(ctx, rec, &returned)
	err := g.guardStream(ctx, now, srv, s, info, handler)
	returned = true
	return err
}

func (g *Guard) guardStream(ctx context.Context, now time.Duration, srv any, s *serverStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	m, err := g.admitServer(info.FullMethod)
	if err != nil {
		return err
	}
	if m == nil {
		return g.settle(ctx, g.handleStream(srv, s, info, handler))
	}
	c := &s.call
	*c = call{guard: g, gates: m, method: info.FullMethod, stream: true}
	if err := c.admit(ctx, now); err != nil {
		return refused(ctx, err)
	}
	s.probing = c.ticket.Probe()
	var cancel context.CancelFunc
	if s.ctx, cancel = c.withTimeout(ctx); cancel != nil {
		defer cancel()
		defer s.endInTime()()
	}
	e := ending{unwound: true}
	defer func() { s.end(e) }()
	err = g.handleStream(srv, s, info, handler)
	if cancel != nil && s.ctx.Err() == context.DeadlineExceeded {
		err = errStreamTimeout // whatever the handler made of its transport's end
	}
	e.err, e.unwound = err, false
	return g.settle(ctx, err)
}

func (g *Guard) handleStream(srv any, s *serverStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if info.FullMethod != healthWatch {
		return g.recovers.stream(srv, s, info, handler)
	}
	w := g.drain.watch(s)
	defer g.drain.unwatch(w)
	return g.recovers.stream(srv, w, info, handler)
}

// admitServer finds the gates of a method, and refuses new calls in a drain if
// the policy says so.
func (g *Guard) admitServer(method string) (*gates, error) {
	m := g.server.lookup(nil, method)
	if g.drain.policy.Load().RejectNew && g.drain.phase() >= graceful && !isHealth(method) {
		err := &RejectedError{Side: Server, Method: method, Reason: ReasonDraining}
		if m != nil {
			m.counts.rejected[ReasonDraining.index()].Add(1)
			m.recordRejection(ReasonDraining, g)
			err.Rule = m.policy.Rule
		}
		return nil, err
	}
	return m, nil
}

// refused adds the pushback that gRPC's built-in retry obeys, as a trailer: a
// response header would disable that retry.
func refused(ctx context.Context, err error) error {
	r, ok := errors.AsType[*RejectedError](err)
	if !ok {
		return err
	}
	millis := int64(-1) // do not retry
	switch r.Reason {
	case ReasonRateLimited, ReasonConcurrencyLimited, ReasonQueueTimeout:
		if r.RetryAfter == 0 {
			return err // not known: let the client use its own backoff
		}
		// Up to a fifth later, or all who were refused together come back together;
		// never sooner, or it would be in vain.
		after := time.Duration(float64(r.RetryAfter) * (1 + 0.2*rand.Float64()))
		if deadline, ok := ctx.Deadline(); !ok || time.Until(deadline) > after {
			millis = int64((after + time.Millisecond - 1) / time.Millisecond)
		}
	case ReasonBudgetTooSmall:
	default: // a retry must be free to pick another server at once
		return err
	}
	// Fails only if the stream is gone, and then nobody reads the trailer.
	_ = grpc.SetTrailer(ctx, metadata.Pairs(pushbackTrailer, strconv.FormatInt(millis, 10)))
	return err
}

// serverStream is what the handler of a stream sees.
type serverStream struct {
	grpc.ServerStream
	ctx     context.Context // the stream's, with stream_timeout
	probing bool            // of SendMsg alone, which is never called concurrently
	wire    wire

	streamCall // zero if the method has no gates
}

// Context returns the stream's context, which ends at stream_timeout.
func (s *serverStream) Context() context.Context { return s.ctx }

// SendMsg makes the first response of a half-open probe its verdict: a stream
// may live for days.
func (s *serverStream) SendMsg(m any) error {
	if err := s.wire.open(s.ServerStream); err != nil {
		return err
	}
	err := s.ServerStream.SendMsg(m)
	if s.probing && err == nil {
		s.probing = false
		s.answered()
	}
	return err
}

// end is the end of the handler; a goroutine of it may still be in SendMsg.
func (s *serverStream) end(e ending) {
	s.over()
	s.call.end(s.ctx, &e)
}

var errStreamTimeout = status.Error(codes.DeadlineExceeded, "the stream lived for the server's stream_timeout")

// endInTime ends the stream on the wire when its time is over. A handler that
// waits in RecvMsg does not see its wrapped context end; it does see that.
func (s *serverStream) endInTime() (stop func() bool) {
	return context.AfterFunc(s.ctx, func() {
		if s.ctx.Err() == context.DeadlineExceeded {
			s.wire.end(s.ServerStream.Context(), status.Convert(errStreamTimeout))
		}
	})
}

// writeStatus ends a stream from outside of its handler: gRPC then cancels the
// handler's context, fails its RecvMsg and SendMsg, and ignores its result.
func writeStatus(ctx context.Context, st *status.Status) {
	if ts, ok := grpc.ServerTransportStreamFromContext(ctx).(interface {
		WriteStatus(*status.Status) error
	}); ok {
		_ = ts.WriteStatus(st) // fails only if the connection is gone
	}
}

// wire orders the headers of a stream and a status from outside of its handler.
// gRPC does not: a first message that is sent meanwhile would overtake them.
type wire struct {
	opened bool // of SendMsg alone
	ended  atomic.Pointer[status.Status]
	mu     sync.Mutex // held while the headers are sent, or the status is written
}

// open sends the headers before the first message, unless the stream has been
// ended.
func (w *wire) open(ss grpc.ServerStream) error {
	if !w.opened {
		w.opened = true
		w.sendHeader(ss)
	}
	if st := w.ended.Load(); st != nil {
		return st.Err()
	}
	return nil
}

func (w *wire) sendHeader(ss grpc.ServerStream) {
	w.mu.Lock()
	defer w.mu.Unlock()
	_ = ss.SendHeader(nil) // fails if the handler has sent them, or the stream has ended
}

func (w *wire) end(ctx context.Context, st *status.Status) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended.Store(st)
	writeStatus(ctx, st)
}
