package interceptors_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
)

func TestNilGuard(t *testing.T) {
	var g *interceptors.Guard
	for _, a := range arms {
		t.Run(a.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var server []grpc.ServerOption
				var dial []grpc.DialOption
				if a.side == "client" {
					dial = g.DialOptions()
				} else {
					server = g.ServerOptions()
				}
				err := a.call(t.Context(), rpctest.Start(t, clerk(), server, dial), "answer")
				if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "nil *Guard") {
					t.Errorf("got %v", err)
				}
			})
		})
	}
	srv := grpc.NewServer()
	lis := rpctest.Listen()
	for name, err := range map[string]error{
		"Serve":    g.Serve(t.Context(), srv, lis),
		"Shutdown": g.Shutdown(t.Context(), srv),
		"Close":    g.Close(),
	} {
		if err == nil || !strings.Contains(err.Error(), "nil *Guard") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := lis.Dial(); err == nil {
		t.Error("Serve has left the listener open")
	}
	g.Drain()
	if g.Draining() != nil {
		t.Error("Draining is not nil")
	}
	if s := g.Snapshot(); len(s.Methods) != 0 || s.Panics != 0 {
		t.Errorf("Snapshot: %+v", s)
	}
}

func TestClosedGuardStillGuards(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		g, conn := a.setup(t, "rate_limit: {requests_per_second: 1, burst: 1}", clerk())
		for range 3 {
			if err := g.Close(); err != nil {
				t.Error(err)
			}
		}
		if err := a.call(t.Context(), conn, "answer"); err != nil {
			t.Error(err)
		}
		if err := a.call(t.Context(), conn, "answer"); reasonOf(err) != interceptors.ReasonRateLimited {
			t.Errorf("beyond the limit: %v", err)
		}
		srv := grpc.NewServer()
		for name, err := range map[string]error{"Serve": g.Serve(t.Context(), srv, rpctest.Listen()), "Shutdown": g.Shutdown(t.Context(), srv)} {
			if err == nil || !strings.Contains(err.Error(), "closed") {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

func TestNewListsEveryMistake(t *testing.T) {
	limiter := limiterFunc(func(context.Context) error { return nil })
	p := &resiliencev1.Policy{
		Client: &resiliencev1.ClientPolicy{Rules: []*resiliencev1.MethodPolicy{
			{Methods: []string{"nonsense"}, Breaker: &resiliencev1.Breaker{}},
			{Methods: []string{"/a.B/C"}, RateLimit: &resiliencev1.RateLimit{External: "absent-1"}},
			nil,
		}},
		Server: &resiliencev1.ServerPolicy{Rules: []*resiliencev1.MethodPolicy{
			{Methods: []string{"/a.B/C"}, RateLimit: &resiliencev1.RateLimit{External: "absent-2"}},
			{Methods: []string{"/a.B/D"}, RateLimit: &resiliencev1.RateLimit{External: "present"}},
		}},
	}
	g, err := interceptors.New(p, nil,
		interceptors.WithLogger(nil), interceptors.WithMeterProvider(nil), interceptors.WithClassifier(nil), interceptors.WithPanicHandler(nil),
		interceptors.WithSignals(nil), interceptors.WithSignals(os.Interrupt, nil),
		interceptors.WithLimiter("", limiter), interceptors.WithLimiter("none", nil),
		interceptors.WithLimiter("present", limiter), interceptors.WithLimiter("present", limiter),
	)
	if g != nil || err == nil {
		t.Fatalf("got %v, %v", g, err)
	}
	for _, want := range []string{
		"client.rules[0].methods[0]", "nonsense", "option 0 is nil", "WithLogger", "WithMeterProvider", "WithClassifier", "WithPanicHandler", "WithSignals",
		"WithLimiter: the name is empty", `WithLimiter: the limiter "none" is nil`, `WithLimiter: the name "present" is given twice`,
		`client.rules[1].rate_limit.external: found "absent-1"`, `server.rules[0].rate_limit.external: found "absent-2"`, "client.rules[2]",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not have %q:\n%v", want, err)
		}
	}
	if n := strings.Count(err.Error(), "WithSignals"); n != 2 {
		t.Errorf("%d mistakes of WithSignals, want 2", n)
	}
	if strings.Contains(err.Error(), "server.rules[1]") {
		t.Errorf("the limiter that was given is called a mistake:\n%v", err)
	}
}

func TestNilPolicyIsAMistake(t *testing.T) {
	if g, err := interceptors.New(nil); g != nil || err == nil {
		t.Errorf("got %v, %v", g, err)
	}
}

func TestEmptyPolicyIsFine(t *testing.T) {
	g, err := interceptors.New(&resiliencev1.Policy{})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Close(); err != nil {
		t.Error(err)
	}
}

// brokenMeter is a meter that refuses what a field names.
type brokenMeter struct {
	noop.Meter
	instrument, callback error
}

func (m brokenMeter) Float64Histogram(name string, opts ...metric.Float64HistogramOption) (metric.Float64Histogram, error) {
	h, _ := m.Meter.Float64Histogram(name, opts...)
	return h, m.instrument
}

func (m brokenMeter) RegisterCallback(f metric.Callback, instruments ...metric.Observable) (metric.Registration, error) {
	r, _ := m.Meter.RegisterCallback(f, instruments...)
	return r, m.callback
}

type brokenProvider struct {
	noop.MeterProvider
	meter brokenMeter
}

func (p brokenProvider) Meter(string, ...metric.MeterOption) metric.Meter { return p.meter }

func TestNewReportsWhatTheMeterRefuses(t *testing.T) {
	broken := errors.New("broken")
	for _, tt := range []struct {
		meter brokenMeter
		want  error
	}{
		{brokenMeter{instrument: broken}, broken},
		{brokenMeter{callback: broken}, broken},
		{brokenMeter{}, nil},
	} {
		g, err := interceptors.New(&resiliencev1.Policy{}, interceptors.WithMeterProvider(brokenProvider{meter: tt.meter}))
		if !errors.Is(err, tt.want) || (g == nil) != (tt.want != nil) {
			t.Errorf("got %v, %v; want %v", g, err, tt.want)
		}
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	if g, err := interceptors.Load(filepath.Join(dir, "none.yaml")); g != nil || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that does not exist: %v, %v", g, err)
	}
	bad := filepath.Join(dir, "bad.yaml")
	text := "client:\n  rules:\n    - methods: [nonsense]\n      timeout: 2\n      braker: {}\n"
	if err := os.WriteFile(bad, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	g, err := interceptors.Load(bad)
	if g != nil || err == nil {
		t.Fatalf("a bad file: %v, %v", g, err)
	}
	for _, want := range []string{bad + ":3:17: ", bad + ":4:16: ", bad + ":5:7: "} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error has no mistake at %q:\n%v", want, err)
		}
	}
	good := filepath.Join(dir, "good.yaml")
	if err := os.WriteFile(good, []byte("client: {rules: [{methods: ['*'], timeout: 2s}]}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if g, err = interceptors.Load(good); err != nil {
		t.Fatal(err)
	}
	if err := g.Close(); err != nil {
		t.Error(err)
	}
	if g, err := interceptors.Load(good, nil); g != nil || err == nil {
		t.Errorf("a nil option: %v, %v", g, err)
	}
}

// The interceptors may be called by hand, with any name and no channel.
func TestInterceptorsByHand(t *testing.T) {
	g := mustGuard(t, "{client: {"+everything+"}, server: {"+everything+"}}")
	for _, name := range append([]string{"", rpctest.Unary}, strange...) {
		ran := 0
		err := g.UnaryClientInterceptor()(t.Context(), name, nil, nil, nil, func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { ran++; return nil })
		if err != nil {
			t.Errorf("%.20q: %v", name, err)
		}
		if _, err := g.StreamClientInterceptor()(t.Context(), &grpc.StreamDesc{}, nil, name, func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, ...grpc.CallOption) (grpc.ClientStream, error) {
			ran++
			return nil, errors.New("no stream")
		}); err == nil {
			t.Errorf("%.20q: the streamer's error is lost", name)
		}
		if _, err := g.UnaryServerInterceptor()(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: name}, func(context.Context, any) (any, error) { ran++; return nil, nil }); err != nil {
			t.Errorf("%.20q: %v", name, err)
		}
		if err := g.StreamServerInterceptor()(nil, fakeServerStream{ctx: t.Context()}, &grpc.StreamServerInfo{FullMethod: name}, func(any, grpc.ServerStream) error { ran++; return nil }); err != nil {
			t.Errorf("%.20q: %v", name, err)
		}
		if ran != 4 {
			t.Errorf("%.20q: %d of 4 calls ran", name, ran)
		}
	}
	checkIdle(t, g)
}

