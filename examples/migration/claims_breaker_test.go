package migration

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/afex/hystrix-go/hystrix"
	"github.com/failsafe-go/failsafe-go/circuitbreaker"
	"github.com/failsafe-go/failsafe-go/failsafegrpc"
	"github.com/sony/gobreaker/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	shopv1 "github.com/grpc-resilience/grpc-resilience/examples/shop/v1"
	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// NOT_FOUND is a failure

func missing(context.Context) error { return errMissing }

func notFoundOfOurs(t *testing.T) {
	g := mustGuard(t, `client: {rules: [{methods: ["*"], breaker: {request_volume_threshold: 1, error_percent_threshold: 1}}]}`)
	for range 100 {
		want(t, "every call", through(t.Context(), g.UnaryClientInterceptor(), placeMethod, missing), errMissing)
	}
}

func notFoundOfHystrix(t *testing.T) {
	name := command(t, hystrix.CommandConfig{RequestVolumeThreshold: 1, ErrorPercentThreshold: 1, SleepWindow: minute})
	want(t, "the call", hystrix.DoC(t.Context(), name, missing, nil), errMissing)
	opened(t, name)
}

// unlessCode makes failsafe-go take a status code for no failure.
func unlessCode(code codes.Code) circuitbreaker.CircuitBreaker[any] {
	return circuitbreaker.NewBuilder[any]().HandleIf(func(_ any, err error) bool {
		return err != nil && status.Code(err) != code
	}).Build()
}

func notFoundOfFailsafe(t *testing.T) {
	breaker := circuitbreaker.NewWithDefaults[any]()
	want(t, "the call", through(t.Context(), failsafegrpc.NewUnaryClientInterceptor[any](breaker), placeMethod, missing), errMissing)
	want(t, "by default", breaker.State(), circuitbreaker.OpenState)

	breaker = unlessCode(codes.NotFound)
	want(t, "the call", through(t.Context(), failsafegrpc.NewUnaryClientInterceptor[any](breaker), placeMethod, missing), errMissing)
	want(t, "with HandleIf", breaker.State(), circuitbreaker.ClosedState)
}

func notFoundOfGobreaker(t *testing.T) {
	breaker := onFirst(gobreaker.Settings{})
	want(t, "the call", through(t.Context(), execute(breaker), placeMethod, missing), errMissing)
	want(t, "by default", breaker.State(), gobreaker.StateOpen)

	breaker = onFirst(gobreaker.Settings{IsSuccessful: func(err error) bool { return err == nil || status.Code(err) == codes.NotFound }})
	want(t, "the call", through(t.Context(), execute(breaker), placeMethod, missing), errMissing)
	want(t, "with IsSuccessful", breaker.State(), gobreaker.StateClosed)
}

// The caller's cancel is a failure

// cancelled makes a call that its caller cancels when the server has it.
func cancelled(t *testing.T, call func(ctx context.Context, orders shopv1.OrdersClient) error, client ...grpc.DialOption) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	orders := open(t, &shop{place: func(ctx context.Context) error {
		cancel()
		<-ctx.Done()
		return ctx.Err()
	}}, nil, client...)
	want(t, "the code", status.Code(call(ctx, orders)), codes.Canceled)
}

func placed(ctx context.Context, orders shopv1.OrdersClient) error {
	_, err := orders.Place(ctx, new(shopv1.PlaceRequest))
	return err
}

func cancelOfOurs(t *testing.T) {
	g := mustGuard(t, `client: {rules: [{methods: ["*"], breaker: {request_volume_threshold: 1, error_percent_threshold: 1}}]}`)
	cancelled(t, placed, g.DialOptions()...)
	c := g.Snapshot().Methods[0]
	want(t, "neutral", c.Counts.Neutral, uint64(1))
	want(t, "the breaker", c.Breaker.State, "closed")
	want(t, "failures in the window", c.Breaker.Failures, uint64(0))
}

func cancelOfHystrix(t *testing.T) {
	name := command(t, hystrix.CommandConfig{})
	cancelled(t, func(ctx context.Context, orders shopv1.OrdersClient) error {
		return hystrix.Do(name, func() error { return placed(ctx, orders) }, nil)
	})
	if r := reported(t, name); r.Failures != 1 || r.Errors != 1 {
		t.Errorf("hystrix-go has counted %+v, want one failure", r)
	}
}

func cancelOfFailsafe(t *testing.T) {
	breaker := circuitbreaker.NewWithDefaults[any]()
	cancelled(t, placed, grpc.WithChainUnaryInterceptor(failsafegrpc.NewUnaryClientInterceptor[any](breaker)))
	want(t, "by default", breaker.State(), circuitbreaker.OpenState)

	breaker = unlessCode(codes.Canceled)
	cancelled(t, placed, grpc.WithChainUnaryInterceptor(failsafegrpc.NewUnaryClientInterceptor[any](breaker)))
	want(t, "with HandleIf", breaker.State(), circuitbreaker.ClosedState)
}

func cancelOfGobreaker(t *testing.T) {
	breaker := onFirst(gobreaker.Settings{})
	cancelled(t, placed, grpc.WithChainUnaryInterceptor(execute(breaker)))
	want(t, "by default", breaker.State(), gobreaker.StateOpen)

	breaker = onFirst(gobreaker.Settings{IsExcluded: func(err error) bool { return status.Code(err) == codes.Canceled }})
	cancelled(t, placed, grpc.WithChainUnaryInterceptor(execute(breaker)))
	want(t, "with IsExcluded", breaker.State(), gobreaker.StateClosed)
}

