package migration

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/afex/hystrix-go/hystrix"
	"github.com/failsafe-go/failsafe-go"
	"github.com/failsafe-go/failsafe-go/bulkhead"
	"github.com/failsafe-go/failsafe-go/circuitbreaker"
	"github.com/failsafe-go/failsafe-go/failsafegrpc"
	"github.com/failsafe-go/failsafe-go/ratelimiter"
	failsafetimeout "github.com/failsafe-go/failsafe-go/timeout"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/ratelimit"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/timeout"
	"github.com/sony/gobreaker/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	shopv1 "github.com/grpc-resilience/grpc-resilience/examples/shop/v1"
	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// A panic in the call

// panics makes a call that panics, and returns what its caller recovers.
func panics(i grpc.UnaryClientInterceptor) (p any) {
	defer func() { p = recover() }()
	_ = through(context.Background(), i, placeMethod, crash)
	return nil
}

func panicOfOurs(t *testing.T) {
	g := mustGuard(t, `client: {rules: [{methods: ["*"], breaker: {request_volume_threshold: 100}, concurrency_limit: {max_in_flight: 1}}]}`)
	want(t, "the panic", panics(g.UnaryClientInterceptor()), secret)
	want(t, "the next call", through(t.Context(), g.UnaryClientInterceptor(), placeMethod, succeed), nil)
	want(t, "failures", g.Snapshot().Methods[0].Counts.Failure, uint64(1))
	want(t, "failures that the breaker sees", g.Snapshot().Methods[0].Breaker.Failures, uint64(1))
}

// panicsInHystrix makes TestMain the process that panicInHystrix is.
const panicsInHystrix = "MIGRATION_PANICS_IN_HYSTRIX"

// panicInHystrix would survive if its recover could see the panic.
func panicInHystrix() {
	func() {
		defer func() { _ = recover() }()
		_ = hystrix.DoC(context.Background(), "panics", crash, nil)
	}()
	_, _ = io.WriteString(os.Stdout, "survived")
	os.Exit(0)
}

func panicOfHystrix(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second) // one that survives may hang
	defer cancel()
	child := exec.CommandContext(ctx, os.Args[0])
	child.Env = append(os.Environ(), panicsInHystrix+"=1")
	out, err := child.CombinedOutput()
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		t.Fatalf("the process ended with %v:\n%s", err, out)
	}
	want(t, "the exit code", exit.ExitCode(), 2)
	for _, word := range []string{"panic: " + secret, "hystrix.GoC"} {
		if !bytes.Contains(out, []byte(word)) {
			t.Errorf("its last words have no %q:\n%s", word, out)
		}
	}
}

func panicOfFailsafe(t *testing.T) {
	i := failsafegrpc.NewUnaryClientInterceptor[any](bulkhead.New[any](1))
	want(t, "the panic", panics(i), secret)
	want(t, "the next call of a bulkhead", through(t.Context(), i, placeMethod, succeed), bulkhead.ErrFull)

	breaker := circuitbreaker.NewWithDefaults[any]()
	breaker.HalfOpen()
	i = failsafegrpc.NewUnaryClientInterceptor[any](breaker)
	want(t, "the panic of a probe", panics(i), secret)
	want(t, "the next call of a half-open breaker", through(t.Context(), i, placeMethod, succeed), circuitbreaker.ErrOpen)
}

func panicOfGobreaker(t *testing.T) {
	breaker := onFirst(gobreaker.Settings{})
	want(t, "the panic", panics(execute(breaker)), secret)
	want(t, "the breaker", breaker.State(), gobreaker.StateOpen)
}

func panicOfMiddleware(t *testing.T) {
	orders := open(t, &shop{place: crash}, []grpc.ServerOption{grpc.ChainUnaryInterceptor(recovery.UnaryServerInterceptor())})
	_, err := orders.Place(t.Context(), new(shopv1.PlaceRequest))
	want(t, "the call", status.Code(err), codes.Unknown)
	_, err = orders.Get(t.Context(), new(shopv1.GetRequest))
	want(t, "the next call", err, nil)
}

// At its timeout a call

