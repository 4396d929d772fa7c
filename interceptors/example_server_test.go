package interceptors_test

import (
	"context"
	"fmt"
	"log"
	"log/slog"
	"net"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// A handler that panics is answered for; nothing of the panic leaves the
// process.
func ExampleGuard_ServerOptions() {
	guard := exampleGuard("server: {}")
	defer guard.Close()

	srv := grpc.NewServer(guard.ServerOptions(grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error {
		panic("the password is 1234")
	}))...)
	defer srv.Stop()
	conn := serveExample(srv)
	defer conn.Close()

	err := conn.Invoke(context.Background(), "/shop.v1.Orders/Place", &emptypb.Empty{}, &emptypb.Empty{})
	fmt.Println(err)
	fmt.Println(guard.Snapshot().Panics)
	// Output:
	// rpc error: code = Internal desc = internal error
	// 1
}

func ExampleWithPanicHandler() {
	guard := exampleGuard("server: {}", interceptors.WithPanicHandler(
		func(_ context.Context, method string, p any, _ []byte) { fmt.Println(method, "panicked:", p) },
	))
	defer guard.Close()

	srv := grpc.NewServer(guard.ServerOptions(grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error {
		panic("no such shelf")
	}))...)
	defer srv.Stop()
	conn := serveExample(srv)
	defer conn.Close()

	_ = conn.Invoke(context.Background(), "/shop.v1.Orders/Place", &emptypb.Empty{}, &emptypb.Empty{})
	// Output: /shop.v1.Orders/Place panicked: no such shelf
}

// What is in front of the guard sees every call, also those it rejects.
func ExampleGuard_UnaryServerInterceptor() {
	guard := exampleGuard(`server: {rules: [{methods: ["/grpc.health.v1.Health/Check"], rate_limit: {requests_per_second: 0.001, burst: 1}}]}`)
	defer guard.Close()

	logging := func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		resp, err := handler(ctx, req)
		fmt.Println(info.FullMethod, status.Code(err))
		return resp, err
	}
	srv := grpc.NewServer(
		grpc.ChainUnaryInterceptor(logging, guard.UnaryServerInterceptor()),
		grpc.ChainStreamInterceptor(guard.StreamServerInterceptor()),
	)
	defer srv.Stop()
	healthpb.RegisterHealthServer(srv, health.NewServer())
	conn := serveExample(srv)
	defer conn.Close()

	for range 2 {
		_, _ = healthpb.NewHealthClient(conn).Check(context.Background(), &healthpb.HealthCheckRequest{})
	}
	// Output:
	// /grpc.health.v1.Health/Check OK
	// /grpc.health.v1.Health/Check ResourceExhausted
}

// A server's rejection says when to come back: in its details for people and
// programs, in a trailer for the retry that is built into gRPC.
func ExampleGuard_StreamServerInterceptor() {
	guard := exampleGuard(`server: {rules: [{methods: ["/grpc.health.v1.Health/Watch"], concurrency_limit: {max_streams: 1}}]}`)
	defer guard.Close()

	srv := grpc.NewServer(grpc.ChainStreamInterceptor(guard.StreamServerInterceptor()))
	defer srv.Stop()
	healthpb.RegisterHealthServer(srv, health.NewServer())
	conn := serveExample(srv)
	defer conn.Close()

	var trailer metadata.MD
	for range 2 {
		watch, err := healthpb.NewHealthClient(conn).Watch(context.Background(), &healthpb.HealthCheckRequest{}, grpc.Trailer(&trailer))
		if err != nil {
			log.Fatal(err)
		}
		_, err = watch.Recv()
		fmt.Println(status.Code(err))
		for _, detail := range status.Convert(err).Details() {
			switch detail := detail.(type) {
			case *errdetails.ErrorInfo:
				fmt.Println(detail.GetDomain(), detail.GetReason())
			case *errdetails.RetryInfo:
				fmt.Println("retry after", detail.GetRetryDelay().AsDuration())
			}
		}
	}
	fmt.Println(len(trailer.Get("grpc-retry-pushback-ms")), "pushback")
	// Output:
	// OK
	// ResourceExhausted
	// grpc-resilience CONCURRENCY_LIMITED
	// retry after 100ms
	// 1 pushback
}

