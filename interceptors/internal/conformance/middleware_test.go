package conformance

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/logging"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/ratelimit"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/retry"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/timeout"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/testing/testpb"
	"github.com/stretchr/testify/suite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// ping is the suite's service. Its own Ping writes to a variable that all calls
// share; and its calls can be made to fail a few times.
type ping struct {
	testpb.TestPingService
	failures atomic.Int32 // calls that will fail
	attempts atomic.Int32
}

func (p *ping) fails() error {
	p.attempts.Add(1)
	if p.failures.Add(-1) >= 0 {
		return status.Error(codes.Unavailable, "asked to")
	}
	return nil
}

func (p *ping) Ping(_ context.Context, req *testpb.PingRequest) (*testpb.PingResponse, error) {
	if err := p.fails(); err != nil {
		return nil, err
	}
	return &testpb.PingResponse{Value: req.GetValue()}, nil
}

func (p *ping) PingList(req *testpb.PingListRequest, ss testpb.TestService_PingListServer) error {
	if err := p.fails(); err != nil {
		return err
	}
	return p.TestPingService.PingList(req, ss)
}

// middleware is the suite with a guard on both sides, and with interceptors of
// go-grpc-middleware further in, or without.
type middleware struct {
	*testpb.InterceptorTestSuite
	guard *interceptors.Guard
	ping  *ping
	retry bool
}

const allGates = `
  rules:
    - methods: ["*"]
      timeout: 5s
      stream_timeout: 5s
      minimum_budget: 1ms
      breaker: {request_volume_threshold: 1000}
      rate_limit: {requests_per_second: 10000, max_wait: 1s}
      concurrency_limit: {max_in_flight: 100, max_streams: 100, max_queue: 10, max_queue_wait: 1s}
`

func newMiddleware(t *testing.T) *middleware {
	return &middleware{guard: mustGuard(t, "client:"+allGates+"server:"+allGates), ping: new(ping)}
}

func (s *middleware) run(t *testing.T, server []grpc.ServerOption, client []grpc.DialOption) {
	s.InterceptorTestSuite = &testpb.InterceptorTestSuite{
		TestService: s.ping,
		ServerOpts:  s.guard.ServerOptions(server...),
		ClientOpts:  s.guard.DialOptions(client...),
	}
	suite.Run(t, s)
}

func TestMiddlewareSuite(t *testing.T) {
	newMiddleware(t).run(t, nil, nil)
}

func TestMiddlewareSuiteWithItsInterceptorsInside(t *testing.T) {
	s := newMiddleware(t)
	s.retry = true
	log := logging.LoggerFunc(func(ctx context.Context, level logging.Level, msg string, fields ...any) {
		slog.New(slog.DiscardHandler).Log(ctx, slog.Level(level), msg, fields...)
	})
	again := []retry.CallOption{retry.WithMax(3), retry.WithCodes(codes.Unavailable), retry.WithBackoff(retry.BackoffLinear(time.Millisecond))}
	s.run(t,
		[]grpc.ServerOption{
			grpc.ChainUnaryInterceptor(logging.UnaryServerInterceptor(log), recovery.UnaryServerInterceptor()),
			grpc.ChainStreamInterceptor(logging.StreamServerInterceptor(log), recovery.StreamServerInterceptor()),
		},
		[]grpc.DialOption{
			grpc.WithChainUnaryInterceptor(logging.UnaryClientInterceptor(log), retry.UnaryClientInterceptor(again...), timeout.UnaryClientInterceptor(4*time.Second)),
			grpc.WithChainStreamInterceptor(logging.StreamClientInterceptor(log), serverStreamsOnly(retry.StreamClientInterceptor(again...))),
		})
}

// serverStreamsOnly keeps an interceptor from the streams that it refuses.
func serverStreamsOnly(i grpc.StreamClientInterceptor) grpc.StreamClientInterceptor {
	return func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		if desc.ClientStreams {
			return streamer(ctx, desc, cc, method, opts...)
		}
		return i(ctx, desc, cc, method, streamer, opts...)
	}
}

