package interceptors

import (
	"context"
	"strings"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/balance"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
)

// scopeName is the module path, as OpenTelemetry asks for.
const scopeName = "github.com/grpc-resilience/grpc-resilience"

// metrics holds the few instruments that are written as things happen. All
// others are read from the gates' own counters when they are collected, so a
// call pays nothing for them.
type metrics struct {
	wait          metric.Float64Histogram
	drainDuration metric.Float64Histogram
	drainAborted  metric.Int64Counter
	registration  metric.Registration
}

// observed are the instruments that the collection callback fills.
type observed struct {
	decisions, transitions, calls, panics, reloads metric.Int64ObservableCounter
	state, limit, inflight, queued, drainCalls     metric.Int64ObservableUpDownCounter
	available                                      metric.Float64ObservableGauge

	endpointState, endpointInFlight    metric.Int64ObservableUpDownCounter
	endpointWeight, endpointLatency    metric.Float64ObservableGauge
	endpointEjections, endpointLimited metric.Int64ObservableCounter
}

// builder makes instruments and keeps the first error.
type builder struct {
	metric.Meter
	err error
}

func (b *builder) counter(name, unit, description string) metric.Int64ObservableCounter {
	c, err := b.Int64ObservableCounter(name, metric.WithUnit(unit), metric.WithDescription(description))
	b.note(err)
	return c
}

func (b *builder) upDown(name, unit, description string) metric.Int64ObservableUpDownCounter {
	c, err := b.Int64ObservableUpDownCounter(name, metric.WithUnit(unit), metric.WithDescription(description))
	b.note(err)
	return c
}

func (b *builder) gauge(name, unit, description string) metric.Float64ObservableGauge {
	g, err := b.Float64ObservableGauge(name, metric.WithUnit(unit), metric.WithDescription(description))
	b.note(err)
	return g
}

func (b *builder) seconds(name, description string, bounds ...float64) metric.Float64Histogram {
	h, err := b.Float64Histogram(name, metric.WithUnit("s"), metric.WithDescription(description), metric.WithExplicitBucketBoundaries(bounds...))
	b.note(err)
	return h
}

func (b *builder) note(err error) {
	if b.err == nil {
		b.err = err
	}
}

