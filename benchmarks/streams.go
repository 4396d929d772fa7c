package main

import (
	"context"
	"io"
	"runtime"
	"sync/atomic"

	middleware "github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/ratelimit"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

var streamArms = []arm{
	{name: "client stream, bare", make: onClientStream(bareClient)},
	{name: "client stream, no rule for the method", make: ours(onClientStream)},
	{name: "client stream, breaker", gates: breaks, make: ours(onClientStream, breakerBlock)},
	{name: clientStreamArm, gates: three, make: ours(onClientStream, breakerBlock, limitBlocks)},
	{name: "client stream, three gates, engine hystrix", gates: three, paced: true, make: ours(onClientStream, hystrixBlock, limitBlocks)},
	{name: "client stream, go-grpc-middleware reporter", what: "tells a reporter, which does nothing, of each message and of the end.", make: onClientStream(reportClient)},
	{name: "server stream, bare", make: onServerStream(bareServer)},
	{name: "server stream, no rule for the method", make: ours(onServerStream)},
	{name: "server stream, breaker", gates: breaks, make: ours(onServerStream, breakerBlock)},
	{name: serverStreamArm, gates: three, make: ours(onServerStream, breakerBlock, limitBlocks)},
	{name: "server stream, three gates, engine hystrix", gates: three, paced: true, make: ours(onServerStream, hystrixBlock, limitBlocks)},
	{name: "server stream, go-grpc-middleware reporter", make: onServerStream(reportServer)},
	{name: middlewareStream, gates: limited, make: onServerStream(func(l limits) grpc.StreamServerInterceptor {
		recovers, limit := recovery.StreamServerInterceptor(), ratelimit.StreamServerInterceptor(newXRate(l))
		return func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
			return recovers(srv, ss, info, func(srv any, ss grpc.ServerStream) error { return limit(srv, ss, info, handler) })
		}
	})},
}

// messageArms are who sees messages: bare, ours, and go-grpc-middleware's reporter.
var messageArms = []struct {
	name   string
	client func(limits) grpc.StreamClientInterceptor
	server func(limits) grpc.StreamServerInterceptor
}{
	{"bare", bareClient, bareServer},
	{"no rule for the method", func(l limits) grpc.StreamClientInterceptor { return guard(l).StreamClientInterceptor() },
		func(l limits) grpc.StreamServerInterceptor { return guard(l).StreamServerInterceptor() }},
	{"three gates", func(l limits) grpc.StreamClientInterceptor {
		return guard(l, breakerBlock, limitBlocks).StreamClientInterceptor()
	},
		func(l limits) grpc.StreamServerInterceptor {
			return guard(l, breakerBlock, limitBlocks).StreamServerInterceptor()
		}},
	{"go-grpc-middleware reporter", reportClient, reportServer},
}

func bareClient(limits) grpc.StreamClientInterceptor {
	return func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		return streamer(ctx, desc, cc, method, opts...)
	}
}

func bareServer(limits) grpc.StreamServerInterceptor {
	return func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		return handler(srv, ss)
	}
}

func reportClient(limits) grpc.StreamClientInterceptor {
	return middleware.StreamClientInterceptor(noReport{})
}
func reportServer(limits) grpc.StreamServerInterceptor {
	return middleware.StreamServerInterceptor(noReport{})
}

type noReport struct{}

func (noReport) ClientReporter(ctx context.Context, _ middleware.CallMeta) (middleware.Reporter, context.Context) {
	return middleware.NoopReporter{}, ctx
}

func (noReport) ServerReporter(ctx context.Context, _ middleware.CallMeta) (middleware.Reporter, context.Context) {
	return middleware.NoopReporter{}, ctx
}

// clientEnd is a client stream of so many messages that no one counts them, or, with
// an error, of none.
type clientEnd struct {
	grpc.ClientStream
	err error
}

func (s clientEnd) RecvMsg(any) error { return s.err }
func (clientEnd) SendMsg(any) error   { return nil }

type serverEnd struct{ grpc.ServerStream }

func (serverEnd) Context() context.Context     { return served }
func (serverEnd) SendHeader(metadata.MD) error { return nil }
func (serverEnd) RecvMsg(any) error            { return nil }
func (serverEnd) SendMsg(any) error            { return nil }

var (
	bidi     = &grpc.StreamDesc{StreamName: "Stream", ServerStreams: true, ClientStreams: true}
	bidiInfo = &grpc.StreamServerInfo{FullMethod: streamMethod, IsClientStream: true, IsServerStream: true}
)

// onClientStream opens a stream and receives its end.
func onClientStream(intercept func(limits) grpc.StreamClientInterceptor) maker {
	return func(l limits, do func() error) func() error {
		i, ctx := intercept(l), context.Background()
		var over grpc.ClientStream = clientEnd{err: io.EOF}
		streamer := func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, ...grpc.CallOption) (grpc.ClientStream, error) {
			return over, do()
		}
		return func() error {
			s, err := i(ctx, bidi, nil, streamMethod, streamer)
			if err != nil {
				return err
			}
			if err := s.RecvMsg(nil); err != io.EOF {
				return err
			}
			return nil
		}
	}
}

// onServerStream calls a handler.
func onServerStream(intercept func(limits) grpc.StreamServerInterceptor) maker {
	return func(l limits, do func() error) func() error {
		i := intercept(l)
		var ss grpc.ServerStream = serverEnd{}
		handle := func(any, grpc.ServerStream) error { return do() }
		return func() error { return i(nil, ss, bidiInfo, handle) }
	}
}

// messages are those of streams that stay open while the program runs. No two goroutines
// that run together have the same.
func messages() (subjects []subject) {
	for _, by := range messageArms {
		client, server := by.client(wide), by.server(wide)
		cs := func() grpc.ClientStream {
			return must(client(context.Background(), bidi, nil, streamMethod,
				func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, ...grpc.CallOption) (grpc.ClientStream, error) {
					return clientEnd{}, nil
				}))
		}
		ss := func() grpc.ServerStream {
			opened := make(chan grpc.ServerStream)
			go func() {
				_ = server(nil, serverEnd{}, bidiInfo, func(_ any, ss grpc.ServerStream) error {
					opened <- ss
					select {}
				})
			}()
			return <-opened
		}
		for _, m := range []struct {
			name string
			open func() (message func(any) error)
		}{
			{"client receives", func() func(any) error { return cs().RecvMsg }},
			{"client sends", func() func(any) error { return cs().SendMsg }},
			{"server receives", func() func(any) error { return ss().RecvMsg }},
			{"server sends", func() func(any) error { return ss().SendMsg }},
		} {
			var messages []func(any) error
			for range runtime.GOMAXPROCS(0) {
				messages = append(messages, m.open())
			}
			var taken atomic.Uint64
			subjects = append(subjects, subject{name: m.name + ", " + by.name, calls: func() func() error {
				message := messages[taken.Add(1)%uint64(len(messages))]
				return func() error { return message(nil) }
			}})
		}
	}
	return subjects
}
