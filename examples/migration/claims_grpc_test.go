package migration

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/afex/hystrix-go/hystrix"
	"github.com/failsafe-go/failsafe-go/circuitbreaker"
	"github.com/failsafe-go/failsafe-go/failsafegrpc"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/ratelimit"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"github.com/sony/gobreaker/v2"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	shopv1 "github.com/grpc-resilience/grpc-resilience/examples/shop/v1"
	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// Streams

// closing fails every stream after its first message.
func closing(stream grpc.ServerStreamingServer[shopv1.WatchResponse]) error {
	if err := stream.Send(new(shopv1.WatchResponse)); err != nil {
		return err
	}
	return errDown
}

// drainStream receives until the stream ends, and returns how.
func drainStream(stream grpc.ServerStreamingClient[shopv1.WatchResponse]) error {
	for {
		if _, err := stream.Recv(); err != nil {
			return err
		}
	}
}

// watch opens a stream and reads it to its end.
func watch(t *testing.T, orders shopv1.OrdersClient) error {
	stream, err := orders.Watch(t.Context(), new(shopv1.WatchRequest))
	if err != nil {
		return err
	}
	return drainStream(stream)
}

func streamsOfOurs(t *testing.T) {
	client := mustGuard(t, `client: {rules: [{methods: ["*"], breaker: {request_volume_threshold: 1}}]}`)
	orders := open(t, &shop{watch: closing}, nil, client.DialOptions()...)
	want(t, "the stream", status.Code(watch(t, orders)), codes.Unavailable)
	if err := watch(t, orders); !errors.Is(err, interceptors.ErrBreakerOpen) {
		t.Errorf("the next stream: %v, want an open breaker", err)
	}

	server := mustGuard(t, `server: {rules: [{methods: ["*"], concurrency_limit: {max_streams: 1}}]}`)
	began, end := make(chan struct{}), make(chan struct{})
	orders = open(t, &shop{watch: func(grpc.ServerStreamingServer[shopv1.WatchResponse]) error {
		close(began)
		<-end
		return nil
	}}, server.ServerOptions())
	first, err := orders.Watch(t.Context(), new(shopv1.WatchRequest))
	if err != nil {
		t.Fatal(err)
	}
	<-began
	want(t, "a second stream", status.Code(watch(t, orders)), codes.ResourceExhausted)
	close(end)
	want(t, "the first stream", drainStream(first), io.EOF)

	timed := mustGuard(t, `client: {rules: [{methods: ["*"], stream_timeout: 1ms}]}`)
	orders = open(t, &shop{watch: func(stream grpc.ServerStreamingServer[shopv1.WatchResponse]) error {
		<-stream.Context().Done()
		return stream.Context().Err()
	}}, nil, timed.DialOptions()...)
	want(t, "a stream after its time", status.Code(watch(t, orders)), codes.DeadlineExceeded)
}