// The guard is outside of what is added after it, and inside of what is before.
func TestOrderInTheChain(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		var outside, inside atomic.Int32
		g := mustGuard(t, a.side+": {rules: [{methods: ['*'], rate_limit: {requests_per_second: 1, burst: 1}}]}")
		var conn *grpc.ClientConn
		if a.side == "client" {
			u, s := countClient(&inside)
			conn = rpctest.Start(t, clerk(), nil, append(countedDial(&outside), g.DialOptions(grpc.WithChainUnaryInterceptor(u), grpc.WithChainStreamInterceptor(s))...))
		} else {
			u, s := countServer(&inside)
			ou, os := countServer(&outside)
			conn = rpctest.Start(t, clerk(), append([]grpc.ServerOption{grpc.ChainUnaryInterceptor(ou), grpc.ChainStreamInterceptor(os)},
				g.ServerOptions(grpc.ChainUnaryInterceptor(u), grpc.ChainStreamInterceptor(s))...), nil)
		}
		for range 3 {
			_ = a.call(t.Context(), conn, "answer")
		}
		if outside.Load() != 3 || inside.Load() != 1 {
			t.Errorf("outside of the guard %d calls were seen, inside %d; want 3 and the one that was admitted", outside.Load(), inside.Load())
		}
	})
}