// A late success from before the opening, and a half-open probe that hangs

// sleepWindow is how long the breakers of these tests stay open.
const sleepWindow = 5 * time.Second

// opening opens a breaker while a call is in flight, lets a probe in after the
// sleep window, and returns both.
func opening(t *testing.T, call func(f func(context.Context) error) error) (before, probe *holding) {
	t.Helper()
	before = mustHold(t, call)
	want(t, "the failure", call(fail), errDown)
	if err := call(succeed); err == nil {
		t.Fatal("the breaker is not open")
	}
	time.Sleep(sleepWindow + time.Millisecond)
	return before, mustHold(t, call)
}

func newOurs(t *testing.T) (*interceptors.Guard, func(f func(context.Context) error) error) {
	g := mustGuard(t, `client: {rules: [{methods: ["*"], breaker: {request_volume_threshold: 1, sleep_window: 5s}}]}`)
	return g, func(f func(context.Context) error) error {
		return through(context.Background(), g.UnaryClientInterceptor(), placeMethod, f)
	}
}

func newFailsafe() (circuitbreaker.CircuitBreaker[any], func(f func(context.Context) error) error) {
	breaker := circuitbreaker.NewBuilder[any]().WithDelay(sleepWindow).Build()
	i := failsafegrpc.NewUnaryClientInterceptor[any](breaker)
	return breaker, func(f func(context.Context) error) error { return through(context.Background(), i, placeMethod, f) }
}

func newGobreaker() (*gobreaker.CircuitBreaker[any], func(f func(context.Context) error) error) {
	breaker := onFirst(gobreaker.Settings{Timeout: sleepWindow})
	i := execute(breaker)
	return breaker, func(f func(context.Context) error) error { return through(context.Background(), i, placeMethod, f) }
}

func staleOfOurs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, call := newOurs(t)
		before, probe := opening(t, call)
		state := func() string { return g.Snapshot().Methods[0].Breaker.State }
		want(t, "the late call", before.finish(nil), nil)
		want(t, "after the late success", state(), "half_open")
		want(t, "the probe", probe.finish(nil), nil)
		want(t, "after the probe", state(), "closed")
	})
}

func staleOfHystrix(t *testing.T) {
	name := command(t, hystrix.CommandConfig{RequestVolumeThreshold: 1, ErrorPercentThreshold: 1, SleepWindow: minute})
	call := func(f func(context.Context) error) error { return hystrix.DoC(t.Context(), name, f, nil) }
	before := mustHold(t, call)
	want(t, "the failure", call(fail), errDown)
	circuit := opened(t, name)
	want(t, "the late call", before.finish(nil), nil)
	eventually(t, "the late success closes the circuit", func() bool { return !circuit.IsOpen() })
}

func staleOfFailsafe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		breaker, call := newFailsafe()
		before, probe := opening(t, call)
		want(t, "before the late success", breaker.State(), circuitbreaker.HalfOpenState)
		want(t, "the late call", before.finish(nil), nil)
		want(t, "after the late success", breaker.State(), circuitbreaker.ClosedState)
		want(t, "the probe", probe.finish(nil), nil)
	})
}

func staleOfGobreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		breaker, call := newGobreaker()
		before, probe := opening(t, call)
		want(t, "the late call", before.finish(nil), nil)
		want(t, "after the late success", breaker.State(), gobreaker.StateHalfOpen)
		want(t, "the probe", probe.finish(nil), nil)
		want(t, "after the probe", breaker.State(), gobreaker.StateClosed)
	})
}

func probeOfOurs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, call := newOurs(t)
		before, probe := opening(t, call)
		want(t, "a second probe within the lease is refused", errors.Is(call(succeed), interceptors.ErrBreakerOpen), true)
		time.Sleep(sleepWindow) // the lease, without a timeout
		want(t, "another probe after the lease", call(succeed), nil)
		want(t, "the next call", call(succeed), nil)
		want(t, "the hanging probe", probe.finish(nil), nil)
		want(t, "the call from before", before.finish(nil), nil)
	})
}

func probeOfHystrix(t *testing.T) {
	name := command(t, hystrix.CommandConfig{RequestVolumeThreshold: 1, ErrorPercentThreshold: 1, SleepWindow: 1})
	call := func(f func(context.Context) error) error { return hystrix.DoC(t.Context(), name, f, nil) }
	want(t, "the failure", call(fail), errDown)
	opened(t, name)
	var probes []*holding
	for range 2 {
		eventually(t, "a probe is let in", func() bool {
			h, err := hold(call)
			if h == nil {
				want(t, "a call in the sleep window", err, error(hystrix.ErrCircuitOpen))
				return false
			}
			probes = append(probes, h)
			return true
		})
	}
	for _, p := range probes {
		want(t, "a probe", p.finish(nil), nil)
	}
}

func probeOfFailsafe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, call := newFailsafe()
		before, probe := opening(t, call)
		time.Sleep(24 * time.Hour)
		want(t, "a call a day later", call(succeed), circuitbreaker.ErrOpen)
		want(t, "the hanging probe", probe.finish(nil), nil)
		want(t, "a call after it", call(succeed), nil)
		want(t, "the call from before", before.finish(nil), nil)
	})
}

func probeOfGobreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, call := newGobreaker()
		before, probe := opening(t, call)
		time.Sleep(24 * time.Hour)
		want(t, "a call a day later", call(succeed), gobreaker.ErrTooManyRequests)
		want(t, "the hanging probe", probe.finish(nil), nil)
		want(t, "a call after it", call(succeed), nil)
		want(t, "the call from before", before.finish(nil), nil)
	})
}