func streamsOfHystrix(t *testing.T) {
	name := command(t, hystrix.CommandConfig{RequestVolumeThreshold: 1, ErrorPercentThreshold: 1})
	orders := open(t, &shop{watch: closing}, nil)
	var stream grpc.ServerStreamingClient[shopv1.WatchResponse]
	err := hystrix.DoC(t.Context(), name, func(context.Context) (err error) {
		stream, err = orders.Watch(t.Context(), new(shopv1.WatchRequest))
		return err
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	want(t, "the stream", status.Code(drainStream(stream)), codes.Unavailable)
	if r := reported(t, name); r.Successes != 1 || r.Errors != 0 {
		t.Errorf("hystrix-go has counted %+v, want one success", r)
	}
}

func streamsOfFailsafe(t *testing.T) {
	breaker := circuitbreaker.NewWithDefaults[any]()
	breaker.Open()
	orders := open(t, new(shop), nil, grpc.WithChainUnaryInterceptor(failsafegrpc.NewUnaryClientInterceptor[any](breaker)))
	_, err := orders.Place(t.Context(), new(shopv1.PlaceRequest))
	want(t, "a unary call", err, circuitbreaker.ErrOpen)
	want(t, "a stream", watch(t, orders), io.EOF)

	orders = open(t, new(shop), []grpc.ServerOption{grpc.InTapHandle(failsafegrpc.NewServerInHandle[any](breaker))})
	want(t, "a stream that NewServerInHandle refuses", status.Code(watch(t, orders)), codes.PermissionDenied)
	breaker = circuitbreaker.NewWithDefaults[any]() // one failure opens it
	orders = open(t, &shop{watch: closing}, []grpc.ServerOption{grpc.InTapHandle(failsafegrpc.NewServerInHandle[any](breaker))})
	want(t, "a stream that it lets in", status.Code(watch(t, orders)), codes.Unavailable)
	want(t, "failures that it sees", breaker.Metrics().Failures(), uint(0))
	want(t, "the breaker", breaker.State(), circuitbreaker.ClosedState)
}

func streamsOfGobreaker(t *testing.T) {
	orders := open(t, &shop{watch: closing}, nil)
	breaker := gobreaker.NewCircuitBreaker[grpc.ServerStreamingClient[shopv1.WatchResponse]](gobreaker.Settings{})
	stream, err := breaker.Execute(func() (grpc.ServerStreamingClient[shopv1.WatchResponse], error) {
		return orders.Watch(t.Context(), new(shopv1.WatchRequest))
	})
	if err != nil {
		t.Fatal(err)
	}
	want(t, "the stream", status.Code(drainStream(stream)), codes.Unavailable)
	if c := breaker.Counts(); c.TotalSuccesses != 1 || c.TotalFailures != 0 {
		t.Errorf("Execute has counted %+v, want one success", c)
	}

	steps := gobreaker.NewTwoStepCircuitBreaker[any](gobreaker.Settings{})
	done, err := steps.Allow()
	if err != nil {
		t.Fatal(err)
	}
	done(watch(t, orders))
	if c := steps.Counts(); c.TotalSuccesses != 0 || c.TotalFailures != 1 {
		t.Errorf("by hand it has counted %+v, want one failure", c)
	}
}

func streamsOfMiddleware(t *testing.T) {
	orders := open(t, &shop{watch: func(grpc.ServerStreamingServer[shopv1.WatchResponse]) error { panic("boom") }},
		[]grpc.ServerOption{grpc.ChainStreamInterceptor(
			ratelimit.StreamServerInterceptor(newQuota(1)),
			recovery.StreamServerInterceptor(),
		)})
	want(t, "a stream whose handler panics", status.Code(watch(t, orders)), codes.Unknown)
	want(t, "a stream too many", status.Code(watch(t, orders)), codes.ResourceExhausted)
}

// State of one method

// failsOnce is what a breaker that opens at the first failure is shown; it
// returns what the next call of Place, and what one of Get, gets.
func failsOnce(t *testing.T, i grpc.UnaryClientInterceptor) (place, get error) {
	t.Helper()
	want(t, "the failure", through(t.Context(), i, placeMethod, fail), errDown)
	return through(t.Context(), i, placeMethod, succeed), through(t.Context(), i, getMethod, succeed)
}

func methodsOfOurs(t *testing.T) {
	g := mustGuard(t, `client: {rules: [{methods: ["*"], breaker: {request_volume_threshold: 1}}]}`)
	place, get := failsOnce(t, g.UnaryClientInterceptor())
	want(t, "Place is refused", errors.Is(place, interceptors.ErrBreakerOpen), true)
	want(t, "Get", get, nil)
}

func methodsOfHystrix(t *testing.T) {
	place, get := openCircuit(t), command(t, hystrix.CommandConfig{})
	want(t, "Place", hystrix.DoC(t.Context(), place, succeed, nil), error(hystrix.ErrCircuitOpen))
	want(t, "Get", hystrix.DoC(t.Context(), get, succeed, nil), nil)
}

func methodsOfFailsafe(t *testing.T) {
	place, get := failsOnce(t, failsafegrpc.NewUnaryClientInterceptor[any](circuitbreaker.NewWithDefaults[any]()))
	want(t, "Place", place, circuitbreaker.ErrOpen)
	want(t, "Get", get, circuitbreaker.ErrOpen)
}

// onFirst is gobreaker's breaker that opens at the first failure.
func onFirst(s gobreaker.Settings) *gobreaker.CircuitBreaker[any] {
	s.ReadyToTrip = func(c gobreaker.Counts) bool { return c.TotalFailures > 0 }
	return gobreaker.NewCircuitBreaker[any](s)
}

// execute is a unary interceptor of one gobreaker.
func execute(breaker *gobreaker.CircuitBreaker[any]) grpc.UnaryClientInterceptor {
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		_, err := breaker.Execute(func() (any, error) { return nil, invoker(ctx, method, req, reply, cc, opts...) })
		return err
	}
}

func methodsOfGobreaker(t *testing.T) {
	place, get := failsOnce(t, execute(onFirst(gobreaker.Settings{})))
	want(t, "Place", place, gobreaker.ErrOpenState)
	want(t, "Get", get, gobreaker.ErrOpenState)
}

func methodsOfMiddleware(t *testing.T) {
	orders := open(t, new(shop), []grpc.ServerOption{grpc.ChainUnaryInterceptor(ratelimit.UnaryServerInterceptor(newQuota(1)))})
	_, err := orders.Place(t.Context(), new(shopv1.PlaceRequest))
	want(t, "Place", err, nil)
	_, err = orders.Get(t.Context(), new(shopv1.GetRequest))
	want(t, "Get", status.Code(err), codes.ResourceExhausted)
}

// A refused call gets

const pushback = "grpc-retry-pushback-ms"

// refused calls Place, and returns its status, and its trailer's pushback.
func refused(t *testing.T, orders shopv1.OrdersClient) (*status.Status, []string) {
	t.Helper()
	var trailer metadata.MD
	_, err := orders.Place(t.Context(), new(shopv1.PlaceRequest), grpc.Trailer(&trailer))
	if err == nil {
		t.Fatal("the call was not refused")
	}
	return status.Convert(err), trailer.Get(pushback)
}

func retryInfo(st *status.Status) (found bool) {
	for _, d := range st.Details() {
		_, ok := d.(*errdetails.RetryInfo)
		found = found || ok
	}
	return found
}

// bare checks that a refusal is a code and a text.
func bare(t *testing.T, code codes.Code, server []grpc.ServerOption, s *shop) {
	t.Helper()
	st, pushed := refused(t, open(t, s, server))
	want(t, "the code", st.Code(), code)
	want(t, "details", len(st.Details()), 0)
	want(t, "pushback trailers", len(pushed), 0)
}

func refusalOfOurs(t *testing.T) {
	g := mustGuard(t, `
client: {rules: [{methods: ["*"], breaker: {request_volume_threshold: 1}}]}
server: {rules: [{methods: ["*"], rate_limit: {requests_per_second: 0.001, burst: 1}}]}
`)
	limited := open(t, new(shop), g.ServerOptions())
	if _, err := limited.Place(t.Context(), new(shopv1.PlaceRequest)); err != nil {
		t.Fatal(err)
	}
	st, pushed := refused(t, limited)
	want(t, "the limit's code", st.Code(), codes.ResourceExhausted)
	want(t, "RetryInfo of the limit", retryInfo(st), true)
	want(t, "pushback trailers of the limit", len(pushed), 1)

	broken := open(t, &shop{place: fail}, nil, g.DialOptions()...)
	if _, err := broken.Place(t.Context(), new(shopv1.PlaceRequest)); status.Code(err) != codes.Unavailable {
		t.Fatal(err)
	}
	st, _ = refused(t, broken)
	want(t, "the breaker's code", st.Code(), codes.Unavailable)
	want(t, "RetryInfo of the breaker", retryInfo(st), true)
}

func refusalOfHystrix(t *testing.T) {
	name := openCircuit(t)
	bare(t, codes.Unknown, nil, &shop{place: func(ctx context.Context) error { return hystrix.DoC(ctx, name, succeed, nil) }})
}

func refusalOfFailsafe(t *testing.T) {
	breaker := circuitbreaker.NewWithDefaults[any]()
	breaker.Open()
	bare(t, codes.Unknown, []grpc.ServerOption{grpc.ChainUnaryInterceptor(failsafegrpc.NewUnaryServerInterceptor[any](breaker))}, new(shop))

	st, _ := refused(t, open(t, new(shop), nil, grpc.WithChainUnaryInterceptor(failsafegrpc.NewUnaryClientInterceptor[any](breaker))))
	want(t, "the client's code", st.Code(), codes.Unknown)

	bare(t, codes.PermissionDenied, []grpc.ServerOption{grpc.InTapHandle(failsafegrpc.NewServerInHandle[any](breaker))}, new(shop))
}

func refusalOfGobreaker(t *testing.T) {
	breaker := onFirst(gobreaker.Settings{})
	call := execute(breaker)
	want(t, "the failure", through(t.Context(), call, placeMethod, fail), errDown)
	bare(t, codes.Unknown, nil, &shop{place: func(ctx context.Context) error { return through(ctx, call, placeMethod, succeed) }})
}

func refusalOfMiddleware(t *testing.T) {
	server := []grpc.ServerOption{grpc.ChainUnaryInterceptor(ratelimit.UnaryServerInterceptor(newQuota(0)))}
	bare(t, codes.ResourceExhausted, server, new(shop))
	st, _ := refused(t, open(t, new(shop), server))
	want(t, "the limiter's error is in the text", strings.Contains(st.Message(), errQuota.Error()), true)
}

// A client reads of a handler's panic

const secret = "shard-7.db.internal"

func crash(context.Context) error { panic(secret) }

func panicTextOfOurs(t *testing.T) {
	g := mustGuard(t, "server: {}")
	st, _ := refused(t, open(t, &shop{place: crash}, g.ServerOptions()))
	want(t, "the code", st.Code(), codes.Internal)
	want(t, "the text", st.Message(), "internal error")
	if all := st.Proto().String(); strings.Contains(all, secret) || strings.Contains(all, ".go:") {
		t.Errorf("the client reads %s", all)
	}
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetMetadata()["incident"] != "" {
			return
		}
	}
	t.Errorf("no incident id in %v", st.Details())
}

