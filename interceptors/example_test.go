package interceptors_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
)

func ExampleLoad() {
	guard, err := interceptors.Load("testdata/policy.yaml")
	if err != nil {
		log.Fatal(err) // every mistake of the file, each with its line and column
	}
	defer guard.Close()

	fmt.Println(guard.Snapshot().Drain.Phase)
	// Output: serving
}

func ExampleParse() {
	_, err := interceptors.Parse("policy.yaml", []byte(`
client:
  rules:
    - methods: ["/shop.v1.Orders/*"]
      timeout: 2
      rate_limit: {requests_per_second: -1}
`))
	for mistake := range strings.Lines(err.Error()) {
		fmt.Print(mistake)
	}
	// Output:
	// policy.yaml:5:16: client.rules[0].timeout: found 2, allowed a duration with a unit, such as 50ms, 1.5s or 2h, below 290 years
	// policy.yaml:6:41: client.rules[0].rate_limit.requests_per_second: found -1, allowed 0.001 to 10000000
}

// A policy may be built in Go, too.
func ExampleNew() {
	guard, err := interceptors.New(&resiliencev1.Policy{
		Client: &resiliencev1.ClientPolicy{Rules: []*resiliencev1.MethodPolicy{{
			Methods: []string{"/shop.v1.Orders/*"},
			Timeout: durationpb.New(2 * time.Second),
			Breaker: &resiliencev1.Breaker{ErrorPercentThreshold: proto.Uint32(25)},
		}}},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer guard.Close()
	// Output:
}

func ExampleGuard_DialOptions() {
	guard, err := interceptors.Load("testdata/policy.yaml")
	if err != nil {
		log.Fatal(err)
	}
	defer guard.Close()

	conn, err := grpc.NewClient("dns:///shop.example.com:443", guard.DialOptions(
		grpc.WithTransportCredentials(insecure.NewCredentials()), // TLS in earnest
	)...)
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	// Output:
}

// A call that the guard of its own process has rejected is a RejectedError.
func ExampleRejectedError() {
	guard, conn := exampleShop(`
client:
  rules:
    - name: place-order
      methods: ["/shop.v1.Orders/Place"]
      rate_limit: {requests_per_second: 0.001, burst: 1}
`)
	defer guard.Close()
	defer conn.Close()

	place := func() error {
		return conn.Invoke(context.Background(), "/shop.v1.Orders/Place", &emptypb.Empty{}, &emptypb.Empty{})
	}
	fmt.Println("first:", place())

	err := place()
	fmt.Println("second:", errors.Is(err, interceptors.ErrRateLimited), status.Code(err))
	if rejected, ok := errors.AsType[*interceptors.RejectedError](err); ok {
		fmt.Println(rejected.Reason, "by", rejected.Rule, "of the", rejected.Side)
	}
	// Output:
	// first: <nil>
	// second: true ResourceExhausted
	// RATE_LIMITED by place-order of the client
}

// The guard's state is for dashboards and tests.
func ExampleGuard_Snapshot() {
	guard, conn := exampleShop(`
client:
  rules:
    - methods: ["/shop.v1.Orders/*"]
      breaker: {request_volume_threshold: 2}
`)
	defer guard.Close()
	defer conn.Close()

	for range 3 {
		err := conn.Invoke(context.Background(), "/shop.v1.Orders/Fail", &emptypb.Empty{}, &emptypb.Empty{})
		fmt.Println(status.Code(err), errors.Is(err, interceptors.ErrBreakerOpen))
	}
	for _, m := range guard.Snapshot().Methods {
		fmt.Println(m.Side, m.Method, m.Breaker.State, m.Counts.Failure, m.Counts.Rejected)
	}
	// Output:
	// Unavailable false
	// Unavailable false
	// Unavailable true
	// client /shop.v1.Orders/Fail open 2 map[BREAKER_OPEN:1]
}

// NOT_FOUND is a success to a breaker; a classifier can see it otherwise.
func ExampleWithClassifier() {
	missing := func(_ context.Context, _ interceptors.Side, _ string, err error) interceptors.Outcome {
		if status.Code(err) == codes.NotFound {
			return interceptors.Failure
		}
		return interceptors.Neutral
	}
	guard, conn := exampleShop(`
client:
  rules:
    - methods: ["/shop.v1.Orders/*"]
      breaker: {request_volume_threshold: 1}
`, interceptors.WithClassifier(missing))
	defer guard.Close()
	defer conn.Close()

	for range 2 {
		err := conn.Invoke(context.Background(), "/shop.v1.Orders/Missing", &emptypb.Empty{}, &emptypb.Empty{})
		fmt.Println(status.Code(err))
	}
	// Output:
	// NotFound
	// Unavailable
}

// quota is a limiter of one's own, with the interface of go-grpc-middleware.
type quota struct{ left atomic.Int64 }

func (q *quota) Limit(context.Context) error {
	if q.left.Add(-1) < 0 {
		return errors.New("the day's quota is spent")
	}
	return nil
}

func ExampleWithLimiter() {
	daily := new(quota)
	daily.left.Store(1)
	guard, conn := exampleShop(`
client:
  rules:
    - methods: ["/shop.v1.Orders/Place"]
      rate_limit: {external: daily-quota}
`, interceptors.WithLimiter("daily-quota", daily))
	defer guard.Close()
	defer conn.Close()

	for range 2 {
		err := conn.Invoke(context.Background(), "/shop.v1.Orders/Place", &emptypb.Empty{}, &emptypb.Empty{})
		fmt.Println(errors.Is(err, interceptors.ErrRateLimited))
	}
	// Output:
	// false
	// true
}

func ExampleGuard_UnaryClientInterceptor() {
	guard, err := interceptors.Load("testdata/policy.yaml")
	if err != nil {
		log.Fatal(err)
	}
	defer guard.Close()

	// DialOptions puts the guard first; by hand it can stand anywhere in the
	// chain. What is outside of it sees rejections, what is inside does not.
	outside := func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		err := invoker(ctx, method, req, reply, cc, opts...)
		fmt.Println(method, status.Code(err))
		return err
	}
	conn := dialExampleShop(
		grpc.WithChainUnaryInterceptor(outside, guard.UnaryClientInterceptor()),
		grpc.WithChainStreamInterceptor(guard.StreamClientInterceptor()),
	)
	defer conn.Close()

	_ = conn.Invoke(context.Background(), "/shop.v1.Orders/Missing", &emptypb.Empty{}, &emptypb.Empty{})
	// Output: /shop.v1.Orders/Missing NotFound
}

// A stream holds its place until it ends.
func ExampleGuard_StreamClientInterceptor() {
	guard := exampleGuard(`client: {rules: [{methods: ["*"], concurrency_limit: {max_streams: 1}}]}`)
	defer guard.Close()

	conn := dialExampleShop(grpc.WithChainStreamInterceptor(guard.StreamClientInterceptor()))
	defer conn.Close()

	for range 2 {
		_, err := conn.NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, "/shop.v1.Orders/Watch")
		fmt.Println(errors.Is(err, interceptors.ErrConcurrencyLimited))
	}
	// Output:
	// false
	// true
}

