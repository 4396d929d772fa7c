package supervise

import (
	"context"
	"errors"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// scopeName is the module path, as OpenTelemetry asks for.
const scopeName = "github.com/grpc-resilience/grpc-resilience"

// observed are the instruments that the collection callback fills from the
// workers' own counts.
type observed struct {
	restarts, panics metric.Int64ObservableCounter
	state            metric.Int64ObservableUpDownCounter
}

// register makes the instruments and has them filled at each collection.
func (s *Supervisor) register() (metric.Registration, error) {
	meter := s.opts.meter.Meter(scopeName)
	var (
		o    observed
		errs [3]error
	)
	o.restarts, errs[0] = meter.Int64ObservableCounter("resilience.worker.restarts",
		metric.WithUnit("{restart}"), metric.WithDescription("Restarts of workers, by how the run before ended."))
	o.panics, errs[1] = meter.Int64ObservableCounter("resilience.worker.panics",
		metric.WithUnit("{panic}"), metric.WithDescription("Contained panics of workers, runtime.Goexit included."))
	o.state, errs[2] = meter.Int64ObservableUpDownCounter("resilience.worker.state",
		metric.WithUnit("1"), metric.WithDescription("1 for the state that the worker is in, 0 for the others."))
	if err := errors.Join(errs[:]...); err != nil {
		return nil, err
	}
	return meter.RegisterCallback(func(_ context.Context, to metric.Observer) error {
		s.observe(to, &o)
		return nil
	}, o.restarts, o.panics, o.state)
}

// observe reads all workers, then tells of them: not under the lock.
func (s *Supervisor) observe(to metric.Observer, o *observed) {
	type reading struct {
		WorkerSnapshot
		counts
	}
	var all []reading
	s.mu.Lock()
	for _, w := range s.workers {
		all = append(all, reading{w.snapshotLocked(), w.counts})
	}
	s.mu.Unlock()
	for _, w := range all {
		name := attribute.String("worker", w.Name)
		for c, n := range w.restarts {
			to.ObserveInt64(o.restarts, int64(n), metric.WithAttributes(name, attribute.String("cause", cause(c).String())))
		}
		to.ObserveInt64(o.panics, int64(w.panics), metric.WithAttributes(name))
		for state := range states {
			is := int64(0)
			if state == w.State {
				is = 1
			}
			to.ObserveInt64(o.state, is, metric.WithAttributes(name, attribute.String("state", state.String())))
		}
	}
}