// Serve drains when its context ends or a signal comes: calls in flight are
// answered first.
func ExampleGuard_Serve() {
	guard := exampleGuard("server: {drain: {announce: 0s, grace: 10s}}")
	defer guard.Close()

	ctx, stop := context.WithCancel(context.Background())
	srv := grpc.NewServer(guard.ServerOptions(grpc.UnknownServiceHandler(func(_ any, ss grpc.ServerStream) error {
		stop() // while this call is in flight
		<-guard.Draining()
		return status.Error(codes.NotFound, "no such order")
	}))...)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	served := make(chan error)
	go func() { served <- guard.Serve(ctx, srv, lis) }()

	conn, err := grpc.NewClient(lis.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	err = conn.Invoke(context.Background(), "/shop.v1.Orders/Place", &emptypb.Empty{}, &emptypb.Empty{})
	fmt.Println("the call in flight:", status.Code(err))
	fmt.Println("Serve:", <-served)
	// Output:
	// the call in flight: NotFound
	// Serve: <nil>
}

// Who calls Serve of grpc.Server has Shutdown for the drain.
func ExampleGuard_Shutdown() {
	guard := exampleGuard("server: {drain: {announce: 0s, grace: 10s}}")
	defer guard.Close()

	srv := grpc.NewServer(guard.ServerOptions()...)
	conn := serveExample(srv)
	defer conn.Close()

	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second) // then what still runs is cut
	defer cancel()
	fmt.Println(guard.Shutdown(ctx, srv), guard.Snapshot().Drain.Phase)
	// Output: <nil> stopped
}

// A handler may ask for a drain: Serve then ends as it does after SIGTERM.
func ExampleGuard_Drain() {
	guard := exampleGuard("server: {drain: {announce: 0s}}")
	defer guard.Close()

	srv := grpc.NewServer(guard.ServerOptions()...)
	guard.Drain()
	fmt.Println(guard.Serve(context.Background(), srv, rpctest.Listen()))
	// Output: <nil>
}

// A stream that lives for long ends itself when the server drains, so that its
// client opens another one elsewhere.
func ExampleGuard_Draining() {
	guard := exampleGuard("server: {drain: {announce: 0s, grace: 10s}}")
	defer guard.Close()

	watch := func(_ any, ss grpc.ServerStream) error {
		if err := ss.SendMsg(&emptypb.Empty{}); err != nil {
			return err
		}
		select {
		case <-guard.Draining():
			return status.Error(codes.Unavailable, "this server goes, watch another")
		case <-ss.Context().Done():
			return ss.Context().Err()
		}
	}
	srv := grpc.NewServer(guard.ServerOptions(grpc.UnknownServiceHandler(watch))...)
	conn := serveExample(srv)
	defer conn.Close()

	stream, err := conn.NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, "/shop.v1.Orders/Watch")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("first:", stream.RecvMsg(&emptypb.Empty{}))
	fmt.Println("drain:", guard.Shutdown(context.Background(), srv))
	fmt.Println("last:", status.Convert(stream.RecvMsg(&emptypb.Empty{})).Message())
	// Output:
	// first: <nil>
	// drain: <nil>
	// last: this server goes, watch another
}

// exampleGuard is Parse and New.
// A policy that has a mistake changes nothing; a good one changes living gates.
func ExampleGuard_Reload() {
	guard := exampleGuard("server: {rules: [{methods: ['*'], concurrency_limit: {max_in_flight: 1}}]}")
	defer guard.Close()
	conn := serveExample(rpctest.NewServer(&rpctest.Service{}, guard.ServerOptions()...))
	defer conn.Close()
	limit := func() int {
		if _, err := rpctest.Call(context.Background(), conn, rpctest.Unary, ""); err != nil {
			log.Fatal(err)
		}
		return guard.Snapshot().Methods[0].ConcurrencyLimit.Limit
	}
	fmt.Println(limit())

	policy, err := interceptors.Parse("policy.yaml", []byte("server: {rules: [{methods: ['*'], concurrency_limit: {max_in_flight: 5}}]}"))
	if err != nil {
		log.Fatal(err)
	}
	if err := guard.Reload(policy); err != nil {
		log.Fatal(err)
	}
	fmt.Println(limit())
	fmt.Println(guard.Reload(nil), limit())
	// Output:
	// 1
	// 5
	// policy: found nil, allowed a policy 5
}

func exampleGuard(yaml string, opts ...interceptors.Option) *interceptors.Guard {
	policy, err := interceptors.Parse("policy.yaml", []byte(yaml))
	if err != nil {
		log.Fatal(err)
	}
	guard, err := interceptors.New(policy, append(opts, interceptors.WithLogger(slog.New(slog.DiscardHandler)))...)
	if err != nil {
		log.Fatal(err)
	}
	return guard
}

// serveExample serves srv in memory and connects to it.
func serveExample(srv *grpc.Server) *grpc.ClientConn {
	lis := rpctest.Listen()
	go func() { _ = srv.Serve(lis) }()
	return dialExample(lis)
}
