package interceptors_test

import (
	"context"
	"errors"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// blowUps are the ways in which a callback or an interceptor ends without
// returning.
var blowUps = map[string]func(){
	"panic":  func() { panic("boom") },
	"Goexit": runtime.Goexit,
}

// survive runs f on a goroutine of its own and returns what it panicked with;
// "Goexit" if it did not return at all.
func survive(f func()) (p any) {
	done := make(chan any)
	go func() {
		p := any("Goexit")
		defer func() {
			if r := recover(); r != nil {
				p = r
			}
			done <- p
		}()
		f()
		p = nil
	}()
	return <-done
}

const placeForOne = strict + ", concurrency_limit: {max_in_flight: 1, max_streams: 1}"

func TestCase17_FurtherInBlowsUp(t *testing.T) {
	for name, blowUp := range blowUps {
		t.Run(name, func(t *testing.T) {
			eachArm(t, func(t *testing.T, a arm) {
				g := mustGuard(t, a.side+": {rules: [{methods: ['*'], "+placeForOne+"}]}")
				boom := func() error {
					return a.byHand(t.Context(), g, func(context.Context) error { blowUp(); return nil })
				}
				p := survive(func() { _ = boom() })
				if recovered := a.side == "server" && name == "panic"; recovered != (p == nil) {
					t.Errorf("%v came through", p)
				}
				a.wantState(t, g, "open")
				wantEnded(t, g, a.sideOf(), a.method, ended{failure: 1})

				time.Sleep(5 * time.Second) // the next one is a probe
				survive(func() { _ = boom() })
				a.wantState(t, g, "open")
				time.Sleep(5 * time.Second)
				if err := a.byHand(t.Context(), g, func(context.Context) error { return nil }); err != nil {
					t.Error(err)
				}
				a.wantState(t, g, "closed")
				wantEnded(t, g, a.sideOf(), a.method, ended{success: 1, failure: 2})
			})
		})
	}
}

// minedStream blows up in one of its methods, "" for none: then opening it does.
type minedStream struct {
	grpc.ClientStream
	method string
	blowUp func()
}

func (s *minedStream) mine(method string) error {
	if s.method == method {
		s.blowUp()
	}
	return nil
}

func (s *minedStream) RecvMsg(any) error            { return s.mine("RecvMsg") }
func (s *minedStream) SendMsg(any) error            { return s.mine("SendMsg") }
func (s *minedStream) Header() (metadata.MD, error) { return metadata.MD{}, s.mine("Header") }

func TestCase17_StreamFurtherInBlowsUp(t *testing.T) {
	for _, method := range []string{"open", "RecvMsg", "SendMsg", "Header"} {
		for name, blowUp := range blowUps {
			t.Run(method+" "+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					g := mustGuard(t, "client: {rules: [{methods: ['*'], "+placeForOne+", stream_timeout: 1h}]}")
					mined := &minedStream{method: method, blowUp: blowUp}
					p := survive(func() {
						s, err := g.StreamClientInterceptor()(context.Background(), rpctest.StreamDesc(rpctest.Bidi), nil, rpctest.Bidi,
							func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, ...grpc.CallOption) (grpc.ClientStream, error) {
								return mined, mined.mine("open")
							})
						if err != nil {
							t.Error(err)
						}
						_ = s.RecvMsg(nil)
						_ = s.SendMsg(nil)
						_, _ = s.Header()
					})
					if p == nil {
						t.Error("it did not come through")
					}
					wantEnded(t, g, interceptors.Client, rpctest.Bidi, ended{failure: 1})
				})
			})
		}
	}
}

