package migration

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sony/gobreaker/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	shopv1 "github.com/grpc-resilience/grpc-resilience/examples/shop/v1"
	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// What docs/migration/from-gobreaker.md shows of before.

var settings = gobreaker.Settings{
	MaxRequests:  3,
	Interval:     10 * time.Second,
	BucketPeriod: time.Second,
	Timeout:      5 * time.Second,
	ReadyToTrip: func(c gobreaker.Counts) bool {
		return c.Requests >= 20 && 2*c.TotalFailures >= c.Requests
	},
	IsSuccessful: func(err error) bool {
		return err == nil || status.Code(err) == codes.NotFound
	},
	IsExcluded: func(err error) bool {
		return status.Code(err) == codes.Canceled
	},
}

func clientOfGobreaker() grpc.DialOption {
	var breakers sync.Map // by method
	return grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		b, ok := breakers.Load(method)
		if !ok {
			b, _ = breakers.LoadOrStore(method, gobreaker.NewCircuitBreaker[any](settings))
		}
		_, err := b.(*gobreaker.CircuitBreaker[any]).Execute(func() (any, error) {
			return nil, invoker(ctx, method, req, reply, cc, opts...)
		})
		return err
	})
}

func whyGobreaker(err error) error {
	if errors.Is(err, gobreaker.ErrOpenState) || errors.Is(err, gobreaker.ErrTooManyRequests) {
		return errOpen
	}
	return err
}

// And of after.

func judgeMissing() interceptors.Option {
	return interceptors.WithClassifier(func(_ context.Context, _ interceptors.Side, _ string, err error) interceptors.Outcome {
		switch status.Code(err) {
		case codes.NotFound:
			return interceptors.Success // IsSuccessful
		case codes.ResourceExhausted:
			return interceptors.Neutral // IsExcluded
		}
		return interceptors.Failure
	})
}

// The checks.

const gobreakerPage = "from-gobreaker.md"

func TestGobreakerPage(t *testing.T) {
	bothWays(t, gobreakerPage, clientOfGobreaker, whyGobreaker, func(t *testing.T, client []grpc.DialOption, why func(error) error) {
		s := new(shop)
		orders := open(t, s, nil, client...)
		place := func() error { return why(placed(t.Context(), orders)) }

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
		_, err := orders.Get(t.Context(), new(shopv1.GetRequest))
		want(t, "another method", err, nil)

		time.Sleep(5*time.Second + 1)
		end := make(chan struct{})
		s.from(func(context.Context) error { <-end; return nil })
		probes := make(chan error, 3)
		for range cap(probes) {
			go func() { probes <- place() }()
		}
		synctest.Wait()
		want(t, "a fourth probe", place(), errOpen)
		close(end)
		for range cap(probes) {
			want(t, "a probe", <-probes, nil)
		}
		want(t, "a call when the breaker is closed", place(), nil)
	})
}

func TestGobreakerDefaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		breaker := gobreaker.NewCircuitBreaker[any](gobreaker.Settings{})
		i := execute(breaker)
		call := func(f func(context.Context) error) error { return through(context.Background(), i, placeMethod, f) }
		want(t, "a success", call(succeed), nil)
		for range 5 {
			want(t, "a failure", call(fail), errDown)
			time.Sleep(24 * time.Hour) // nothing is forgotten
		}
		want(t, "after five failures in a row", breaker.State(), gobreaker.StateClosed)
		want(t, "a failure", call(fail), errDown)
		want(t, "after six", breaker.State(), gobreaker.StateOpen)
		time.Sleep(time.Minute)
		want(t, "for a minute", breaker.State(), gobreaker.StateOpen)
		time.Sleep(time.Nanosecond)
		want(t, "after it", breaker.State(), gobreaker.StateHalfOpen)
		probe := mustHold(t, call)
		want(t, "a second probe", call(succeed), gobreaker.ErrTooManyRequests)
		want(t, "the probe", probe.finish(nil), nil)
	})
}

// The nearest to six failures in a row: six calls, all of which failed.
func TestSixFailures(t *testing.T) {
	g := mustGuard(t, `client: {rules: [{methods: ["*"], breaker: {request_volume_threshold: 6, error_percent_threshold: 100}}]}`)
	i := g.UnaryClientInterceptor()
	for range 6 {
		want(t, "a failure", through(t.Context(), i, placeMethod, fail), errDown)
	}
	want(t, "the seventh call is refused", errors.Is(through(t.Context(), i, placeMethod, succeed), interceptors.ErrBreakerOpen), true)

	want(t, "a success", through(t.Context(), i, getMethod, succeed), nil)
	for range 20 {
		want(t, "a failure after a success in the window", through(t.Context(), i, getMethod, fail), errDown)
	}
}

func TestClassifierForGobreakersFunctions(t *testing.T) {
	g := mustGuard(t, `client: {rules: [{methods: ["*"], breaker: {}}]}`, judgeMissing())
	for _, err := range []error{errMissing, status.Error(codes.ResourceExhausted, ""), status.Error(codes.InvalidArgument, "")} {
		want(t, "the call", through(t.Context(), g.UnaryClientInterceptor(), placeMethod, func(context.Context) error { return err }), err)
	}
	c := g.Snapshot().Methods[0].Counts
	want(t, "successes", c.Success, uint64(1))
	want(t, "neutral", c.Neutral, uint64(1))
	want(t, "failures", c.Failure, uint64(1))
}
