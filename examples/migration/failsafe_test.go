package migration

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/failsafe-go/failsafe-go/bulkhead"
	"github.com/failsafe-go/failsafe-go/circuitbreaker"
	"github.com/failsafe-go/failsafe-go/failsafegrpc"
	"github.com/failsafe-go/failsafe-go/ratelimiter"
	failsafetimeout "github.com/failsafe-go/failsafe-go/timeout"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	shopv1 "github.com/grpc-resilience/grpc-resilience/examples/shop/v1"
	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// What docs/migration/from-failsafe-go.md shows of before.

func clientOfFailsafe() grpc.DialOption {
	breaker := circuitbreaker.NewBuilder[any]().
		WithFailureRateThreshold(0.5, 20, 10*time.Second).
		WithDelay(5 * time.Second).
		WithSuccessThreshold(1).
		HandleIf(func(_ any, err error) bool {
			switch status.Code(err) {
			case codes.Unavailable, codes.DeadlineExceeded, codes.Internal, codes.Unknown, codes.DataLoss:
				return true
			}
			return false
		}).
		Build()
	return grpc.WithChainUnaryInterceptor(failsafegrpc.NewUnaryClientInterceptor(
		breaker,
		bulkhead.NewBuilder[any](100).WithMaxWaitTime(50*time.Millisecond).Build(),
		failsafetimeout.New[any](2*time.Second),
	))
}

func serverOfFailsafe() grpc.ServerOption {
	return grpc.ChainUnaryInterceptor(failsafegrpc.NewUnaryServerInterceptor[any](
		ratelimiter.NewBursty[any](200, time.Second),
	))
}

func whyFailsafe(err error) error {
	switch {
	case errors.Is(err, circuitbreaker.ErrOpen):
		return errOpen
	case errors.Is(err, bulkhead.ErrFull):
		return errFull
	case errors.Is(err, failsafetimeout.ErrExceeded):
		return errLate
	}
	return err
}

// And of after.

func whyGuard(err error) error {
	switch {
	case errors.Is(err, interceptors.ErrBreakerOpen):
		return errOpen
	case errors.Is(err, interceptors.ErrConcurrencyLimited):
		return errFull
	case status.Code(err) == codes.DeadlineExceeded:
		return errLate
	}
	return err
}

func bothSides(target string, creds grpc.DialOption) (*grpc.ClientConn, *grpc.Server, error) {
	guard, err := interceptors.Load("policy.yaml")
	if err != nil {
		return nil, nil, err
	}
	conn, err := grpc.NewClient(target, guard.DialOptions(creds)...)
	srv := grpc.NewServer(guard.ServerOptions()...)
	return conn, srv, err
}

func retrying(target string, creds grpc.DialOption, guard *interceptors.Guard) (*grpc.ClientConn, error) {
	retry := grpc.WithDefaultServiceConfig(`{"methodConfig": [{
		"name": [{"service": "shop.v1.Orders"}],
		"retryPolicy": {
			"maxAttempts": 3, "initialBackoff": "0.05s", "maxBackoff": "1s", "backoffMultiplier": 2,
			"retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"]
		}
	}]}`)
	return grpc.NewClient(target, guard.DialOptions(creds, retry)...)
}

// The checks.

const failsafePage = "from-failsafe-go.md"

// bothWays runs a test with what a page shows of before and of after: the
// client's side, and what makes of its errors what errOpen and the others are.
// The guard's comes from the page's first policy, and is made in the bubble.
func bothWays(t *testing.T, page string, before func() grpc.DialOption, why func(error) error, test func(t *testing.T, client []grpc.DialOption, why func(error) error)) {
	t.Helper()
	t.Run("before", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) { test(t, []grpc.DialOption{before()}, why) })
	})
	t.Run("after", func(t *testing.T) {
		policy := blocks(t, page, "yaml")[0]
		synctest.Test(t, func(t *testing.T) { test(t, mustGuard(t, policy).DialOptions(), whyGuard) })
	})
}

func TestFailsafePage(t *testing.T) {
	bothWays(t, failsafePage, clientOfFailsafe, whyFailsafe, func(t *testing.T, client []grpc.DialOption, why func(error) error) {
		s := new(shop)
		orders := open(t, s, nil, client...)
		place := func() error { return why(placed(t.Context(), orders)) }

		s.from(func(context.Context) error { time.Sleep(time.Second); return nil })
		results := make(chan error, 100)
		for range cap(results) {
			go func() { results <- place() }()
		}
		synctest.Wait()
		began := time.Now()
		want(t, "one more than a hundred", place(), errFull)
		want(t, "it waited", time.Since(began), 50*time.Millisecond)
		for range cap(results) {
			want(t, "one of a hundred", <-results, nil)
		}

		time.Sleep(time.Minute)
		s.from(func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
		began = time.Now()
		want(t, "a call that hangs", place(), errLate)
		want(t, "it took", time.Since(began), 2*time.Second)

		time.Sleep(time.Minute)
		s.from(missing)
		for range 10 {
			want(t, "NOT_FOUND", status.Code(place()), codes.NotFound)
		}
		s.from(fail)
		for range 10 {
			want(t, "a failure", status.Code(place()), codes.Unavailable)
		}
		want(t, "the call after half of 20 failed", place(), errOpen)
		s.from(nil)
		time.Sleep(5 * time.Second)
		for range 2 {
			want(t, "a call after 5s", place(), nil)
		}
	})
}

func TestFailsafePageServer(t *testing.T) {
	policy := blocks(t, failsafePage, "yaml")[0]
	for _, way := range []string{"before", "after"} {
		t.Run(way, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				server, code := []grpc.ServerOption{serverOfFailsafe()}, codes.Unknown
				if way == "after" {
					server, code = mustGuard(t, policy).ServerOptions(), codes.ResourceExhausted
				}
				orders := open(t, new(shop), server)
				for range 200 {
					want(t, "one of the burst", placed(t.Context(), orders), nil)
				}
				want(t, "one too many", status.Code(placed(t.Context(), orders)), code)
			})
		})
	}
}

