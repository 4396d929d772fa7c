package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// everything limits whatever it is applied to, so that its touch shows.
const everything = `rules: [{methods: ['*'], timeout: 1m, stream_timeout: 1m, breaker: {}, rate_limit: {requests_per_second: 10000000},
	concurrency_limit: {max_in_flight: 100, max_streams: 100}}]`

// strange are method names that no honest client sends.
var strange = []string{"/", "//", "///", "x", "x/y", "/x", "/x/", "//y", "/x/y/z", "/test.v1.Test/", "/test.v1.Test/None", "/none.v1.None/Unary",
	"/*", "*", "/test.v1.Test/*", "/ / ", "/" + strings.Repeat("x", 4000) + "/" + strings.Repeat("y", 4000)}

func TestCase27_UnknownMethodsLeaveNoStateOnTheServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, "server: {"+everything+"}")
		conn := rpctest.Start(t, &rpctest.Service{}, g.ServerOptions(), nil)
		for _, name := range strange {
			if _, err := rpctest.Call(t.Context(), conn, name, ""); status.Code(err) != codes.Unimplemented {
				t.Errorf("%.30q: %v, want UNIMPLEMENTED", name, err)
			}
		}
		if m := g.Snapshot().Methods; len(m) != 0 {
			t.Errorf("%d methods have state", len(m))
		}
		if _, err := rpctest.Call(t.Context(), conn, rpctest.Unary, ""); err != nil {
			t.Errorf("a method that exists: %v", err)
		}
	})
}

// The names reach the interceptor of a server with an UnknownServiceHandler, and
// those of a client always.
func TestCase27_StrangeNamesAreGuardedLikeOthers(t *testing.T) {
	for _, side := range []string{"client", "server"} {
		t.Run(side, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := mustGuard(t, side+": {"+everything+"}")
				proxy := grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error { return status.Error(codes.NotFound, "no such thing") })
				server, dial := []grpc.ServerOption{proxy}, []grpc.DialOption(nil)
				if side == "client" {
					dial = g.DialOptions()
				} else {
					server = g.ServerOptions(proxy)
				}
				conn := rpctest.Start(t, &rpctest.Service{}, server, dial)
				for _, name := range strange {
					if _, err := rpctest.Call(t.Context(), conn, name, ""); status.Code(err) != codes.NotFound && status.Code(err) != codes.Unimplemented {
						t.Errorf("%.30q: %v", name, err)
					}
				}
				synctest.Wait()
				checkIdle(t, g)
			})
		})
	}
}

// fakeServerStream stands in for gRPC's where a test calls an interceptor by
// hand.
type fakeServerStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s fakeServerStream) Context() context.Context { return s.ctx }

// serve calls the stream interceptor of a server by hand, with a handler that
// does nothing.
func serve(g *interceptors.Guard, method string) error {
	return g.StreamServerInterceptor()(nil, fakeServerStream{ctx: context.Background()}, &grpc.StreamServerInfo{FullMethod: method},
		func(any, grpc.ServerStream) error { return nil })
}

func TestCase27_MemoryIsFlatUnderDistinctNames(t *testing.T) {
	g := mustGuard(t, "server: {"+everything+"}")
	call := func(format string, n int) {
		for i := range n {
			if err := serve(g, fmt.Sprintf(format, i)); err != nil {
				t.Fatal(err)
			}
		}
	}
	call("/s%d.v1.S/M", 5000) // more than get state of their own
	before := heapInUse()
	call("/t%d.v1.T/M", 50_000)
	if grown := heapInUse() - before; grown > 512<<10 {
		t.Errorf("50,000 names more cost %d bytes", grown)
	}
	if n := len(g.Snapshot().Methods); n < 4096 || n > 4097 {
		t.Errorf("%d methods have state, want 4096 and one for all others", n)
	}
	checkIdle(t, g)
}