func TestCase17_ClassifierBlowsUp(t *testing.T) {
	for name, blowUp := range blowUps {
		t.Run(name, func(t *testing.T) {
			eachArm(t, func(t *testing.T, a arm) {
				classifier := func(context.Context, interceptors.Side, string, error) interceptors.Outcome {
					blowUp()
					return interceptors.Success
				}
				g := mustGuard(t, a.side+": {rules: [{methods: ['*'], "+placeForOne+"}]}", interceptors.WithClassifier(classifier))
				for _, code := range []codes.Code{codes.NotFound, codes.Unavailable} {
					survive(func() {
						_ = a.byHand(t.Context(), g, func(context.Context) error { return status.Error(code, "") })
					})
				}
				want := ended{success: 1, failure: 1} // the default judgement holds
				if name == "Goexit" {
					want = ended{failure: 1} // the second call is rejected
				}
				wantEnded(t, g, a.sideOf(), a.method, want)
			})
		})
	}
}

func TestCase17_LimiterBlowsUp(t *testing.T) {
	for name, blowUp := range blowUps {
		t.Run(name, func(t *testing.T) {
			eachArm(t, func(t *testing.T, a arm) {
				limiter := limiterFunc(func(context.Context) error { blowUp(); return errors.New("full") })
				g := mustGuard(t, a.side+": {rules: [{methods: ['*'], rate_limit: {external: mine}, "+placeForOne+"}]}", interceptors.WithLimiter("mine", limiter))
				p := survive(func() {
					if err := a.byHand(t.Context(), g, func(context.Context) error { return nil }); err != nil {
						t.Errorf("%v: a broken limiter must not take the service down", err)
					}
				})
				want := ended{success: 1}
				if name == "Goexit" { // nothing can keep the goroutine: the call was not made
					want = ended{}
				}
				if p != nil && name == "panic" {
					t.Errorf("%v came through", p)
				}
				wantEnded(t, g, a.sideOf(), a.method, want)
			})
		})
	}
}

// minedHandler is a slog.Handler that panics.
type minedHandler struct{ slog.Handler }

func (minedHandler) Enabled(context.Context, slog.Level) bool  { return true }
func (minedHandler) Handle(context.Context, slog.Record) error { panic("boom") }

func TestCase17_LoggerPanics(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		g := mustGuard(t, a.side+": {rules: [{methods: ['*'], "+placeForOne+"}]}", interceptors.WithLogger(slog.New(minedHandler{})))
		call := func(result error) (err error) {
			if p := survive(func() { err = a.byHand(t.Context(), g, func(context.Context) error { return result }) }); p != nil {
				t.Errorf("%v came through", p)
			}
			return err
		}
		if err := call(status.Error(codes.Unavailable, "")); status.Code(err) != codes.Unavailable {
			t.Error(err)
		}
		a.wantState(t, g, "open") // which was logged
		time.Sleep(5 * time.Second)
		if err := call(nil); err != nil {
			t.Error(err)
		}
		a.wantState(t, g, "closed")
		wantEnded(t, g, a.sideOf(), a.method, ended{success: 1, failure: 1})
	})
}

// exitHandler is a slog.Handler that ends the goroutine at one message.
type exitHandler struct {
	slog.Handler
	at string
}

func (h exitHandler) Handle(_ context.Context, r slog.Record) error {
	if r.Message == h.at {
		runtime.Goexit()
	}
	return nil
}

func (exitHandler) Enabled(context.Context, slog.Level) bool { return true }

func TestCase17_LoggerExitsWhileAProbeIsAdmitted(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		g := mustGuard(t, a.side+": {rules: [{methods: ['*'], "+placeForOne+"}]}",
			interceptors.WithLogger(slog.New(exitHandler{at: "circuit breaker half_open"})))
		call := func(result error) (err error) {
			return a.byHand(t.Context(), g, func(context.Context) error { return result })
		}
		_ = call(status.Error(codes.Unavailable, ""))
		time.Sleep(5 * time.Second)
		if p := survive(func() { _ = call(nil) }); p != "Goexit" {
			t.Errorf("%v came through: the test proves nothing", p)
		}
		wantEnded(t, g, a.sideOf(), a.method, ended{failure: 1}) // the probe was not made
		time.Sleep(5 * time.Second)                              // nor is it waited for any longer
		if err := call(nil); err != nil {
			t.Error(err)
		}
		a.wantState(t, g, "closed")
		wantEnded(t, g, a.sideOf(), a.method, ended{success: 1, failure: 1})
	})
}

