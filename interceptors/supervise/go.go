package supervise

import (
	"context"
	"log/slog"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"
)

// Go runs f(ctx) on a goroutine of its own, for what a handler starts beside its
// answer. A panic in f, or a runtime.Goexit, is logged with its stack and counted in
// the metric resilience.goroutine.panics; it never ends the process, which a panic
// behind a plain go statement does. f is not restarted, and nothing waits for it: a
// worker is for what must go on.
//
// f gets ctx as it is. A handler's context ends with the handler; what is to
// outlive it wants context.WithoutCancel(ctx).
//
// The log and the meter provider are slog.Default() and OpenTelemetry's global one
// as they are when f panics; in a worker, those of its supervisor.
func Go(ctx context.Context, f func(ctx context.Context)) {
	if ctx == nil {
		ctx = context.Background()
	}
	go func() {
		e := new(end)
		defer reportGo(ctx, e)
		defer e.caught()
		f(ctx)
		e.cause = returned
	}()
}

// reportGo tells of a goroutine that did not return.
func reportGo(ctx context.Context, e *end) {
	if !e.unwound() {
		return
	}
	logger, meter := slog.Default(), otel.GetMeterProvider()
	contain(func() {
		if w := workerOf(ctx); w != nil {
			logger, meter = w.supervisor.opts.logger, w.supervisor.opts.meter
		}
	})
	contain(func() {
		n, err := meter.Meter(scopeName).Int64Counter("resilience.goroutine.panics",
			metric.WithUnit("{panic}"), metric.WithDescription("Contained panics of goroutines of supervise.Go, runtime.Goexit included."))
		if err == nil {
			n.Add(ctx, 1)
		}
	})
	contain(func() { logger.LogAttrs(ctx, slog.LevelError, "goroutine panicked", e.attrs()...) })
}
