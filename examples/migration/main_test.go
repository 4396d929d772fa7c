// Package migration holds the code of docs/migration/ and the checks behind the
// README's table, each run against the projects that they speak of.
package migration

import (
	"context"
	"log/slog"
	"net"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	shopv1 "github.com/grpc-resilience/grpc-resilience/examples/shop/v1"
	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

func TestMain(m *testing.M) {
	if os.Getenv(panicsInHystrix) != "" {
		panicInHystrix()
	}
	os.Exit(m.Run())
}

const (
	placeMethod = "/shop.v1.Orders/Place"
	getMethod   = "/shop.v1.Orders/Get"
)

var (
	errDown    = status.Error(codes.Unavailable, "the shop is closed")
	errMissing = status.Error(codes.NotFound, "no such order")
)

// shop is a server that does as it is told; by default it answers.
type shop struct {
	shopv1.UnimplementedOrdersServer
	place func(context.Context) error
	get   func(context.Context) error
	watch func(grpc.ServerStreamingServer[shopv1.WatchResponse]) error

	next atomic.Pointer[func(context.Context) error] // in place of place and get, see from
}

// from tells the shop what its unary methods do from now on; nil: they answer.
func (s *shop) from(f func(context.Context) error) {
	if f == nil {
		f = succeed
	}
	s.next.Store(&f)
}

// unary does as it is told.
func (s *shop) unary(ctx context.Context, f func(context.Context) error) error {
	if next := s.next.Load(); next != nil {
		f = *next
	}
	if f == nil {
		return nil
	}
	return f(ctx)
}

func (s *shop) Place(ctx context.Context, req *shopv1.PlaceRequest) (*shopv1.PlaceResponse, error) {
	if err := s.unary(ctx, s.place); err != nil {
		return nil, err
	}
	return &shopv1.PlaceResponse{Order: &shopv1.Order{Id: "order-1", Customer: req.GetCustomer()}}, nil
}

func (s *shop) Get(ctx context.Context, req *shopv1.GetRequest) (*shopv1.GetResponse, error) {
	if err := s.unary(ctx, s.get); err != nil {
		return nil, err
	}
	return &shopv1.GetResponse{Order: &shopv1.Order{Id: req.GetOrderId()}}, nil
}

func (s *shop) Watch(_ *shopv1.WatchRequest, stream grpc.ServerStreamingServer[shopv1.WatchResponse]) error {
	if s.watch != nil {
		return s.watch(stream)
	}
	return stream.Send(new(shopv1.WatchResponse))
}

// open serves a shop over bufconn and returns a client of it.
func open(t *testing.T, s *shop, server []grpc.ServerOption, client ...grpc.DialOption) shopv1.OrdersClient {
	t.Helper()
	return shopv1.NewOrdersClient(openConn(t, s, server, client...))
}

func openConn(t *testing.T, s *shop, server []grpc.ServerOption, client ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	return connect(t, grpc.NewServer(server...), s, client...)
}

// connect serves a shop on a server over bufconn and dials it.
func connect(t *testing.T, srv *grpc.Server, s *shop, client ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	lis := bufconn.Listen(1 << 20)
	serve(t, lis, srv, s)
	return dial(t, lis, client...)
}

// listen serves a shop on a port of this machine and returns its address.
func listen(t *testing.T, s *shop) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serve(t, lis, grpc.NewServer(), s)
	return lis.Addr().String()
}

func serve(t *testing.T, lis net.Listener, srv *grpc.Server, s *shop) {
	t.Helper()
	shopv1.RegisterOrdersServer(srv, s)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(lis) }()
	t.Cleanup(func() {
		srv.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}

var insecureCreds = grpc.WithTransportCredentials(insecure.NewCredentials())

func dial(t *testing.T, lis *bufconn.Listener, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///shop", append([]grpc.DialOption{
		insecureCreds,
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }),
	}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	})
	return conn
}

func mustGuard(t *testing.T, yaml string, opts ...interceptors.Option) *interceptors.Guard {
	t.Helper()
	p, err := interceptors.Parse("policy.yaml", []byte(yaml))
	if err != nil {
		t.Fatal(err)
	}
	g, err := interceptors.New(p, append([]interceptors.Option{interceptors.WithLogger(slog.New(slog.DiscardHandler))}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	return g
}

// through runs f as the sending of a unary call through a client interceptor.
func through(ctx context.Context, i grpc.UnaryClientInterceptor, method string, f func(context.Context) error) error {
	return i(ctx, method, new(shopv1.PlaceRequest), new(shopv1.PlaceResponse), nil,
		func(ctx context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
			return f(ctx)
		})
}

func succeed(context.Context) error { return nil }

func fail(context.Context) error { return errDown }

// holding is a call that has begun and ends when it is told to.
type holding struct {
	end  chan error // what f returns
	over chan error // what the caller gets
}

// hold begins a call and returns once its f runs; nil if it was refused, with
// the error.
func hold(call func(f func(context.Context) error) error) (*holding, error) {
	h := &holding{end: make(chan error), over: make(chan error, 1)}
	began := make(chan struct{})
	go func() {
		h.over <- call(func(context.Context) error {
			close(began)
			return <-h.end
		})
	}()
	select {
	case <-began:
		return h, nil
	case err := <-h.over:
		return nil, err
	}
}

func mustHold(t *testing.T, call func(f func(context.Context) error) error) *holding {
	t.Helper()
	h, err := hold(call)
	if err != nil {
		t.Fatalf("a call that should begin was refused: %v", err)
	}
	return h
}

// finish ends the call and returns what its caller got.
func (h *holding) finish(err error) error {
	h.end <- err
	return <-h.over
}

// eventually waits for a condition that another goroutine brings about.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !cond(); time.Sleep(100 * time.Microsecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

// goroutines returns the stacks of the goroutines that have all of these words.
func goroutines(words ...string) (found []string) {
	buf := make([]byte, 4<<20)
	for stack := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		has := true
		for _, w := range words {
			has = has && strings.Contains(stack, w)
		}
		if has {
			found = append(found, stack)
		}
	}
	return found
}

// want is for errors that are compared as they are.
func want(t *testing.T, what string, got, want any) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}