// exampleShop guards a client of the shop that the examples share.
func exampleShop(yaml string, opts ...interceptors.Option) (*interceptors.Guard, *grpc.ClientConn) {
	guard := exampleGuard(yaml, opts...)
	return guard, dialExampleShop(guard.DialOptions()...)
}

func dialExampleShop(opts ...grpc.DialOption) *grpc.ClientConn {
	return dialExample(shop(), opts...)
}

func dialExample(lis *bufconn.Listener, opts ...grpc.DialOption) *grpc.ClientConn {
	conn, err := grpc.NewClient("passthrough:///shop", append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }),
	}, opts...)...)
	if err != nil {
		log.Fatal(err)
	}
	return conn
}

// shop is a server whose methods do what their names say. It runs until the
// examples have ended.
var shop = sync.OnceValue(func() *bufconn.Listener {
	lis := rpctest.Listen()
	srv := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, ss grpc.ServerStream) error {
		m := new(emptypb.Empty)
		if err := ss.RecvMsg(m); err != nil {
			return err
		}
		switch method, _ := grpc.Method(ss.Context()); method {
		case "/shop.v1.Orders/Fail":
			return status.Error(codes.Unavailable, "the shop is closed")
		case "/shop.v1.Orders/Missing":
			return status.Error(codes.NotFound, "no such order")
		}
		return ss.SendMsg(m)
	}))
	go func() { _ = srv.Serve(lis) }()
	return lis
})

// The dashboard's stream, mounted where the dashboard looks for it.
func ExampleGuard_HystrixStream() {
	guard := exampleGuard(`server: {rules: [{methods: ["*"], breaker: {}, concurrency_limit: {max_in_flight: 100}}]}`)
	defer guard.Close()
	mux := http.NewServeMux()
	mux.Handle("/hystrix.stream", guard.HystrixStream())
	web := httptest.NewServer(mux)
	defer web.Close()

	srv := grpc.NewServer(guard.ServerOptions(grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error {
		return status.Error(codes.Unavailable, "the shop is closed")
	}))...)
	defer srv.Stop()
	conn := serveExample(srv)
	defer conn.Close()
	for range 20 {
		_ = conn.Invoke(context.Background(), "/shop.v1.Orders/Place", &emptypb.Empty{}, &emptypb.Empty{})
	}

	resp, err := http.Get(web.URL + "/hystrix.stream?delay=500")
	if err != nil {
		log.Fatal(err)
	}
	defer resp.Body.Close()
	event := bufio.NewScanner(resp.Body)
	event.Scan()
	fmt.Println(event.Text()[:len(`data: {"type":"HystrixCommand","name":"shop.v1.Orders/Place"`)])
	fmt.Println(strings.Contains(event.Text(), `"isCircuitBreakerOpen":true`), strings.Contains(event.Text(), `"rollingCountFailure":20`))
	// Output:
	// data: {"type":"HystrixCommand","name":"shop.v1.Orders/Place"
	// true true
}
