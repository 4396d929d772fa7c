package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/afex/hystrix-go/hystrix"
	"google.golang.org/grpc/codes"

	shopv1 "github.com/grpc-resilience/grpc-resilience/examples/shop/v1"
	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// The sections on what hystrix-go and go.uber.org/ratelimit decide.

// content marks the calls of those who would rather see no orders than an error.
type content struct{}

// noOrders is the fallback of Search. It leaves other calls their error.
func noOrders(ctx context.Context, _ string, _, reply any, cause error) error {
	if ctx.Value(content{}) == nil {
		return cause
	}
	reply.(*shopv1.SearchResponse).Orders = []*shopv1.Order{} // and no error
	return nil
}

func (w *walk) circuit(ctx context.Context) error {
	before, err := w.shop.set(ctx, "index", down)
	if err != nil {
		return err
	}
	call := func() error { return w.client.call(ctx, search) }
	open := refusedFor(codes.Unavailable, interceptors.ReasonBreakerOpen)

	// hystrix-go has defaults for what the policy does not say, and applies results
	// a little late.
	most := max(hystrix.DefaultVolumeThreshold, 2*before.Methods[search].Started) + 5
	failures := 0
	for failures < 2*most && !open(call()) {
		failures++
	}
	w.claimThat(0 < failures && failures <= most, "hystrix: Search's circuit", fmt.Sprintf("open after at most %d failures", most),
		fmt.Sprintf("%s after %d failures", w.state(search), failures))
	name := w.guard.HystrixName(interceptors.Client, w.client.conn.CanonicalTarget(), search)
	w.claim("hystrix: hystrix-go's own word for it", "open", itsOwnWord(name))

	var errs, answered []error
	const calls = 50
	arrived, err := w.arrivals(ctx, func() {
		errs = times(calls, call)
		answered = times(calls, func() error { return w.client.call(context.WithValue(ctx, content{}, true), search) })
	}, search)
	w.claimAll("hystrix: calls refused with UNAVAILABLE, BREAKER_OPEN", errs, open)
	w.claimAll("fallback: calls that it answers meanwhile", answered, isOK)
	w.claim("fallback: calls that reach the server meanwhile", outOf(0, 2*calls), outOf(arrived, 2*calls))
	w.claim("fallback: Search's circuit, which does not count its answers", "open", itsOwnWord(name))
	if err != nil {
		return err
	}

	if _, err = w.shop.set(ctx, "index", up); err != nil {
		return err
	}
	for err = call(); open(err) && ctx.Err() == nil; err = call() {
		pause(ctx, 10*time.Millisecond)
	}
	if err != nil {
		return fmt.Errorf("the probe of Search: %w", err)
	}
	w.claimAll("hystrix: after the probe, calls that are OK", times(10, call), isOK)
	w.claim("hystrix: hystrix-go's own word for it now", "closed", itsOwnWord(name))
	return nil
}

// itsOwnWord asks hystrix-go, as a dashboard would.
func itsOwnWord(name string) string {
	switch circuit, created, err := hystrix.GetCircuit(name); {
	case err != nil || created:
		return "unknown"
	case circuit.IsOpen():
		return "open"
	}
	return "closed"
}

func (w *walk) pacing(ctx context.Context) error {
	limit := rule(w.policy.GetClient().GetRules(), "get-order").GetRateLimit()
	interval := time.Duration(float64(time.Second) / limit.GetRequestsPerSecond())

	const calls = 40
	var errs []error
	began := time.Now()
	arrived, err := w.arrivals(ctx, func() {
		errs = gather(calls, together(calls, func() error { return w.client.call(ctx, get) }))
	}, get)
	took := time.Since(began)
	if err != nil {
		return err
	}
	// A machine that is not busy gets to most; a busy one wakes late who waits, and
	// some then too late.
	const least = 2
	most := int(took/interval) + 1
	w.claimThat(least <= arrived && arrived <= most, fmt.Sprintf("pacing: of %d calls at once, the handler has seen", calls),
		fmt.Sprintf("%d to %d", least, most), fmt.Sprint(arrived))
	w.claim("pacing: calls that are OK", fmt.Sprint(arrived), fmt.Sprint(count(errs, isOK)))
	w.claimAll("pacing: others are refused, RESOURCE_EXHAUSTED, RATE_LIMITED", failures(errs), refusedFor(codes.ResourceExhausted, interceptors.ReasonRateLimited))

	latest := w.shop.latest.Methods[get].Latest
	latest = latest[max(0, len(latest)-arrived):]
	if len(latest) < least {
		return errors.New("too few calls of Get to see how they are spaced")
	}
	apart := latest[len(latest)-1].Sub(latest[0]) / time.Duration(len(latest)-1)
	w.claimThat(apart >= interval/2, fmt.Sprintf("pacing: time between two of them, %v by the policy", interval),
		"at least "+(interval/2).String(), apart.Round(10*time.Microsecond).String())
	return nil
}
