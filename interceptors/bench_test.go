package interceptors_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/limiter"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// hotGates is the policy of the speed budget: every gate, nothing that waits.
const hotGates = `rules: [{methods: ['*'], breaker: {}, rate_limit: {requests_per_second: 10000000, burst: 10000000},
	concurrency_limit: {max_in_flight: 1000000, max_streams: 1000000}}]`

var hotPolicy = "{client: {" + hotGates + "}, server: {" + hotGates + "}}"

// callOnce is a function that makes one guarded call of nothing.
type callOnce func() error

func noInvoke(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
	return nil
}

func unaryClient(g *interceptors.Guard) callOnce {
	intercept, ctx := g.UnaryClientInterceptor(), context.Background()
	return func() error { return intercept(ctx, rpctest.Unary, nil, nil, nil, noInvoke) }
}

func unaryServer(g *interceptors.Guard) callOnce {
	intercept, ctx := g.UnaryServerInterceptor(), context.Background()
	info := &grpc.UnaryServerInfo{FullMethod: rpctest.Unary}
	handler := func(context.Context, any) (any, error) { return nil, nil }
	return func() error {
		_, err := intercept(ctx, nil, info, handler)
		return err
	}
}

// endlessStream is a client stream whose messages are all there.
type endlessStream struct{ grpc.ClientStream }

func (endlessStream) RecvMsg(any) error { return nil }
func (endlessStream) SendMsg(any) error { return nil }

// endedStream is a client stream that has ended.
type endedStream struct{ endlessStream }

func (endedStream) RecvMsg(any) error { return io.EOF }

func openStream(g *interceptors.Guard, s grpc.ClientStream) (grpc.ClientStream, error) {
	streamer := func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, ...grpc.CallOption) (grpc.ClientStream, error) {
		return s, nil
	}
	return g.StreamClientInterceptor()(context.Background(), rpctest.StreamDesc(rpctest.Bidi), nil, rpctest.Bidi, streamer)
}

func streamClient(g *interceptors.Guard) callOnce {
	var s grpc.ClientStream = endedStream{}
	return func() error {
		cs, err := openStream(g, s)
		if err != nil {
			return err
		}
		if err := cs.RecvMsg(nil); err != io.EOF {
			return err
		}
		return nil
	}
}

func streamServer(g *interceptors.Guard) callOnce {
	intercept := g.StreamServerInterceptor()
	info := &grpc.StreamServerInfo{FullMethod: rpctest.Bidi}
	var ss grpc.ServerStream = fakeServerStream{ctx: context.Background()}
	handler := func(any, grpc.ServerStream) error { return nil }
	return func() error { return intercept(nil, ss, info, handler) }
}

// serialAndParallel measures a call in one goroutine, and in one for each CPU on
// the same method.
func serialAndParallel(b *testing.B, call callOnce) {
	b.Run("serial", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := call(); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if err := call(); err != nil {
					b.Fatal(err)
				}
			}
		})
	})
}

func BenchmarkUnaryClient(b *testing.B) {
	serialAndParallel(b, unaryClient(mustGuard(b, hotPolicy)))
}

func BenchmarkUnaryServer(b *testing.B) {
	serialAndParallel(b, unaryServer(mustGuard(b, hotPolicy)))
}

func rejected(call callOnce) callOnce {
	_ = call() // takes the only token
	return func() error {
		if err := call(); err == nil {
			return io.ErrUnexpectedEOF
		}
		return nil
	}
}

const oneToken = "rules: [{methods: ['*'], breaker: {}, rate_limit: {requests_per_second: 0.001, burst: 1}}]"