// outlived runs a call that a timeout of a second cancels, and checks that its
// caller returns after it. The interceptor is made in the bubble of the test: a
// guard's time begins with it.
func outlived(t *testing.T, wantErr error, newInterceptor func(*testing.T) grpc.UnaryClientInterceptor) {
	synctest.Test(t, func(t *testing.T) {
		i, began, ended := newInterceptor(t), time.Now(), false
		err := through(context.Background(), i, placeMethod, func(ctx context.Context) error {
			<-ctx.Done()
			want(t, "cancelled after", time.Since(began), time.Second)
			time.Sleep(time.Second) // a call that does not look at once
			ended = true
			return ctx.Err()
		})
		want(t, "the error", err, wantErr)
		want(t, "the call has ended", ended, true)
	})
}

func timeoutOfOurs(t *testing.T) {
	outlived(t, context.DeadlineExceeded, func(t *testing.T) grpc.UnaryClientInterceptor {
		return mustGuard(t, `client: {rules: [{methods: ["*"], timeout: 1s}]}`).UnaryClientInterceptor()
	})
}

func timeoutOfHystrix(t *testing.T) {
	name := command(t, hystrix.CommandConfig{Timeout: 1})
	end, ended := make(chan struct{}), make(chan error, 1)
	err := hystrix.DoC(t.Context(), name, func(ctx context.Context) error {
		<-end
		ended <- ctx.Err()
		return nil
	}, nil)
	want(t, "DoC", err, error(hystrix.ErrTimeout))
	close(end) // it runs until now
	want(t, "the call's context", <-ended, nil)
}

func timeoutOfFailsafe(t *testing.T) {
	outlived(t, failsafetimeout.ErrExceeded, func(*testing.T) grpc.UnaryClientInterceptor {
		return failsafegrpc.NewUnaryClientInterceptor[any](failsafetimeout.New[any](time.Second))
	})
}

func timeoutOfMiddleware(t *testing.T) {
	outlived(t, context.DeadlineExceeded, func(*testing.T) grpc.UnaryClientInterceptor {
		return timeout.UnaryClientInterceptor(time.Second)
	})
}

// Waiting for a permit

func waitOfOurs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// A token every 1,000 s, and the first is taken.
		g := mustGuard(t, `client: {rules: [{methods: ["*"], rate_limit: {requests_per_second: 0.001, burst: 1, max_wait: 1h}}]}`)
		began := time.Now()
		call := func(ctx context.Context) error { return through(ctx, g.UnaryClientInterceptor(), placeMethod, succeed) }
		want(t, "the first call", call(t.Context()), nil)

		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		want(t, "a turn after the deadline", errors.Is(call(ctx), interceptors.ErrRateLimited), true)
		want(t, "refused after", time.Since(began), time.Duration(0))

		ctx, cancel = context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		want(t, "a waiting call that is cancelled", status.Code(call(ctx)), codes.Canceled)
		want(t, "it ends after", time.Since(began), time.Second)

		want(t, "the next call", call(t.Context()), nil)
		if waited := time.Since(began); waited > 1001*time.Second {
			t.Errorf("it waited until %v: a token was spent in vain", waited)
		}
	})
}

func waitOfHystrix(t *testing.T) {
	name := command(t, hystrix.CommandConfig{MaxConcurrentRequests: 1})
	call := func(f func(context.Context) error) error { return hystrix.DoC(t.Context(), name, f, nil) }
	first := mustHold(t, call)
	want(t, "a second call", call(succeed), error(hystrix.ErrMaxConcurrency))
	want(t, "the first call", first.finish(nil), nil)
}

func waitOfFailsafe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limiter := ratelimiter.NewSmoothBuilder[any](1, 1000*time.Second).WithMaxWaitTime(time.Hour).Build()
		i := failsafegrpc.NewUnaryClientInterceptor[any](limiter)
		began := time.Now()
		want(t, "the first call", through(t.Context(), i, placeMethod, succeed), nil)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		want(t, "a turn after the deadline", through(ctx, i, placeMethod, succeed), context.DeadlineExceeded)
		want(t, "it waits", time.Since(began), 10*time.Second)
		want(t, "the next call", through(t.Context(), i, placeMethod, succeed), nil)
		want(t, "it waits for the turn after the next", time.Since(began), 2000*time.Second)
	})

	synctest.Test(t, func(t *testing.T) {
		i := failsafegrpc.NewUnaryServerInterceptor[any](bulkhead.NewBuilder[any](1).WithMaxWaitTime(time.Hour).Build())
		serve := func(ctx context.Context) func(f func(context.Context) error) error {
			return func(f func(context.Context) error) error {
				_, err := i(ctx, nil, nil, func(ctx context.Context, _ any) (any, error) { return nil, f(ctx) })
				return err
			}
		}
		first := mustHold(t, serve(t.Context()))
		ctx, cancel := context.WithCancel(t.Context())
		handled := make(chan error, 1)
		go func() {
			_ = serve(ctx)(func(ctx context.Context) error { handled <- ctx.Err(); return nil })
		}()
		synctest.Wait()
		cancel()
		time.Sleep(30 * time.Minute)
		want(t, "the first call", first.finish(nil), nil)
		want(t, "the second, cancelled half an hour ago, is handled with", <-handled, context.Canceled)
	})
}

