package conformance

import (
	"context"
	"fmt"
	"testing"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
)

// BenchmarkCollect is what a scrape costs when 10,000 methods with all gates
// have been called. The provider's default is to fold all beyond 2,000 series of
// an instrument into one.
func BenchmarkCollect(b *testing.B) {
	for _, limit := range []int{2000, 0} {
		b.Run(fmt.Sprintf("10000 methods/limit %d", limit), func(b *testing.B) {
			reader := sdkmetric.NewManualReader()
			provider := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader), sdkmetric.WithCardinalityLimit(limit))
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
			b.ReportAllocs()
			for b.Loop() {
				var rm metricdata.ResourceMetrics
				if err := reader.Collect(b.Context(), &rm); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