// A message over the limit is RESOURCE_EXHAUSTED too, but no sign of overload.
func TestCase28_MessageOverTheLimit(t *testing.T) {
	const small, large = 1000, 2000
	text := strings.Repeat("x", large)
	echo := &rpctest.Service{
		Unary: func(_ context.Context, req *rpctest.Message) (*rpctest.Message, error) { return req, nil },
		Stream: func(ss grpc.ServerStream) error {
			in, err := rpctest.Recv(ss)
			if err != nil {
				return err
			}
			return rpctest.Send(ss, in)
		},
	}
	for _, tt := range []struct {
		name   string
		server grpc.ServerOption
		call   grpc.CallOption
	}{
		{"request, server's limit", grpc.MaxRecvMsgSize(small), grpc.MaxCallSendMsgSize(1 << 20)},
		{"request, client's limit", grpc.MaxRecvMsgSize(1 << 20), grpc.MaxCallSendMsgSize(small)},
		{"response, server's limit", grpc.MaxSendMsgSize(small), grpc.MaxCallSendMsgSize(1 << 20)},
		{"response, client's limit", grpc.MaxSendMsgSize(1 << 20), grpc.MaxCallRecvMsgSize(small)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rules := "rules: [{methods: ['*'], breaker: {request_volume_threshold: 1, error_percent_threshold: 1}}]"
				g := mustGuard(t, "{client: {"+rules+"}, server: {"+rules+"}}")
				conn := rpctest.Start(t, echo, g.ServerOptions(tt.server), g.DialOptions(grpc.WithDefaultCallOptions(tt.call)))
				for range 5 {
					for _, a := range arms[:2] {
						if err := a.call(t.Context(), conn, text); status.Code(err) != codes.ResourceExhausted || reasonOf(err) != "" {
							t.Fatalf("%s: %v", a.name, err)
						}
					}
				}
				synctest.Wait()
				for _, m := range g.Snapshot().Methods {
					if m.Breaker.State != "closed" || m.Breaker.Failures != 0 || m.Counts.Failure+m.Counts.Dropped != 0 {
						t.Errorf("%v %s: %+v %+v", m.Side, m.Method, *m.Breaker, m.Counts)
					}
				}
				checkIdle(t, g)
			})
		})
	}
}

func TestCase30_StarNeverMatchesHealthAndReflection(t *testing.T) {
	star := "rules: [{methods: ['*'], rate_limit: {requests_per_second: 0.001, burst: 1}, timeout: 1ms, stream_timeout: 1ms, concurrency_limit: {max_in_flight: 1, max_streams: 1}}]"
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, "{client: {"+star+"}, server: {"+star+"}}")
		conn := startStandard(t, g)
		for range 5 {
			if _, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
				t.Errorf("Check: %v", err)
			}
		}
		for range 3 {
			watch, err := healthpb.NewHealthClient(conn).Watch(t.Context(), &healthpb.HealthCheckRequest{})
			if err == nil {
				_, err = watch.Recv()
			}
			if err != nil {
				t.Errorf("Watch: %v", err)
			}
			if err := reflect(t, conn); err != nil {
				t.Errorf("reflection: %v", err)
			}
		}
		if m := g.Snapshot().Methods; len(m) != 0 {
			t.Errorf("%d methods have state", len(m))
		}
	})
}

func TestCase30_ARuleThatNamesHealthApplies(t *testing.T) {
	for _, pattern := range []string{"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/*"} {
		for _, side := range []string{"client", "server"} {
			t.Run(side+pattern, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					g := mustGuard(t, side+": {rules: [{methods: ['"+pattern+"'], rate_limit: {requests_per_second: 0.001, burst: 1}}]}")
					client := healthpb.NewHealthClient(startStandard(t, g))
					if _, err := client.Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
						t.Fatal(err)
					}
					if _, err := client.Check(t.Context(), &healthpb.HealthCheckRequest{}); reasonOf(err) != interceptors.ReasonRateLimited {
						t.Errorf("the rule did not apply: %v", err)
					}
				})
			})
		}
	}
}

// startStandard serves health and reflection, guarded on both sides.
func startStandard(t *testing.T, g *interceptors.Guard) *grpc.ClientConn {
	t.Helper()
	srv, lis := rpctest.NewServer(&rpctest.Service{}, g.ServerOptions()...), rpctest.Listen()
	healthpb.RegisterHealthServer(srv, health.NewServer())
	reflection.Register(srv)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(lis) }()
	t.Cleanup(func() {
		srv.Stop()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return rpctest.Dial(t, lis, g.DialOptions()...)
}

func reflect(t *testing.T, conn *grpc.ClientConn) error {
	s, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
	if err != nil {
		return err
	}
	list := &reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}
	if err := s.Send(list); err != nil {
		return err
	}
	_, err = s.Recv()
	return errors.Join(err, s.CloseSend())
}
