package supervise

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"
)

// Option configures a Supervisor. The interface is sealed: options come from the
// With functions of this package.
type Option interface {
	apply(*options) error
}

type options struct {
	logger      *slog.Logger
	meter       metric.MeterProvider
	backoff     Backoff
	maxRestarts int
	window      time.Duration // 0: restarts are not limited
	escalation  func(error)   // nil: none
	draining    <-chan struct{}
}

type optionFunc func(*options) error

func (f optionFunc) apply(o *options) error { return f(o) }

func newOptions(opts []Option) (*options, error) {
	o := &options{
		logger:      slog.Default(),
		meter:       otel.GetMeterProvider(),
		maxRestarts: 5,
		window:      time.Minute,
	}
	o.backoff, _ = Backoff{}.complete()
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

// WithLogger sets where each end of a worker's run is logged, once, with the stack of
// a panic; and escalations, a panicking callback, workers that Stop abandons and
// what Go contains in a worker. Default: slog.Default() as it is when the supervisor
// is made.
func WithLogger(l *slog.Logger) Option {
	return optionFunc(func(o *options) error {
		if l == nil {
			return errors.New("WithLogger: the logger is nil")
		}
		o.logger = l
		return nil
	})
}

// WithMeterProvider sets the OpenTelemetry provider that the supervisor's
// metrics are registered with, until Stop:
//
//   - resilience.worker.restarts {worker, cause = return | error | panic | goexit}
//   - resilience.worker.panics {worker}: panics and runtime.Goexit
//   - resilience.worker.state {worker, state}: 1 for the state that the worker is
//     in, 0 for the others
//
// They know a worker by its name alone, so workers of one name in two supervisors
// are added up. Default: the global provider as it is when the supervisor is made.
func WithMeterProvider(p metric.MeterProvider) Option {
	return optionFunc(func(o *options) error {
		if p == nil {
			return errors.New("WithMeterProvider: the provider is nil")
		}
		o.meter = p
		return nil
	})
}

// WithBackoff sets the pauses between a worker's runs. Default: the zero Backoff.
func WithBackoff(b Backoff) Option {
	return optionFunc(func(o *options) error {
		var err error
		o.backoff, err = b.complete()
		return err
	})
}

// WithIntensity sets how often each worker may be restarted: when it is to be
// restarted for the (maxRestarts + 1)th time within window, it is given up and
// escalates. maxRestarts is 0 (none: the first end escalates) to 1000; a window of 0
// is no limit. Default: 5 within a minute, which a worker that always fails at once
// exceeds 8 to 23 s after its first failure, and one that takes 20 s to fail never.
//
// It is the restart intensity of OTP's supervisors, but for each worker, where OTP
// counts all of a supervisor's: ten workers that lose the same database fail ten
// times at once, and would end the process where a backoff of a second helps.
func WithIntensity(maxRestarts int, window time.Duration) Option {
	return optionFunc(func(o *options) error {
		if maxRestarts < 0 || maxRestarts > 1000 || window < 0 {
			return fmt.Errorf("WithIntensity: found %d restarts within %v, allowed 0 to 1000, and a window that is not negative", maxRestarts, window)
		}
		o.maxRestarts, o.window = maxRestarts, window
		return nil
	})
}

// WithEscalation sets the function that is told when a worker escalates. It is
// called once in the life of a supervisor, for the first that does; later ones are
// logged. The error names the worker and wraps what its Run returned.
//
// The worker that escalates has ended, the others go on and are restarted as
// before: the function decides what becomes of them, with guard.Drain perhaps, or
// Stop. It is called on the goroutine that was the worker's, and nothing waits
// for it; a panic in it is contained and logged. Default: none; escalations are
// logged, and end Run.
func WithEscalation(f func(err error)) Option {
	return optionFunc(func(o *options) error {
		if f == nil {
			return errors.New("WithEscalation: the function is nil")
		}
		o.escalation = f
		return nil
	})
}

// WithDraining sets a channel, guard.Draining() perhaps, that is closed when
// nothing is to be restarted any more, nor to escalate: workers that run go on
// until they end or Stop ends them, those that back off have ended. Default: none.
func WithDraining(draining <-chan struct{}) Option {
	return optionFunc(func(o *options) error {
		if draining == nil {
			return errors.New("WithDraining: the channel is nil")
		}
		o.draining = draining
		return nil
	})
}