// ended returns how many calls of a method have ended, by outcome, and checks
// that nothing is left of them.
func (s *middleware) ended(side interceptors.Side, method string) interceptors.CountsSnapshot {
	var c interceptors.CountsSnapshot
	s.Require().Eventually(func() bool { // the server's side ends after the client has its answer
		c = interceptors.CountsSnapshot{}
		for _, m := range s.guard.Snapshot().Methods {
			if m.Side == side && m.Method == method {
				c = m.Counts
				s.Zero(m.RateLimit.Waiting)
				if m.ConcurrencyLimit.InFlight+m.ConcurrencyLimit.Streams+m.ConcurrencyLimit.Queued > 0 {
					return false
				}
			}
		}
		return c.Admitted == c.Success+c.Failure+c.Neutral+c.Dropped
	}, 5*time.Second, time.Millisecond)
	s.Empty(c.Rejected)
	return c
}

// grows checks what f adds to the counts of a method on both sides.
func (s *middleware) grows(method string, client, server interceptors.CountsSnapshot, f func()) {
	was := map[interceptors.Side]interceptors.CountsSnapshot{
		interceptors.Client: s.ended(interceptors.Client, method), interceptors.Server: s.ended(interceptors.Server, method),
	}
	f()
	for side, want := range map[interceptors.Side]interceptors.CountsSnapshot{interceptors.Client: client, interceptors.Server: server} {
		got := s.ended(side, method)
		s.Equal(want.Success, got.Success-was[side].Success, "%v %s: success", side, method)
		s.Equal(want.Failure, got.Failure-was[side].Failure, "%v %s: failure", side, method)
		s.Equal(want.Neutral+want.Dropped, got.Neutral+got.Dropped-was[side].Neutral-was[side].Dropped, "%v %s: neutral and dropped", side, method)
	}
}

func (s *middleware) good(method string, f func()) {
	one := interceptors.CountsSnapshot{Success: 1}
	s.grows(method, one, one, f)
}

func (s *middleware) TestUnary() {
	s.good("/"+testpb.TestServiceFullName+"/PingEmpty", func() {
		_, err := s.Client.PingEmpty(s.SimpleCtx(), &testpb.PingEmptyRequest{})
		s.NoError(err)
	})
	s.good("/"+testpb.TestServiceFullName+"/Ping", func() {
		resp, err := s.Client.Ping(s.SimpleCtx(), &testpb.PingRequest{Value: "hello"})
		s.NoError(err)
		s.Equal("hello", resp.GetValue())
	})
}

func (s *middleware) TestConcurrentUnary() {
	var calls sync.WaitGroup
	for range 20 {
		calls.Go(func() {
			for range 20 {
				_, err := s.Client.Ping(s.T().Context(), &testpb.PingRequest{Value: "hello"})
				s.NoError(err)
			}
		})
	}
	calls.Wait()
	s.ended(interceptors.Client, "/"+testpb.TestServiceFullName+"/Ping")
	s.ended(interceptors.Server, "/"+testpb.TestServiceFullName+"/Ping")
}

func (s *middleware) TestErrorsPassThrough() {
	for _, c := range []struct {
		code    codes.Code
		outcome interceptors.CountsSnapshot
	}{
		{codes.NotFound, interceptors.CountsSnapshot{Success: 1}},
		{codes.InvalidArgument, interceptors.CountsSnapshot{Success: 1}},
		{codes.Internal, interceptors.CountsSnapshot{Failure: 1}},
		{codes.ResourceExhausted, interceptors.CountsSnapshot{Neutral: 1}},
	} {
		s.grows("/"+testpb.TestServiceFullName+"/PingError", c.outcome, c.outcome, func() {
			_, err := s.Client.PingError(s.SimpleCtx(), &testpb.PingErrorRequest{ErrorCodeReturned: uint32(c.code)})
			s.Equal(c.code, status.Code(err))
			s.Equal("Userspace error", status.Convert(err).Message())
		})
	}
	failed := interceptors.CountsSnapshot{Failure: 1}
	s.grows("/"+testpb.TestServiceFullName+"/PingList", failed, failed, func() {
		list, err := s.Client.PingList(s.SimpleCtx(), &testpb.PingListRequest{ErrorCodeReturned: uint32(codes.DataLoss)})
		s.Require().NoError(err)
		_, err = list.Recv()
		s.Equal(codes.DataLoss, status.Code(err))
	})
}

