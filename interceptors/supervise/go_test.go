package supervise_test

import (
	"context"
	"errors"
	"log/slog"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"

	"github.com/grpc-resilience/grpc-resilience/interceptors/supervise"
)

// provider is a meter provider that counts what is added to counters.
type provider struct {
	noop.MeterProvider
	added atomic.Int64
	fail  error  // what its meter answers
	with  func() // called when something is added, if any
}

func (p *provider) Meter(string, ...metric.MeterOption) metric.Meter { return meter{provider: p} }

type meter struct {
	noop.Meter
	provider *provider
}

func (m meter) Int64Counter(name string, _ ...metric.Int64CounterOption) (metric.Int64Counter, error) {
	if name != "resilience.goroutine.panics" {
		return nil, errors.New("not a counter of ours: " + name)
	}
	return counter{provider: m.provider}, m.provider.fail
}

func (m meter) Int64ObservableCounter(string, ...metric.Int64ObservableCounterOption) (metric.Int64ObservableCounter, error) {
	return noop.Int64ObservableCounter{}, m.provider.fail
}

type counter struct {
	noop.Int64Counter
	provider *provider
}

func (c counter) Add(_ context.Context, n int64, _ ...metric.AddOption) {
	c.provider.added.Add(n)
	if c.provider.with != nil {
		c.provider.with()
	}
}

// global makes the defaults ours until the test ends.
func global(t *testing.T, p metric.MeterProvider, h slog.Handler) {
	oldProvider, oldLogger := otel.GetMeterProvider(), slog.Default()
	otel.SetMeterProvider(p)
	slog.SetDefault(slog.New(h))
	t.Cleanup(func() {
		otel.SetMeterProvider(oldProvider)
		slog.SetDefault(oldLogger)
	})
}

func TestGo(t *testing.T) {
	for name, c := range map[string]struct {
		f      func(context.Context)
		logged string
	}{
		"returns":     {func(context.Context) {}, ""},
		"panics":      {func(context.Context) { panic("broken") }, "ERROR goroutine panicked cause=panic error=panic: broken\n"},
		"exits":       {func(context.Context) { runtime.Goexit() }, "ERROR goroutine panicked cause=goexit error=runtime.Goexit was called\n"},
		"is nil":      {nil, "ERROR goroutine panicked cause=panic error=panic: runtime error: invalid memory address or nil pointer dereference\n"},
		"value panic": {func(context.Context) { panic(foreign{panicsTwice, nothing}) }, "ERROR goroutine panicked cause=panic error=panic with a value that cannot be printed\n"},
		"value exits": {func(context.Context) { panic(foreign{exits, nothing}) }, "ERROR goroutine panicked cause=panic error=panic with a value that cannot be printed\n"},
	} {
		t.Run(name, func(t *testing.T) {
			p, records := &provider{}, &recorder{}
			global(t, p, records)
			synctest.Test(t, func(t *testing.T) {
				supervise.Go(t.Context(), c.f)
				synctest.Wait()
				if got := records.String(); got != c.logged {
					t.Errorf("logged %q, want %q", got, c.logged)
				}
				if want := int64(strings.Count(c.logged, "\n")); p.added.Load() != want {
					t.Errorf("counted %d, want %d", p.added.Load(), want)
				}
				if stack := records.attr("goroutine panicked", "stack"); (stack == "") != (c.logged == "") {
					t.Errorf("the stack is %q", stack)
				}
			})
		})
	}
}

type requestKey struct{}

// The function gets the caller's context, and so does the log.
func TestGoContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.WithValue(t.Context(), requestKey{}, "request 7"))
		ended := false
		supervise.Go(ctx, func(ctx context.Context) {
			if ctx.Value(requestKey{}) != "request 7" {
				t.Error("not the context of the caller")
			}
			<-ctx.Done()
			ended = true
		})
		cancel()
		synctest.Wait()
		if !ended {
			t.Error("has not ended")
		}
		supervise.Go(nil, func(ctx context.Context) { _ = ctx.Err() }) //nolint:staticcheck // what a careless caller does
		synctest.Wait()
	})
}

// Nothing that is broken makes a panic fatal.
func TestGoWithBrokenDefaults(t *testing.T) {
	for name, p := range map[string]*provider{
		"the provider panics": {with: panics},
		"the provider exits":  {with: exits},
		"the provider fails":  {fail: errBroken},
	} {
		t.Run(name, func(t *testing.T) {
			global(t, p, &recorder{with: panics})
			synctest.Test(t, func(t *testing.T) {
				supervise.Go(t.Context(), func(context.Context) { panic("broken") })
				supervise.Go(brokenContext{t.Context()}, func(context.Context) { panic("broken") })
				synctest.Wait()
			})
		})
	}
}

type brokenContext struct{ context.Context }

func (brokenContext) Value(any) any { panic("a context") }

// In a worker, Go is the supervisor's.
func TestGoInAWorker(t *testing.T) {
	defaults, own := &provider{}, &provider{}
	defaultRecords, records := &recorder{}, &recorder{}
	global(t, defaults, defaultRecords)
	synctest.Test(t, func(t *testing.T) {
		s := mustNew(t, records.option(), supervise.WithMeterProvider(own))
		mustAdd(t, s, supervise.Worker{Name: "w", Run: func(ctx context.Context) error {
			supervise.Go(ctx, func(context.Context) { panic("broken") })
			return untilDone(ctx)
		}})
		synctest.Wait()
		if own.added.Load() != 1 || records.count("goroutine panicked") != 1 {
			t.Errorf("counted %d, logged %v", own.added.Load(), records)
		}
		if defaults.added.Load() != 0 || defaultRecords.String() != "" {
			t.Errorf("by default: counted %d, logged %v", defaults.added.Load(), defaultRecords)
		}
		wantState(t, s, supervise.Running)
		mustStop(t, s)
	})
}

func TestMeterThatFails(t *testing.T) {
	if _, err := supervise.New(supervise.WithMeterProvider(&provider{fail: errBroken})); !errors.Is(err, errBroken) {
		t.Errorf("got %v", err)
	}
}