// BenchmarkEngines is the three gates driven by hand, with the clock: what is
// left for the interceptor is the difference.
func BenchmarkEngines(b *testing.B) {
	epoch := time.Now()
	window := breaker.New(breaker.Config{
		ErrorPercent: 50, RequestVolume: 20, Probes: 1,
		Window: 10 * time.Second, SleepWindow: 5 * time.Second, Lease: 5 * time.Second,
	}, nil)
	bucket := limiter.NewBucket(1e9, 1e7, 0) // two cores take more than the 1e7/s that a policy may ask for
	places := limiter.NewSemaphore(1e6, 0, 0)
	refused := errors.New("refused")
	serialAndParallel(b, func() error {
		now := time.Since(epoch)
		if _, ok := window.Ready(now); !ok || !bucket.Take(now) || !places.TryAcquire() {
			return refused
		}
		ticket, _, ok := window.Acquire(now)
		if !ok {
			return refused
		}
		window.Done(ticket, time.Since(epoch), breaker.Success, false)
		places.Release()
		return nil
	})
}

// A guard with a fallback whose calls succeed: nothing to pay.
func BenchmarkUnaryClientWithFallback(b *testing.B) {
	f := func(context.Context, string, any, any, error) error { return nil }
	serialAndParallel(b, unaryClient(mustGuard(b, hotPolicy, interceptors.WithFallback("*", f))))
}

// BenchmarkLastGood is what learning a reply and answering with it cost, beside
// marshalling the request and the reply once, which every call does.
func BenchmarkLastGood(b *testing.B) {
	ctx := metadata.AppendToOutgoingContext(context.Background(), "authorization", strings.Repeat("x", 100))
	req, reply := wrapperspb.String(strings.Repeat("q", 100)), wrapperspb.String(strings.Repeat("r", 1000))
	invoker := func(result error) grpc.UnaryInvoker {
		return func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return result }
	}
	call := func(g *interceptors.Guard, result error) callOnce {
		intercept, invoke := g.UnaryClientInterceptor(), invoker(result)
		return func() error { return intercept(ctx, rpctest.Unary, req, reply, nil, invoke) }
	}
	config := interceptors.LastGoodConfig{MaxAge: time.Hour, Key: interceptors.WholeRequest}
	ownKey := config
	ownKey.Key = func(context.Context, string, any, []grpc.CallOption) (string, bool) { return "key", true }
	b.Run("none", func(b *testing.B) { serialAndParallel(b, call(mustGuard(b, hotPolicy), nil)) })
	b.Run("learn", func(b *testing.B) {
		serialAndParallel(b, call(mustGuard(b, hotPolicy, interceptors.LastGood("*", config)), nil))
	})
	b.Run("learn, own key", func(b *testing.B) {
		serialAndParallel(b, call(mustGuard(b, hotPolicy, interceptors.LastGood("*", ownKey)), nil))
	})
	b.Run("answer", func(b *testing.B) {
		g := mustGuard(b, clientRules("concurrency_limit: {max_in_flight: 1000}"), interceptors.LastGood("*", config))
		if err := call(g, nil)(); err != nil {
			b.Fatal(err)
		}
		serialAndParallel(b, call(g, errDown))
	})
	b.Run("marshal", func(b *testing.B) {
		serialAndParallel(b, func() error {
			_, err := proto.Marshal(req)
			if err == nil {
				_, err = proto.Marshal(reply)
			}
			return err
		})
	})
}

// BenchmarkLastGoodOverTheWire is a real call, in memory, with and without
// learning.
func BenchmarkLastGoodOverTheWire(b *testing.B) {
	text := strings.Repeat("r", 1000)
	for name, opts := range map[string][]interceptors.Option{
		"none":  nil,
		"learn": {interceptors.LastGood("*", interceptors.LastGoodConfig{MaxAge: time.Hour, Key: interceptors.WholeRequest})},
	} {
		b.Run(name, func(b *testing.B) {
			g := mustGuard(b, hotPolicy, opts...)
			conn := rpctest.Start(b, new(rpctest.Service), nil, g.DialOptions())
			b.ReportAllocs()
			for b.Loop() {
				if _, err := rpctest.Call(b.Context(), conn, rpctest.Unary, text); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