func panicTextOfFailsafe(t *testing.T) {
	i := failsafegrpc.NewUnaryServerInterceptor[any](circuitbreaker.NewWithDefaults[any]())
	defer func() { want(t, "the panic that leaves the interceptor", recover(), secret) }()
	_, err := i(t.Context(), nil, nil, func(ctx context.Context, _ any) (any, error) { return nil, crash(ctx) })
	t.Errorf("it was recovered: %v", err)
}

func panicTextOfMiddleware(t *testing.T) {
	st, _ := refused(t, open(t, &shop{place: crash}, []grpc.ServerOption{grpc.ChainUnaryInterceptor(recovery.UnaryServerInterceptor())}))
	want(t, "the code", st.Code(), codes.Unknown)
	for _, leak := range []string{secret, "claims_grpc_test.go:", "goroutine "} {
		if !strings.Contains(st.Message(), leak) {
			t.Errorf("the client reads no %q in %q", leak, st.Message())
		}
	}
	handler := recovery.WithRecoveryHandler(func(any) error { return status.Error(codes.Internal, "sorry") })
	st, _ = refused(t, open(t, &shop{place: crash}, []grpc.ServerOption{grpc.ChainUnaryInterceptor(recovery.UnaryServerInterceptor(handler))}))
	want(t, "the text of the handler", st.Message(), "sorry")
}

