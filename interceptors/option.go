package interceptors

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"syscall"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/ratelimit"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"

	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
)

// Option injects code into a Guard; what the guard enforces is in the policy.
// The interface is sealed: options come from the With functions of this package.
type Option interface {
	apply(*options) error
}

type options struct {
	logger       *slog.Logger
	meter        metric.MeterProvider
	classifier   Classifier
	limiters     map[string]ratelimit.Limiter
	panicHandler func(ctx context.Context, method string, p any, stack []byte)
	signals      []os.Signal
	fallbacks    *fallbacks // nil: none
}

type optionFunc func(*options) error

func (f optionFunc) apply(o *options) error { return f(o) }

func newOptions(opts []Option) (*options, error) {
	o := &options{
		logger:   slog.Default(),
		meter:    otel.GetMeterProvider(),
		limiters: map[string]ratelimit.Limiter{},
		signals:  []os.Signal{syscall.SIGTERM, os.Interrupt},
	}
	var errs []error
	for i, opt := range opts {
		if opt == nil {
			errs = append(errs, fmt.Errorf("option %d is nil", i))
			continue
		}
		errs = append(errs, opt.apply(o))
	}
	return o, errors.Join(errs...)
}

// checkLimiters finds limiters that a side's rules name and nobody gave.
func (o *options) checkLimiters(s Side, rules []*resiliencev1.MethodPolicy) error {
	var errs []error
	for i, r := range rules {
		name := r.GetRateLimit().GetExternal()
		if name != "" && o.limiters[name] == nil {
			errs = append(errs, fmt.Errorf("%s.rules[%d].rate_limit.external: found %q, but no limiter of that name was given: add interceptors.WithLimiter(%q, ...)",
				s, i, name, name))
		}
	}
	return errors.Join(errs...)
}

// WithLogger sets where transitions of breakers, panics, drains, reloads, listeners of
// Serve that fail and panicking callbacks are logged; nothing is logged per call. Default: slog.Default() as
// it is when the guard is made.
func WithLogger(l *slog.Logger) Option {
	return optionFunc(func(o *options) error {
		if l == nil {
			return errors.New("WithLogger: the logger is nil")
		}
		o.logger = l
		return nil
	})
}

// WithMeterProvider sets the OpenTelemetry provider that the guard's metrics
// are registered with. Default: the global provider as it is when the guard is
// made. Counters are read when they are collected; calls pay nothing for them.
// What resilience.worker.* says of Serve's listeners is registered while they are
// served (see [supervise.WithMeterProvider]).
func WithMeterProvider(p metric.MeterProvider) Option {
	return optionFunc(func(o *options) error {
		if p == nil {
			return errors.New("WithMeterProvider: the provider is nil")
		}
		o.meter = p
		return nil
	})
}

// WithClassifier replaces the judgement of errors. Default: see [Outcome].
func WithClassifier(f Classifier) Option {
	return optionFunc(func(o *options) error {
		if f == nil {
			return errors.New("WithClassifier: the classifier is nil")
		}
		o.classifier = f
		return nil
	})
}

// WithLimiter gives a limiter that a policy names in `rate_limit: {external:
// name}`. A call for which Limit returns an error is rejected with
// RATE_LIMITED. Limit must be safe for concurrent use; it may wait, until the
// context ends. If it panics, the panic is logged and the call is admitted: a
// broken limiter does not take the service down.
func WithLimiter(name string, l ratelimit.Limiter) Option {
	return optionFunc(func(o *options) error {
		switch {
		case name == "":
			return errors.New("WithLimiter: the name is empty")
		case l == nil:
			return fmt.Errorf("WithLimiter: the limiter %q is nil", name)
		case o.limiters[name] != nil:
			return fmt.Errorf("WithLimiter: the name %q is given twice", name)
		}
		o.limiters[name] = l
		return nil
	})
}

// WithPanicHandler sets a function that is told of every panic that a server
// interceptor recovered, beside the log and the metric: the call's context and
// full method name, the value ([ErrGoexit] for a runtime.Goexit) and the stack.
// It runs on the goroutine of the call, before the caller has its answer; a
// panic in it is contained and logged. Default: none.
func WithPanicHandler(f func(ctx context.Context, method string, p any, stack []byte)) Option {
	return optionFunc(func(o *options) error {
		if f == nil {
			return errors.New("WithPanicHandler: the handler is nil")
		}
		o.panicHandler = f
		return nil
	})
}

// WithSignals sets the signals that make Serve drain. os.Interrupt skips the
// announce phase and, while a drain runs, cuts it short; every other signal
// starts a full drain and is ignored while one runs. Default: SIGTERM and
// os.Interrupt. Without arguments Serve handles no signal.
func WithSignals(sigs ...os.Signal) Option {
	return optionFunc(func(o *options) error {
		for _, s := range sigs {
			if s == nil {
				return errors.New("WithSignals: a signal is nil")
			}
		}
		o.signals = sigs
		return nil
	})
}
