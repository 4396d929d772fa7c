package migration

import (
	"context"
	"errors"
	"log"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/ratelimit"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	shopv1 "github.com/grpc-resilience/grpc-resilience/examples/shop/v1"
	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// What docs/migration/from-go-grpc-middleware.md shows of before.

type limiter struct{ *rate.Limiter }

func (l limiter) Limit(context.Context) error {
	if !l.Allow() {
		return errors.New("too many requests")
	}
	return nil
}

func onPanic(_ context.Context, p any) error {
	log.Printf("panic: %v\n%s", p, debug.Stack())
	return status.Error(codes.Internal, "internal error")
}

func serverOfMiddleware(accessLog grpc.UnaryServerInterceptor) *grpc.Server {
	limit := limiter{rate.NewLimiter(200, 20)}
	srv := grpc.NewServer(
		grpc.ChainUnaryInterceptor(
			accessLog,
			recovery.UnaryServerInterceptor(recovery.WithRecoveryHandlerContext(onPanic)),
			ratelimit.UnaryServerInterceptor(limit),
		),
		grpc.ChainStreamInterceptor(
			recovery.StreamServerInterceptor(recovery.WithRecoveryHandlerContext(onPanic)),
			ratelimit.StreamServerInterceptor(limit),
		),
	)
	return srv
}

// And of after.

func serverOfGuard(accessLog grpc.UnaryServerInterceptor) (*grpc.Server, error) {
	guard, err := interceptors.Load("policy.yaml", interceptors.WithPanicHandler(tellPanic))
	if err != nil {
		return nil, err
	}
	srv := grpc.NewServer(append(
		[]grpc.ServerOption{grpc.ChainUnaryInterceptor(accessLog)}, // outside, as before
		guard.ServerOptions()...,
	)...)
	return srv, nil
}

// The guard has logged it.
func tellPanic(_ context.Context, method string, p any, stack []byte) {
	log.Printf("%s: panic: %v\n%s", method, p, stack)
}

func withOwnLimiter(daily ratelimit.Limiter) (*interceptors.Guard, error) {
	return interceptors.Load("policy.yaml", interceptors.WithLimiter("quota", daily))
}

// The checks.

const middlewarePage = "from-go-grpc-middleware.md"

// inFolder makes a policy the file policy.yaml of the current folder.
func inFolder(t *testing.T, policy string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "policy.yaml"), []byte(policy), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
}

func TestMiddlewarePage(t *testing.T) {
	policy := blocks(t, middlewarePage, "yaml")[0]
	for _, way := range []string{"before", "after"} {
		t.Run(way, func(t *testing.T) {
			inFolder(t, policy)
			log.SetOutput(t.Output())
			t.Cleanup(func() { log.SetOutput(os.Stderr) })
			synctest.Test(t, func(t *testing.T) {
				seen := map[codes.Code]int{}
				accessLog := func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
					resp, err := handler(ctx, req)
					seen[status.Code(err)]++
					return resp, err
				}
				srv := serverOfMiddleware(accessLog)
				if way == "after" {
					var err error
					if srv, err = serverOfGuard(accessLog); err != nil {
						t.Fatal(err)
					}
				}
				orders := shopv1.NewOrdersClient(connect(t, srv, &shop{place: crash}))
				st, _ := refused(t, orders)
				want(t, "a panic", st.Code(), codes.Internal)
				want(t, "its text", st.Message(), "internal error")
				for range 19 {
					_, err := orders.Get(t.Context(), new(shopv1.GetRequest))
					want(t, "one of the burst", err, nil)
				}
				_, err := orders.Get(t.Context(), new(shopv1.GetRequest))
				want(t, "one too many", status.Code(err), codes.ResourceExhausted)
				want(t, "a stream too many", status.Code(watch(t, orders)), codes.ResourceExhausted)
				time.Sleep(5 * time.Millisecond)
				want(t, "a stream after 1/200 s", status.Code(watch(t, orders)), codes.Unknown) // io.EOF
				want(t, "panics in the access log", seen[codes.Internal], 1)
				want(t, "rejections in the access log", seen[codes.ResourceExhausted], 1)
			})
		})
	}
}