func countedDial(n *atomic.Int32) []grpc.DialOption {
	u, s := countClient(n)
	return []grpc.DialOption{grpc.WithChainUnaryInterceptor(u), grpc.WithChainStreamInterceptor(s)}
}

func countClient(n *atomic.Int32) (grpc.UnaryClientInterceptor, grpc.StreamClientInterceptor) {
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			n.Add(1)
			return invoker(ctx, method, req, reply, cc, opts...)
		}, func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			n.Add(1)
			return streamer(ctx, desc, cc, method, opts...)
		}
}

func countServer(n *atomic.Int32) (grpc.UnaryServerInterceptor, grpc.StreamServerInterceptor) {
	return func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			n.Add(1)
			return handler(ctx, req)
		}, func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
			n.Add(1)
			return handler(srv, ss)
		}
}

// A callback that panics is contained, logged once, and the call goes on.
func TestPanickingCallbacks(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		var log bytes.Buffer
		g, conn := a.setup(t, "rate_limit: {external: bad}, breaker: {}, concurrency_limit: {max_in_flight: 1, max_streams: 1}", bothKinds(func(_ context.Context, text string) error {
			if text == "panic" {
				panic("handler")
			}
			return status.Error(codes.Unavailable, "down")
		}),
			interceptors.WithLogger(slog.New(slog.NewTextHandler(&log, nil))),
			interceptors.WithLimiter("bad", limiterFunc(func(context.Context) error { panic("limiter") })),
			interceptors.WithClassifier(func(context.Context, interceptors.Side, string, error) interceptors.Outcome { panic("classifier") }),
			interceptors.WithPanicHandler(func(context.Context, string, any, []byte) { panic("panic handler") }),
		)
		for range 3 {
			if err := a.call(t.Context(), conn, ""); status.Code(err) != codes.Unavailable {
				t.Errorf("got %v, want the handler's error", err)
			}
		}
		if c := a.state(t, g).Counts; c.Failure != 3 {
			t.Errorf("%+v, want the default judgement: 3 failures", c)
		}
		want := []string{"classifier", "limiter bad"}
		if a.side == "server" {
			for range 3 {
				if err := a.call(t.Context(), conn, "panic"); status.Code(err) != codes.Internal {
					t.Errorf("got %v, want INTERNAL", err)
				}
			}
			want = append(want, "panic handler")
		}
		synctest.Wait()
		for _, name := range want {
			if n := strings.Count(log.String(), "callback="+name) + strings.Count(log.String(), `callback="`+name); n != 1 {
				t.Errorf("the panic of the %s was logged %d times, want once:\n%s", name, n, log.String())
			}
		}
		checkIdle(t, g)
	})
}