// contextLimiter waits for the end of the call.
type contextLimiter struct{}

func (contextLimiter) Limit(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

func waitOfMiddleware(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		began := time.Now()
		err := through(ctx, ratelimit.UnaryClientInterceptor(contextLimiter{}), placeMethod, succeed)
		want(t, "the call", status.Code(err), codes.ResourceExhausted)
		want(t, "it ends after", time.Since(began), time.Second)
	})
}

// Goroutines started for a call

// started returns how many goroutines that this package's code has started run
// while a call does.
func started(t *testing.T, i grpc.UnaryClientInterceptor, by string) (n int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	want(t, "the call", through(ctx, i, placeMethod, func(context.Context) error {
		n = len(goroutines("created by " + by))
		return nil
	}), nil)
	return n
}

func goroutinesOfOurs(t *testing.T) {
	g := mustGuard(t, `
client:
  rules:
    - methods: ["*"]
      timeout: 1s
      breaker: {}
      rate_limit: {requests_per_second: 1000, max_wait: 1s}
      concurrency_limit: {max_in_flight: 10, max_queue: 10}
`)
	const ourCode = "github.com/grpc-resilience/grpc-resilience/interceptors"
	want(t, "goroutines", started(t, g.UnaryClientInterceptor(), ourCode), 0)

	g = mustGuard(t, `client: {rules: [{methods: ["*"], timeout: 1s, breaker: {engine: hystrix}}]}`)
	updates(t, g.HystrixName(interceptors.Client, "", placeMethod), func() {
		want(t, "goroutines with engine hystrix", started(t, g.UnaryClientInterceptor(), ourCode), 0)
	})
}

func goroutinesOfHystrix(t *testing.T) {
	const byDoC = "created by github.com/afex/hystrix-go/hystrix.GoC"
	eventually(t, "those of earlier calls end", func() bool { return len(goroutines(byDoC)) == 0 })
	name := command(t, hystrix.CommandConfig{RequestVolumeThreshold: 1, ErrorPercentThreshold: 1})
	updates(t, name, func() {
		err := hystrix.DoC(t.Context(), name, func(context.Context) error {
			eventually(t, "two run", func() bool { return len(goroutines(byDoC)) == 2 })
			return errDown
		}, nil)
		want(t, "the call", err, errDown)
		// hystrix-go's own collector is told though another hangs.
		opened(t, name)
	})
}

// updates makes a call of a hystrix circuit, and checks that its collector is told on a
// goroutine of its own.
func updates(t *testing.T, name string, call func()) {
	t.Helper()
	end := make(chan struct{})
	held.Store(name, end)
	defer held.Delete(name)
	defer close(end)
	running := func() int {
		return len(goroutines("created by github.com/afex/hystrix-go/hystrix.(*metricExchange).Monitor", "migration.collector.Update"))
	}
	before := running()
	call()
	eventually(t, "the collector is told", func() bool { return running() == before+1 })
}