func TestBothSides(t *testing.T) {
	inFolder(t, blocks(t, failsafePage, "yaml")[0])
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	conn, srv, err := bothSides(lis.Addr().String(), insecureCreds)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, lis, srv, &shop{place: crash})
	err = placed(t.Context(), shopv1.NewOrdersClient(conn))
	want(t, "the panic of a handler", status.Code(err), codes.Internal)
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
}

// With failsafe-go's breaker outside of its bulkhead, as it should be, a full
// bulkhead opens the breaker; unless HandleIf lets its error pass.
func TestRejectionsAreFailuresToFailsafe(t *testing.T) {
	breaker := circuitbreaker.NewWithDefaults[any]()
	i := failsafegrpc.NewUnaryClientInterceptor[any](breaker, bulkhead.New[any](1))
	call := func(f func(context.Context) error) error { return through(context.Background(), i, placeMethod, f) }
	running := mustHold(t, call)
	want(t, "one too many", call(succeed), bulkhead.ErrFull)
	want(t, "the breaker", breaker.State(), circuitbreaker.OpenState)
	want(t, "the call that runs", running.finish(nil), nil)
}

func TestFailsafeDefaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		breaker := circuitbreaker.NewWithDefaults[any]()
		breaker.RecordFailure()
		want(t, "after one failure", breaker.State(), circuitbreaker.OpenState)
		time.Sleep(time.Minute - time.Nanosecond)
		want(t, "within a minute", breaker.TryAcquirePermit(), false)
		time.Sleep(time.Nanosecond)
		want(t, "after it", breaker.TryAcquirePermit(), true)
	})

	breaker := circuitbreaker.NewBuilder[any]().WithFailureRateThreshold(0.5, 20, 10*time.Second).Build()
	breaker.HalfOpen()
	probes := 0
	for breaker.TryAcquirePermit() {
		probes++
	}
	want(t, "probes of a rate threshold without WithSuccessThreshold", probes, 20)
}

// The policy's timeout begins when the call is admitted; a timeout of failsafe-go
// that stands outside of a bulkhead counts the wait.
func TestTimeoutBeginsAfterTheWait(t *testing.T) {
	waited := func(t *testing.T, i grpc.UnaryClientInterceptor) (atAll time.Duration) {
		first := mustHold(t, func(f func(context.Context) error) error { return through(context.Background(), i, placeMethod, f) })
		began, over := time.Now(), make(chan time.Duration)
		go func() {
			_ = through(context.Background(), i, placeMethod, func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
			over <- time.Since(began)
		}()
		time.Sleep(time.Second)
		want(t, "the first call", first.finish(nil), nil)
		return <-over
	}
	synctest.Test(t, func(t *testing.T) {
		outside := failsafegrpc.NewUnaryClientInterceptor[any](failsafetimeout.New[any](2*time.Second), bulkhead.NewBuilder[any](1).WithMaxWaitTime(time.Minute).Build())
		want(t, "with a timeout outside", waited(t, outside), 2*time.Second)
	})
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, `client: {rules: [{methods: ["*"], timeout: 2s, concurrency_limit: {max_in_flight: 1, max_queue: 1}}]}`)
		want(t, "with the policy's", waited(t, g.UnaryClientInterceptor()), 3*time.Second)
	})
}

// gRPC's own retry is inside of the guard, which sees one call.
func TestRetryOfTheServiceConfig(t *testing.T) {
	g := mustGuard(t, `client: {rules: [{methods: ["*"], breaker: {}}]}`)
	var attempts atomic.Int64
	s := &shop{place: func(context.Context) error {
		if attempts.Add(1) < 3 {
			return errDown
		}
		return nil
	}}
	conn, err := retrying(listen(t, s), insecureCreds, g)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	want(t, "the call", placed(t.Context(), shopv1.NewOrdersClient(conn)), nil)
	want(t, "attempts", attempts.Load(), int64(3))
	c := g.Snapshot().Methods[0].Counts
	want(t, "calls that the guard admitted", c.Admitted, uint64(1))
	want(t, "successes", c.Success, uint64(1))
}