// minedMeter is a meter whose histograms blow up.
type minedMeter struct {
	noop.Meter
	blowUp func()
}

type minedHistogram struct {
	noop.Float64Histogram
	blowUp func()
}

type minedProvider struct {
	noop.MeterProvider
	blowUp func()
}

func (p minedProvider) Meter(string, ...metric.MeterOption) metric.Meter {
	return minedMeter{blowUp: p.blowUp}
}

func (m minedMeter) Float64Histogram(string, ...metric.Float64HistogramOption) (metric.Float64Histogram, error) {
	return minedHistogram{blowUp: m.blowUp}, nil
}

func (h minedHistogram) Record(context.Context, float64, ...metric.RecordOption) { h.blowUp() }

func TestCase17_MeterBlowsUpAfterAWait(t *testing.T) {
	for name, blowUp := range blowUps {
		for _, wait := range []string{
			"concurrency_limit: {max_in_flight: 1, max_streams: 1, max_queue: 1}",
			"rate_limit: {requests_per_second: 1, burst: 1, max_wait: 1s}",
		} {
			t.Run(name+"/"+wait, func(t *testing.T) {
				eachArm(t, func(t *testing.T, a arm) {
					g := mustGuard(t, a.side+": {rules: [{methods: ['*'], "+wait+"}]}", interceptors.WithMeterProvider(minedProvider{blowUp: blowUp}))
					call := func() {
						if err := a.byHand(t.Context(), g, func(context.Context) error { time.Sleep(time.Second); return nil }); err != nil {
							t.Error(err)
						}
					}
					var calls sync.WaitGroup
					var exits atomic.Int32
					for range 2 {
						calls.Go(func() {
							switch p := survive(call); p {
							case nil:
							case "Goexit": // nothing can keep the goroutine: the call was not made
								exits.Add(1)
							default:
								t.Errorf("%v came through", p)
							}
						})
					}
					calls.Wait()
					want := map[string]int32{"panic": 0, "Goexit": 1}[name]
					if n := exits.Load(); n != want {
						t.Errorf("%d calls were not made, want %d", n, want)
					}
					wantEnded(t, g, a.sideOf(), a.method, ended{success: 2 - uint64(want)})
				})
			})
		}
	}
}

func TestCase17_InterceptorFurtherInPanics(t *testing.T) {
	// The same through gRPC, with an interceptor of the user's inside of ours.
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, "{client: {rules: [{methods: ['*'], "+placeForOne+"}]}, server: {rules: [{methods: ['*'], "+placeForOne+"}]}}")
		mines := true
		conn := rpctest.Start(t, script(),
			g.ServerOptions(grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
				if mines {
					panic("boom")
				}
				return handler(ctx, req)
			})),
			g.DialOptions(grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
				if mines {
					panic("boom")
				}
				return streamer(ctx, desc, cc, method, opts...)
			})))
		if _, err := rpctest.Call(t.Context(), conn, rpctest.Unary, ""); status.Code(err) != codes.Internal {
			t.Errorf("%v, want INTERNAL", err)
		}
		if p := survive(func() { _, _ = rpctest.Open(t.Context(), conn, rpctest.Bidi) }); p != "boom" {
			t.Errorf("%v came through, want boom", p)
		}
		wantEnded(t, g, interceptors.Server, rpctest.Unary, ended{failure: 1})
		wantEnded(t, g, interceptors.Client, rpctest.Unary, ended{failure: 1})
		wantEnded(t, g, interceptors.Client, rpctest.Bidi, ended{failure: 1})
		mines = false
		time.Sleep(5 * time.Second)
		if _, err := rpctest.Call(t.Context(), conn, rpctest.Unary, ""); err != nil {
			t.Error(err)
		}
		streamOpen(t, t.Context(), conn, rpctest.Bidi, "")
	})
}