// Drain

func drainOfOurs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, "server: {drain: {announce: 5s, grace: 15s, cut: 5s}}", interceptors.WithSignals()) // a bubble has none
		stuck := make(chan struct{})
		lis := bufconn.Listen(1 << 20)
		srv := grpc.NewServer(g.ServerOptions()...)
		shopv1.RegisterOrdersServer(srv, &shop{
			place: func(context.Context) error { time.Sleep(10 * time.Second); return nil },
			get:   func(context.Context) error { <-stuck; return nil },
		})
		served := make(chan error, 1)
		go func() { served <- g.Serve(t.Context(), srv, lis) }()
		orders := shopv1.NewOrdersClient(dial(t, lis))

		answers := make(chan error, 2)
		go func() {
			_, err := orders.Place(t.Context(), new(shopv1.PlaceRequest))
			answers <- err
		}()
		go func() {
			_, _ = orders.Get(t.Context(), new(shopv1.GetRequest))
			answers <- nil
		}()
		synctest.Wait()
		began := time.Now()
		g.Drain()
		err := <-served
		want(t, "the call in flight", <-answers, nil)
		if took := time.Since(began); took > 25*time.Second {
			t.Errorf("the drain took %v", took)
		}
		if err == nil || !strings.Contains(err.Error(), getMethod) {
			t.Errorf("Serve returned %v, want the name of the method that hangs", err)
		}
		close(stuck)
		<-answers
	})
}
