package conformance

import (
	"context"
	"fmt"
	"testing"

	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
)

// BenchmarkCollect is what a scrape costs when 10,000 methods with all gates
// have been called, beside what the SDK alone takes for the same series. The
// SDK's default is to fold all beyond 2,000 series of an instrument into one.
func BenchmarkCollect(b *testing.B) {
	limits := map[string]*reader{"limit 2000": newReader(2000), "limit none": newReader(0)}
	provider := sdkmetric.NewMeterProvider(sdkmetric.WithReader(limits["limit 2000"]), sdkmetric.WithReader(limits["limit none"]))
	methods := make([]string, 10_000)
	for i := range methods {
		methods[i] = fmt.Sprintf("/bench.v1.Bench/Method%d", i)
	}
	guard, err := interceptors.New(&resiliencev1.Policy{Server: &resiliencev1.ServerPolicy{Rules: []*resiliencev1.MethodPolicy{{
		Methods:          methods,
		Breaker:          &resiliencev1.Breaker{},
		RateLimit:        &resiliencev1.RateLimit{RequestsPerSecond: 1000},
		ConcurrencyLimit: &resiliencev1.ConcurrencyLimit{MaxInFlight: proto.Uint32(10)},
	}}}}, interceptors.WithMeterProvider(provider))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = guard.Close() })
	call := guard.UnaryServerInterceptor()
	for _, m := range methods {
		if _, err := call(b.Context(), nil, &grpc.UnaryServerInfo{FullMethod: m}, func(context.Context, any) (any, error) { return nil, nil }); err != nil {
			b.Fatal(err)
		}
	}
	all := limits["limit none"].collect(b)
	for name, r := range limits {
		b.Run(name+"/guard", r.bench)
		b.Run(name+"/SDK alone", func(b *testing.B) {
			alone := newReader(r.limit)
			replay(b, sdkmetric.NewMeterProvider(sdkmetric.WithReader(alone)), all.ScopeMetrics[0])
			alone.bench(b)
		})
	}
}

// reader is a ManualReader with a limit of series an instrument.
type reader struct {
	*sdkmetric.ManualReader
	limit int
}

func newReader(limit int) *reader {
	return &reader{limit: limit, ManualReader: sdkmetric.NewManualReader(sdkmetric.WithCardinalityLimitSelector(
		func(sdkmetric.InstrumentKind) (int, bool) { return limit, false }))}
}

func (r *reader) collect(b *testing.B) (rm metricdata.ResourceMetrics) {
	if err := r.Collect(b.Context(), &rm); err != nil {
		b.Fatal(err)
	}
	return rm
}

func (r *reader) bench(b *testing.B) {
	series := 0
	for _, m := range r.collect(b).ScopeMetrics[0].Metrics {
		switch data := m.Data.(type) {
		case metricdata.Sum[int64]:
			series += len(data.DataPoints)
		case metricdata.Gauge[float64]:
			series += len(data.DataPoints)
		}
	}
	b.ReportAllocs()
	for b.Loop() {
		r.collect(b)
	}
	b.ReportMetric(float64(series), "series")
}

// replay observes the series of a collection, instrument by instrument, with
// values and options that are made beforehand.
func replay(b *testing.B, provider metric.MeterProvider, from metricdata.ScopeMetrics) {
	meter := provider.Meter(from.Scope.Name)
	callback := func(inst metric.Observable, observe func(metric.Observer)) {
		if _, err := meter.RegisterCallback(func(_ context.Context, to metric.Observer) error { observe(to); return nil }, inst); err != nil {
			b.Fatal(err)
		}
	}
	for _, m := range from.Metrics {
		switch data := m.Data.(type) {
		case metricdata.Sum[int64]:
			inst, _ := meter.Int64ObservableUpDownCounter(m.Name, metric.WithUnit(m.Unit), metric.WithDescription(m.Description))
			opts := options(data.DataPoints)
			callback(inst, func(to metric.Observer) {
				for i := range data.DataPoints {
					to.ObserveInt64(inst, data.DataPoints[i].Value, opts[i]...)
				}
			})
		case metricdata.Gauge[float64]:
			inst, _ := meter.Float64ObservableGauge(m.Name, metric.WithUnit(m.Unit), metric.WithDescription(m.Description))
			opts := options(data.DataPoints)
			callback(inst, func(to metric.Observer) {
				for i := range data.DataPoints {
					to.ObserveFloat64(inst, data.DataPoints[i].Value, opts[i]...)
				}
			})
		}
	}
}

func options[N int64 | float64](points []metricdata.DataPoint[N]) [][]metric.ObserveOption {
	opts := make([][]metric.ObserveOption, len(points))
	for i, p := range points {
		opts[i] = []metric.ObserveOption{metric.WithAttributeSet(p.Attributes)}
	}
	return opts
}