func goroutinesOfFailsafe(t *testing.T) {
	const failsafeCode = "github.com/failsafe-go/failsafe-go"
	gates := []failsafe.Policy[any]{
		circuitbreaker.NewWithDefaults[any](),
		ratelimiter.NewBursty[any](1000, time.Second),
		bulkhead.New[any](10),
	}
	want(t, "goroutines", started(t, failsafegrpc.NewUnaryClientInterceptor(gates...), failsafeCode), 0)

	timed := slices.Concat(gates, []failsafe.Policy[any]{failsafetimeout.New[any](time.Minute)})
	want(t, "goroutines with a timeout", started(t, failsafegrpc.NewUnaryClientInterceptor(timed...), failsafeCode), 1)
	eventually(t, "it ends with the call", func() bool { return len(goroutines("created by "+failsafeCode)) == 0 })

	// Both contexts outlive the calls.
	app, stop := context.WithCancel(t.Context())
	caller, cancel := context.WithCancel(t.Context())
	i := failsafegrpc.NewUnaryClientInterceptorWithExecutor(failsafe.With(gates...).WithContext(app))
	const calls = 50
	for range calls {
		want(t, "a call", through(caller, i, placeMethod, succeed), nil)
	}
	want(t, "goroutines that outlive their calls", len(goroutines("created by "+failsafeCode)), calls)
	cancel()
	stop()
	eventually(t, "they end with a context", func() bool { return len(goroutines("created by "+failsafeCode)) == 0 })
}

func goroutinesOfGobreaker(t *testing.T) {
	want(t, "goroutines", started(t, execute(onFirst(gobreaker.Settings{})), "github.com/sony/gobreaker"), 0)
}

func goroutinesOfMiddleware(t *testing.T) {
	want(t, "goroutines", started(t, ratelimit.UnaryClientInterceptor(newQuota(1)), "github.com/grpc-ecosystem/go-grpc-middleware"), 0)
}

// Asking for the state in a callback

// asker asks for a guard's state when it is told of a transition.
type asker struct {
	slog.Handler
	states chan string
	guard  *interceptors.Guard
}

func (a *asker) Enabled(context.Context, slog.Level) bool { return true }

func (a *asker) Handle(context.Context, slog.Record) error {
	a.states <- a.guard.Snapshot().Methods[0].Breaker.State
	return nil
}

func callbackOfOurs(t *testing.T) {
	a := &asker{Handler: slog.DiscardHandler, states: make(chan string, 1)}
	a.guard = mustGuard(t, `client: {rules: [{methods: ["*"], breaker: {request_volume_threshold: 1}}]}`, interceptors.WithLogger(slog.New(a)))
	want(t, "the failure", through(t.Context(), a.guard.UnaryClientInterceptor(), placeMethod, fail), errDown)
	want(t, "the state in the callback", <-a.states, "open")

	a = &asker{Handler: slog.DiscardHandler, states: make(chan string, 1)}
	a.guard = mustGuard(t, `client: {rules: [{methods: ["*"], breaker: {engine: hystrix, request_volume_threshold: 1}}]}`, interceptors.WithLogger(slog.New(a)))
	want(t, "the failure with engine hystrix", through(t.Context(), a.guard.UnaryClientInterceptor(), placeMethod, fail), errDown)
	eventually(t, "it opens", func() bool { return a.guard.Snapshot().Methods[0].Breaker.State == "open" })
	want(t, "the state in its callback", <-a.states, "open")
}

func callbackOfFailsafe(t *testing.T) {
	states := make(chan circuitbreaker.State, 1)
	var breaker circuitbreaker.CircuitBreaker[any]
	breaker = circuitbreaker.NewBuilder[any]().OnOpen(func(circuitbreaker.StateChangedEvent) { states <- breaker.State() }).Build()
	want(t, "the failure", through(t.Context(), failsafegrpc.NewUnaryClientInterceptor[any](breaker), placeMethod, fail), errDown)
	want(t, "the state in the callback", <-states, circuitbreaker.OpenState)
}

func callbackOfGobreaker(t *testing.T) {
	var breaker *gobreaker.CircuitBreaker[any]
	breaker = onFirst(gobreaker.Settings{OnStateChange: func(string, gobreaker.State, gobreaker.State) { _ = breaker.State() }})
	// A goroutine waits for the mutex that it holds: setState is called under it.
	deadlocked := func() int {
		return len(goroutines("[sync.Mutex.Lock", "gobreaker/v2.(*CircuitBreaker[...]).State", "gobreaker/v2.(*CircuitBreaker[...]).setState"))
	}
	before := deadlocked() // of an earlier run of this test: they stay
	over := make(chan error, 1)
	go func() { over <- through(context.Background(), execute(breaker), placeMethod, fail) }() // never ends
	eventually(t, "it waits for itself", func() bool { return deadlocked() == before+1 })
	select {
	case err := <-over:
		t.Errorf("the call ended: %v", err)
	default:
	}
}