// panickingLog is a slog.Handler that cannot log.
type panickingLog struct{ slog.Handler }

func (panickingLog) Enabled(context.Context, slog.Level) bool  { return true }
func (panickingLog) Handle(context.Context, slog.Record) error { panic("log") }
func (l panickingLog) WithAttrs([]slog.Attr) slog.Handler      { return l }
func (l panickingLog) WithGroup(string) slog.Handler           { return l }

func TestPanickingLogger(t *testing.T) {
	eachServerArm(t, func(t *testing.T, a arm) {
		g, conn := a.setup(t, "concurrency_limit: {max_in_flight: 1, max_streams: 1}", bothKinds(func(context.Context, string) error { panic("handler") }),
			interceptors.WithLogger(slog.New(panickingLog{})))
		for range 3 {
			if err := a.call(t.Context(), conn, ""); status.Code(err) != codes.Internal {
				t.Errorf("got %v, want INTERNAL", err)
			}
		}
		synctest.Wait()
		checkIdle(t, g)
	})
}

// A test's Fatal in a callback is a Goexit.
func TestGoexitInThePanicHandler(t *testing.T) {
	for name, end := range map[string]func(){"panic": func() { panic("handler") }, "goexit": runtime.Goexit} {
		t.Run(name, func(t *testing.T) {
			eachServerArm(t, func(t *testing.T, a arm) {
				g, conn := a.setup(t, "concurrency_limit: {max_in_flight: 1, max_streams: 1}", bothKinds(func(context.Context, string) error { end(); return nil }),
					interceptors.WithPanicHandler(func(context.Context, string, any, []byte) { runtime.Goexit() }))
				p := a.start(t.Context(), conn, "")
				if !p.ended() || status.Code(p.result().err) != codes.Internal {
					t.Errorf("ended %v: %v, want INTERNAL", p.ended(), p.result().err)
				}
				synctest.Wait()
				checkIdle(t, g)
			})
		})
	}
}

// A guard and its methods have no goroutine: a bubble would report one.
func TestGuardStartsNoGoroutine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		before := runtime.NumGoroutine()
		for range 10 {
			g := mustGuard(t, "{client: {"+everything+"}, server: {"+everything+"}}")
			for _, method := range []string{rpctest.Unary, rpctest.Other} {
				_ = g.UnaryClientInterceptor()(t.Context(), method, nil, nil, nil, func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return nil })
			}
		}
		if n := runtime.NumGoroutine() - before; n > 0 {
			t.Errorf("%d goroutines", n)
		}
	})
}

// ServerOptions bound the handshake: a peer that says nothing would hold a
// graceful stop up for two minutes.
func TestServerOptionsBoundTheHandshake(t *testing.T) {
	for name, extra := range map[string][]grpc.ServerOption{"5s": nil, "1s": {grpc.ConnectionTimeout(time.Second)}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := mustGuard(t, "server: {}")
				srv, lis := rpctest.NewServer(clerk(), g.ServerOptions(extra...)...), rpctest.Listen()
				served := make(chan error)
				go func() { served <- srv.Serve(lis) }()
				silent, err := lis.Dial()
				if err != nil {
					t.Fatal(err)
				}
				defer func(c net.Conn) { _ = c.Close() }(silent)
				synctest.Wait()
				began := time.Now()
				srv.GracefulStop()
				if got := time.Since(began).String(); got != name {
					t.Errorf("the stop took %s, want %s", got, name)
				}
				if err := <-served; err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// Slices of options that users keep are not written to.
func TestOptionsAreNotShared(t *testing.T) {
	g := mustGuard(t, "server: {}")
	mine := make([]grpc.DialOption, 1, 10)
	mine[0] = grpc.WithUserAgent("x")
	a, b := g.DialOptions(mine...), g.DialOptions(mine...)
	if len(a) != 3 || len(b) != 3 || slices.ContainsFunc(mine[:10][1:], func(o grpc.DialOption) bool { return o != nil }) {
		t.Errorf("%d and %d options, mine %v", len(a), len(b), mine[:10])
	}
}
