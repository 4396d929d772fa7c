package migration

import (
	"context"
	"encoding/json"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/afex/hystrix-go/hystrix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	shopv1 "github.com/grpc-resilience/grpc-resilience/examples/shop/v1"
	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// What docs/migration/from-hystrix-go.md shows of before.

func configure(settings []byte) error {
	var commands map[string]hystrix.CommandConfig
	if err := json.Unmarshal(settings, &commands); err != nil {
		return err
	}
	hystrix.Configure(commands)
	return nil
}

func placeWithHystrix(ctx context.Context, orders shopv1.OrdersClient, order *shopv1.PlaceRequest) (*shopv1.PlaceResponse, error) {
	var placed *shopv1.PlaceResponse
	err := hystrix.DoC(ctx, "place-order", func(ctx context.Context) (err error) {
		placed, err = orders.Place(ctx, order)
		return err
	}, func(_ context.Context, cause error) error {
		placed = &shopv1.PlaceResponse{Order: later(order)}
		return nil
	})
	return placed, err
}

func getWithHystrix(ctx context.Context, orders shopv1.OrdersClient, id string) error {
	err := hystrix.DoC(ctx, "get-order", func(ctx context.Context) error {
		_, err := orders.Get(ctx, &shopv1.GetRequest{OrderId: id})
		return err
	}, nil)
	switch err {
	case hystrix.ErrCircuitOpen:
		return errOpen
	case hystrix.ErrMaxConcurrency:
		return errFull
	case hystrix.ErrTimeout:
		return errLate
	}
	return err
}

// And of after.

func getWithGuard(ctx context.Context, orders shopv1.OrdersClient, id string) error {
	_, err := orders.Get(ctx, &shopv1.GetRequest{OrderId: id})
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

func isOpen(guard *interceptors.Guard, conn *grpc.ClientConn) (bool, error) {
	name := guard.HystrixName(interceptors.Client, conn.CanonicalTarget(), "/shop.v1.Orders/Get")
	circuit, _, err := hystrix.GetCircuit(name)
	if err != nil {
		return false, err
	}
	return circuit.IsOpen(), nil
}

// The checks.

var (
	errOpen = errors.New("the circuit is open")
	errFull = errors.New("too many at once")
	errLate = errors.New("too late")
)

// later is the order that a fallback makes.
func later(req *shopv1.PlaceRequest) *shopv1.Order {
	return &shopv1.Order{Id: "later", Customer: req.GetCustomer()}
}

const hystrixPage = "from-hystrix-go.md"

func TestHystrixPage(t *testing.T) {
	settings := blocks(t, hystrixPage, "json")[0]
	if err := configure([]byte(settings)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hystrix.Flush) // or a second run would find the circuit open
	policies := blocks(t, hystrixPage, "yaml")
	first := mustGuard(t, policies[0])
	second := mustGuard(t, policies[1])
	for name, get := range map[string]func(context.Context, shopv1.OrdersClient, string) error{
		"before": getWithHystrix, "engine hystrix": getWithGuard, "engine window": getWithGuard,
	} {
		t.Run(name, func(t *testing.T) {
			var opts []grpc.DialOption
			switch name {
			case "engine hystrix":
				opts = first.DialOptions()
			case "engine window":
				opts = second.DialOptions()
			}
			runs, end := make(chan struct{}), make(chan struct{})
			s := &shop{get: func(context.Context) error { runs <- struct{}{}; <-end; return nil }}
			orders := open(t, s, nil, opts...)
			// Ten run, the eleventh is refused.
			results := make(chan error, 10)
			for range 10 {
				go func() { results <- get(t.Context(), orders, "order-1") }()
				<-runs
			}
			want(t, "the eleventh call", get(t.Context(), orders, "order-1"), errFull)
			close(end)
			for range 10 {
				want(t, "a call that runs", <-results, nil)
			}

			s.from(func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
			ctx, cancel := context.WithCancel(t.Context())
			want(t, "a call of more than 500ms", get(ctx, orders, "order-1"), errLate)
			cancel() // hystrix-go has not

			s.from(fail)
			eventually(t, "the circuit opens", func() bool { return get(t.Context(), orders, "order-1") == errOpen })
		})
	}
}

// newHystrix guards a client with engine hystrix, whose circuit opens at the
// first failure and stays so.
func newHystrix(t *testing.T) (*interceptors.Guard, func(f func(context.Context) error) error) {
	g := mustGuard(t, `
client:
  rules:
    - methods: ["*"]
      breaker: {engine: hystrix, error_percent_threshold: 1, request_volume_threshold: 1, sleep_window: 1m}
`)
	return g, func(f func(context.Context) error) error {
		return through(context.Background(), g.UnaryClientInterceptor(), getMethod, f)
	}
}

func TestHystrixEngineIsSeenByHystrix(t *testing.T) {
	g, call := newHystrix(t)
	name := g.HystrixName(interceptors.Client, "", getMethod)
	want(t, "the failure", call(fail), errDown)
	if r := reported(t, name); r.Failures != 1 || r.Errors != 1 {
		t.Errorf("a metric collector got %+v, want one failure", r)
	}
	opened(t, name)
	want(t, "the next call is refused", errors.Is(call(succeed), interceptors.ErrBreakerOpen), true)
}

func TestHystrixEngineNames(t *testing.T) {
	g := mustGuard(t, `client: {rules: [{methods: ["*"], breaker: {engine: hystrix, error_percent_threshold: 1, request_volume_threshold: 1}}]}`)
	conn := openConn(t, &shop{get: fail}, nil, g.DialOptions()...)
	_, err := shopv1.NewOrdersClient(conn).Get(t.Context(), new(shopv1.GetRequest))
	want(t, "the failure", status.Code(err), codes.Unavailable)
	eventually(t, "hystrix-go says open", func() bool {
		is, err := isOpen(g, conn)
		if err != nil {
			t.Fatal(err)
		}
		return is
	})
}

func TestHystrixEngineDropsLateSuccess(t *testing.T) {
	g, call := newHystrix(t)
	before := mustHold(t, call)
	want(t, "the failure", call(fail), errDown)
	circuit := opened(t, g.HystrixName(interceptors.Client, "", getMethod))
	want(t, "the late call", before.finish(nil), nil)
	want(t, "the circuit is still open", circuit.IsOpen(), true)
	want(t, "the next call is refused", errors.Is(call(succeed), interceptors.ErrBreakerOpen), true)
}

// hystrix-go's own rejections are errors to it; a guard's are none to its
// breaker, with either engine.
func TestRejectionsAreErrorsToHystrix(t *testing.T) {
	name := command(t, hystrix.CommandConfig{MaxConcurrentRequests: 1})
	running := mustHold(t, func(f func(context.Context) error) error { return hystrix.DoC(t.Context(), name, f, nil) })
	want(t, "one too many", hystrix.DoC(t.Context(), name, succeed, nil), error(hystrix.ErrMaxConcurrency))
	if r := reported(t, name); r.Rejects != 1 || r.Errors != 1 {
		t.Errorf("hystrix-go has counted %+v, want one error", r)
	}
	want(t, "the call that runs", running.finish(nil), nil)

	for _, engine := range []string{"hystrix", "window"} {
		t.Run(engine, func(t *testing.T) {
			g := mustGuard(t, `
client:
  rules:
    - methods: ["*"]
      breaker: {engine: `+engine+`, error_percent_threshold: 1, request_volume_threshold: 1}
      concurrency_limit: {max_in_flight: 1}
`)
			call := func(f func(context.Context) error) error {
				return through(context.Background(), g.UnaryClientInterceptor(), getMethod, f)
			}
			running := mustHold(t, call)
			want(t, "one too many", errors.Is(call(succeed), interceptors.ErrConcurrencyLimited), true)
			want(t, "the call that runs", running.finish(nil), nil)
			want(t, "the next call", call(succeed), nil)
			want(t, "failures", g.Snapshot().Methods[0].Breaker.Failures, uint64(0))
		})
	}
}

func TestHystrixDefaults(t *testing.T) {
	// The circuit of a name that nobody has configured.
	_ = hystrix.DoC(t.Context(), "unheard-of", succeed, nil)
	got := hystrix.GetCircuitSettings()["unheard-of"]
	want(t, "hystrix-go's defaults", *got, hystrix.Settings{
		Timeout: time.Second, MaxConcurrentRequests: 10,
		RequestVolumeThreshold: 20, SleepWindow: 5 * time.Second, ErrorPercentThreshold: 50,
	})

	// Ours of a breaker are the same, and there are no others.
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, `client: {rules: [{methods: ["*"], breaker: {}}]}`)
		call := func(f func(context.Context) error) error {
			return through(context.Background(), g.UnaryClientInterceptor(), getMethod, f)
		}
		for range 10 {
			want(t, "a success", call(succeed), nil)
		}
		for range 10 {
			want(t, "a failure", call(fail), errDown)
		}
		want(t, "the twenty-first call is refused", errors.Is(call(succeed), interceptors.ErrBreakerOpen), true)
		time.Sleep(5*time.Second - time.Millisecond)
		want(t, "until 5s are over", errors.Is(call(succeed), interceptors.ErrBreakerOpen), true)
		time.Sleep(time.Millisecond)
		want(t, "a call after them, of an hour", call(func(context.Context) error { time.Sleep(time.Hour); return nil }), nil)
		running := make([]*holding, 100)
		for i := range running {
			running[i] = mustHold(t, call)
		}
		for _, r := range running {
			want(t, "one of a hundred", r.finish(nil), nil)
		}
	})
}