func TestOwnLimiter(t *testing.T) {
	inFolder(t, blocks(t, middlewarePage, "yaml")[1])
	g, err := withOwnLimiter(newQuota(1))
	if err != nil {
		t.Fatal(err)
	}
	orders := open(t, new(shop), g.ServerOptions())
	want(t, "a call", placed(t.Context(), orders), nil)
	st, pushed := refused(t, orders)
	want(t, "one too many", st.Code(), codes.ResourceExhausted)
	want(t, "its text has the limiter's error", strings.Contains(st.Message(), errQuota.Error()), false)
	want(t, "RetryInfo", retryInfo(st), false)
	want(t, "pushback trailers", len(pushed), 0)
	if err := g.Close(); err != nil {
		t.Error(err)
	}
}

// Recovery that stays inside of the guard keeps panics from it: it sees an error.
func TestRecoveryInsideOfTheGuard(t *testing.T) {
	told := 0
	g := mustGuard(t, `server: {rules: [{methods: ["*"], breaker: {}}]}`,
		interceptors.WithPanicHandler(func(context.Context, string, any, []byte) { told++ }))
	orders := open(t, &shop{place: crash}, g.ServerOptions(grpc.ChainUnaryInterceptor(recovery.UnaryServerInterceptor())))
	st, _ := refused(t, orders)
	want(t, "the code", st.Code(), codes.Unknown)
	want(t, "panics that the guard was told of", told, 0)
	want(t, "panics in the snapshot", g.Snapshot().Panics, uint64(0))
	want(t, "failures", g.Snapshot().Methods[0].Counts.Failure, uint64(1))
}

// A rule for all methods leaves health checks alone, an interceptor does not.
func TestHealthIsNotLimited(t *testing.T) {
	g := mustGuard(t, blocks(t, middlewarePage, "yaml")[1], externalQuota(0))
	for _, c := range []struct {
		name   string
		server []grpc.ServerOption
		code   codes.Code
	}{
		{"before", []grpc.ServerOption{grpc.ChainUnaryInterceptor(ratelimit.UnaryServerInterceptor(newQuota(0)))}, codes.ResourceExhausted},
		{"after", g.ServerOptions(), codes.OK},
	} {
		t.Run(c.name, func(t *testing.T) {
			srv := grpc.NewServer(c.server...)
			healthpb.RegisterHealthServer(srv, health.NewServer())
			conn := connect(t, srv, new(shop))
			want(t, "an order", status.Code(placed(t.Context(), shopv1.NewOrdersClient(conn))), codes.ResourceExhausted)
			_, err := healthpb.NewHealthClient(conn).Check(t.Context(), new(healthpb.HealthCheckRequest))
			want(t, "a health check", status.Code(err), c.code)
		})
	}
}

// A handler that calls runtime.Goexit is answered by a guard at once; with
// go-grpc-middleware's recovery its client waits until its deadline.
func TestGoexit(t *testing.T) {
	goexit := &shop{place: func(context.Context) error { runtime.Goexit(); return nil }}
	for _, c := range []struct {
		name   string
		server func(t *testing.T) []grpc.ServerOption
		code   codes.Code
		after  time.Duration
	}{
		{"before", func(*testing.T) []grpc.ServerOption {
			return []grpc.ServerOption{grpc.ChainUnaryInterceptor(recovery.UnaryServerInterceptor())}
		}, codes.DeadlineExceeded, time.Hour},
		{"after", func(t *testing.T) []grpc.ServerOption { return mustGuard(t, "server: {}").ServerOptions() }, codes.Internal, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				orders := open(t, goexit, c.server(t))
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				began := time.Now()
				want(t, "the call", status.Code(placed(ctx, orders)), c.code)
				want(t, "it took", time.Since(began), c.after)
			})
		})
	}
}