func (s *middleware) receiveList() {
	list, err := s.Client.PingList(s.SimpleCtx(), &testpb.PingListRequest{Value: "hello"})
	s.Require().NoError(err)
	for i := range testpb.ListResponseCount {
		resp, err := list.Recv()
		s.Require().NoError(err)
		s.Equal(int32(i), resp.GetCounter())
	}
	_, err = list.Recv()
	s.Equal(io.EOF, err)
}

func (s *middleware) TestStreams() {
	s.good("/"+testpb.TestServiceFullName+"/PingList", s.receiveList)
	s.good("/"+testpb.TestServiceFullName+"/PingStream", func() {
		bidi, err := s.Client.PingStream(s.SimpleCtx())
		s.Require().NoError(err)
		for i := range 10 {
			s.Require().NoError(bidi.Send(&testpb.PingStreamRequest{Value: "hello"}))
			resp, err := bidi.Recv()
			s.Require().NoError(err)
			s.Equal(int32(i), resp.GetCounter())
		}
		s.NoError(bidi.CloseSend())
		_, err = bidi.Recv()
		s.Equal(io.EOF, err)
	})
	s.good("/"+testpb.TestServiceFullName+"/PingClientStream", func() {
		up, err := s.Client.PingClientStream(s.SimpleCtx())
		s.Require().NoError(err)
		for range 10 {
			s.Require().NoError(up.Send(&testpb.PingClientStreamRequest{Value: "hello"}))
		}
		resp, err := up.CloseAndRecv()
		s.NoError(err)
		s.Equal(int32(10), resp.GetCounter())
	})
}

// However often a retry further in tries, the client's guard sees one call, and
// the server's each attempt.
func (s *middleware) TestRetryFurtherIn() {
	if !s.retry {
		s.T().Skip("without retry")
	}
	third := interceptors.CountsSnapshot{Success: 1, Failure: 2}
	for method, call := range map[string]func(){
		"Ping": func() {
			_, err := s.Client.Ping(s.SimpleCtx(), &testpb.PingRequest{Value: "hello"})
			s.NoError(err)
		},
		"PingList": s.receiveList,
	} {
		s.grows("/"+testpb.TestServiceFullName+"/"+method, interceptors.CountsSnapshot{Success: 1}, third, func() {
			s.ping.attempts.Store(0)
			s.ping.failures.Store(2)
			call()
			s.Equal(int32(3), s.ping.attempts.Load())
		})
	}
}

// quota is a limiter for ratelimit's interceptors: so many calls, then no more.
type quota struct{ left atomic.Int32 }

var _ ratelimit.Limiter = (*quota)(nil)

func (q *quota) Limit(context.Context) error {
	if q.left.Add(-1) < 0 {
		return errors.New("the quota is used up")
	}
	return nil
}

// limited is the suite with a foreign limiter on one side.
type limited struct {
	*testpb.InterceptorTestSuite
	quota *quota
}

func TestMiddlewareLimiterPlugsInByName(t *testing.T) {
	for _, side := range []string{"client", "server"} {
		t.Run(side, func(t *testing.T) {
			q := new(quota)
			g := mustGuard(t, side+": {rules: [{methods: ['*'], rate_limit: {external: quota}}]}", interceptors.WithLimiter("quota", q))
			suite.Run(t, &limited{quota: q, InterceptorTestSuite: &testpb.InterceptorTestSuite{
				TestService: new(ping), ServerOpts: g.ServerOptions(), ClientOpts: g.DialOptions(),
			}})
		})
	}
}

func (s *limited) TestQuota() {
	s.quota.left.Store(3)
	for i := range 5 {
		_, err := s.Client.Ping(s.SimpleCtx(), &testpb.PingRequest{Value: "hello"})
		if want := codes.ResourceExhausted; i < 3 {
			s.NoError(err)
		} else {
			s.Equal(want, status.Code(err))
		}
	}
	s.quota.left.Store(1)
	for i := range 2 {
		list, err := s.Client.PingList(s.SimpleCtx(), &testpb.PingListRequest{Value: "hello"})
		if err == nil {
			_, err = list.Recv()
		}
		s.Equal(i == 1, status.Code(err) == codes.ResourceExhausted, "stream %d: %v", i, err)
	}
}