func newMetrics(g *Guard) (*metrics, error) {
	b := &builder{Meter: g.opts.meter.Meter(scopeName)}
	m := &metrics{
		wait: b.seconds("resilience.wait.duration", "Time that calls waited for a token or a place.",
			0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
		drainDuration: b.seconds("resilience.drain.duration", "Time that drains took.",
			0.1, 0.5, 1, 2.5, 5, 10, 15, 20, 25, 30, 60, 300),
	}
	var err error
	m.drainAborted, err = b.Int64Counter("resilience.drain.aborted", metric.WithUnit("{call}"), metric.WithDescription("Calls that a drain cut."))
	b.note(err)
	o := observed{
		decisions:   b.counter("resilience.decisions", "{call}", "Calls admitted and rejected, by the gate that decided."),
		transitions: b.counter("resilience.breaker.transitions", "{transition}", "Changes of state of circuit breakers."),
		calls:       b.counter("resilience.breaker.calls", "{call}", "Admitted calls of methods with a breaker, by outcome."),
		panics:      b.counter("resilience.panics", "{panic}", "Recovered panics of handlers."),
		reloads:     b.counter("resilience.config.reloads", "{reload}", "Policies that Reload was given, by what became of them."),
		state:       b.upDown("resilience.breaker.state", "1", "1 for the state that the breaker is in, 0 for the others."),
		limit:       b.upDown("resilience.concurrency.limit", "{call}", "Places for unary calls."),
		inflight:    b.upDown("resilience.concurrency.inflight", "{call}", "Calls and streams that hold a place."),
		queued:      b.upDown("resilience.concurrency.queued", "{call}", "Calls that wait for a place."),
		drainCalls:  b.upDown("resilience.drain.inflight", "{call}", "Calls being handled while the server drains."),
	}
	o.available = b.gauge("resilience.rate.available", "{token}", "Tokens that can be taken at once.")
	o.endpointState = b.upDown("resilience.endpoint.state", "{channel}", "Channels by what they do with the endpoint.")
	o.endpointInFlight = b.upDown("resilience.endpoint.inflight", "{attempt}", "Attempts in flight at the endpoint.")
	o.endpointWeight = b.gauge("resilience.endpoint.weight", "1", "Share of the endpoint, 1 for a full one.")
	o.endpointLatency = b.gauge("resilience.endpoint.latency", "s", "Mean latency of unary calls that succeeded.")
	o.endpointEjections = b.counter("resilience.endpoint.ejections", "{ejection}", "Ejections of the endpoint, by cause.")
	o.endpointLimited = b.counter("resilience.endpoint.limited", "{attempt}", "Attempts that found all endpoints at their rate limit.")
	if b.err != nil {
		return nil, b.err
	}
	m.registration, err = b.RegisterCallback(func(_ context.Context, to metric.Observer) error {
		g.observe(to, &o)
		return nil
	}, o.decisions, o.transitions, o.calls, o.panics, o.reloads, o.state, o.limit, o.inflight, o.queued, o.drainCalls, o.available,
		o.endpointState, o.endpointInFlight, o.endpointWeight, o.endpointLatency, o.endpointEjections, o.endpointLimited)
	return m, err
}

func (m *metrics) close() error { return m.registration.Unregister() }

// waited records a call's time in a queue; calls that did not wait are not in it.
func (m *metrics) waited(gt *gates, kind string, d time.Duration) {
	m.wait.Record(context.Background(), d.Seconds(), gt.with(attribute.String("kind", kind)))
}

func (m *metrics) drained(d time.Duration) {
	m.drainDuration.Record(context.Background(), d.Seconds(), ofServer)
}

func (m *metrics) aborted(calls int) {
	m.drainAborted.Add(context.Background(), int64(calls), ofServer)
}

// system is in the attributes of every instrument.
var system = attribute.String("rpc.system.name", "grpc")

// ofServer are the attributes of what is not counted by method.
var ofServer = metric.WithAttributeSet(attribute.NewSet(system, attribute.String("side", Server.String())))

// ofApplied and ofRejected are those of what became of a policy.
var (
	ofApplied  = metric.WithAttributeSet(attribute.NewSet(system, attribute.String("result", "applied")))
	ofRejected = metric.WithAttributeSet(attribute.NewSet(system, attribute.String("result", "rejected")))
)

// with is the option for a series of the method: its own attributes, sorted as
// NewSet wants them, and more.
func (m *gates) with(more ...attribute.KeyValue) metric.MeasurementOption {
	attrs := make([]attribute.KeyValue, 0, 8)
	if m.side == Client {
		attrs = append(attrs, attribute.String("resilience.target", m.target))
	}
	attrs = append(attrs, attribute.String("rpc.method", strings.TrimPrefix(m.method, "/")), system, attribute.String("side", m.side.String()))
	return metric.WithAttributeSet(attribute.NewSet(append(attrs, more...)...))
}

// observe reads every gate's counters.
func (g *Guard) observe(to metric.Observer, o *observed) {
	now := g.now()
	to.ObserveInt64(o.panics, int64(g.panics.Load()), ofServer)
	to.ObserveInt64(o.reloads, int64(g.reloads.applied.Load()), ofApplied)
	to.ObserveInt64(o.reloads, int64(g.reloads.rejected.Load()), ofRejected)
	draining := 0
	if p := g.drain.phase(); p > serving && p < stopped {
		draining = g.inflight.count()
	}
	to.ObserveInt64(o.drainCalls, int64(draining), ofServer)
	for _, m := range g.states() {
		m.observe(to, o, now)
	}
	g.observeEndpoints(to, o)
}

// shownEndpoints bounds the attributes of endpoints, whose addresses come and go.
const shownEndpoints = 200

// observeEndpoints adds up what several channels know of one endpoint.
func (g *Guard) observeEndpoints(to metric.Observer, o *observed) {
	type key struct{ target, address string }
	type sum struct {
		EndpointSnapshot // the first one; InFlight and Ejections are those of all
		states           map[string]int64
	}
	var order []key
	sums := map[key]*sum{}
	for _, e := range g.endpoints() {
		k := key{e.Target, e.Address}
		s := sums[k]
		if s == nil {
			if len(order) == shownEndpoints {
				break
			}
			order = append(order, k)
			s = &sum{EndpointSnapshot: e, states: map[string]int64{}}
			sums[k] = s
		} else {
			s.InFlight += e.InFlight
			for cause, n := range e.Ejections {
				s.Ejections[cause] += n
			}
		}
		s.states[e.State]++
	}
	for _, k := range order {
		s := sums[k]
		attrs := func(more ...attribute.KeyValue) metric.MeasurementOption {
			return metric.WithAttributes(append(more, system, attribute.String("resilience.target", k.target), attribute.String("resilience.endpoint", k.address))...)
		}
		for state := balance.Connecting; state <= balance.Probing; state++ {
			to.ObserveInt64(o.endpointState, s.states[state.String()], attrs(attribute.String("state", state.String())))
		}
		to.ObserveInt64(o.endpointInFlight, int64(s.InFlight), attrs())
		to.ObserveFloat64(o.endpointWeight, s.Weight, attrs())
		if s.Latency > 0 {
			to.ObserveFloat64(o.endpointLatency, s.Latency, attrs())
		}
		for cause, n := range s.Ejections {
			to.ObserveInt64(o.endpointEjections, int64(n), attrs(attribute.String("cause", cause)))
		}
	}
	_, limited := g.balancing.group.Stats()
	for target, n := range limited {
		if n > 0 {
			to.ObserveInt64(o.endpointLimited, int64(n), metric.WithAttributes(system, attribute.String("resilience.target", target)))
		}
	}
}

func (m *gates) observe(to metric.Observer, o *observed, now time.Duration) {
	if m.breaker != nil {
		m.observeBreaker(to, o, now)
	}
	to.ObserveInt64(o.decisions, int64(m.counts.admitted.Load()), m.with(attribute.String("kind", "all"), attribute.String("outcome", "admitted")))
	for i, r := range reasons {
		if n := m.counts.rejected[i].Load(); n > 0 {
			to.ObserveInt64(o.decisions, int64(n), m.with(attribute.String("kind", r.kind), attribute.String("outcome", "rejected"), attribute.String("reason", string(r.reason))))
		}
	}
	if m.rate == nil && m.unary == nil {
		return
	}
	ofMethod := m.with()
	if m.rate != nil {
		available, _ := m.rate.Stats(now)
		to.ObserveFloat64(o.available, available, ofMethod)
	}
	if m.unary != nil {
		inFlight, streams, queued := m.occupied()
		to.ObserveInt64(o.inflight, int64(inFlight+streams), ofMethod)
		l := m.policy.Concurrency
		if l.MaxInFlight > 0 {
			to.ObserveInt64(o.limit, int64(l.MaxInFlight), ofMethod)
		}
		if l.MaxQueue > 0 {
			to.ObserveInt64(o.queued, int64(queued), ofMethod)
		}
	}
}

// observeBreaker leaves out what is zero until the breaker has opened for the
// first time: of thousands of methods, most never do. What counts that opening is
// there from the start, for alerts on its increase.
func (m *gates) observeBreaker(to metric.Observer, o *observed, now time.Duration) {
	in := m.breaker.Stats(now).State
	for _, state := range [...]breaker.State{breaker.Closed, breaker.Open, breaker.HalfOpen} {
		is := int64(0)
		if state == in {
			is = 1
		}
		to.ObserveInt64(o.state, is, m.with(attribute.String("state", state.String())))
	}
	opened := m.counts.transitions[breaker.ErrorPercent].Load()+m.counts.transitions[breaker.SlowCalls].Load() > 0
	for out := Success; out <= Dropped; out++ {
		if n := m.counts.outcomes[out].Load(); n > 0 || opened {
			to.ObserveInt64(o.calls, int64(n), m.with(attribute.String("result", out.String())))
		}
	}
	for i, t := range changes {
		opens := t.Cause == breaker.ErrorPercent || t.Cause == breaker.SlowCalls && m.policy.Breaker.SlowCall > 0
		if n := m.counts.transitions[i].Load(); n > 0 || opened || opens {
			to.ObserveInt64(o.transitions, int64(n), m.with(
				attribute.String("from", t.From.String()), attribute.String("to", t.To.String()), attribute.String("cause", t.Cause.String())))
		}
	}
}

// changes are the transitions that a breaker can make, by their cause.
var changes = [...]breaker.Transition{
	breaker.ErrorPercent: {From: breaker.Closed, To: breaker.Open, Cause: breaker.ErrorPercent},
	breaker.SlowCalls:    {From: breaker.Closed, To: breaker.Open, Cause: breaker.SlowCalls},
	breaker.SleepWindow:  {From: breaker.Open, To: breaker.HalfOpen, Cause: breaker.SleepWindow},
	breaker.ProbeSuccess: {From: breaker.HalfOpen, To: breaker.Closed, Cause: breaker.ProbeSuccess},
	breaker.ProbeFailure: {From: breaker.HalfOpen, To: breaker.Open, Cause: breaker.ProbeFailure},
}

// transitions counts the changes of a breaker's state.
type transitions [len(changes)]atomic.Uint64

func (c *transitions) add(t breaker.Transition) { c[t.Cause].Add(1) }
