package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
)

// Each section makes calls and claims what must come of them. Its error says
// that it makes no sense to go on.

func (w *walk) healthy(ctx context.Context) error {
	var errs []error
	arrived, err := w.arrivals(ctx, func() {
		ticker := time.NewTicker(50 * time.Millisecond) // well below every limit
		defer ticker.Stop()
		for range w.rounds {
			errs = append(errs, w.client.round(ctx, methods)...)
			<-ticker.C
		}
	}, methods...)
	w.claimAll("healthy: calls that are OK", errs, isOK)
	w.claim("healthy: calls that handlers have seen", fmt.Sprint(len(errs)), fmt.Sprint(arrived))
	w.claim("healthy: breakers that are closed", outOf(len(methods), len(methods)), outOf(w.closed(methods), len(methods)))
	return err
}

func (w *walk) outage(ctx context.Context) error {
	if _, err := w.shop.set(ctx, "warehouse", down); err != nil {
		return err
	}
	want := failuresToOpen(rule(w.policy.GetClient().GetRules(), "place-order").GetBreaker(), w.rounds)
	arrived, err := w.arrivals(ctx, func() {
		for range 2 * want {
			before := time.Now()
			if errors.Is(w.client.call(ctx, place), interceptors.ErrBreakerOpen) {
				return // it opened with the call before
			}
			w.opening = before
		}
	}, place)
	if err != nil {
		return err
	}
	w.claim("outage: Place's breaker", fmt.Sprintf("open after %d failures", want), fmt.Sprintf("%s after %d failures", w.state(place), arrived))

	const calls = 50
	var took []time.Duration
	var errs []error
	arrived, err = w.arrivals(ctx, func() {
		errs = times(calls, func() error {
			before := time.Now()
			err := w.client.call(ctx, place)
			took = append(took, time.Since(before))
			return err
		})
	}, place)
	slices.Sort(took)
	median := took[len(took)/2]
	w.claim("outage: calls that still reach the server", outOf(0, calls), outOf(arrived, calls))
	w.claimAll("outage: calls refused with UNAVAILABLE, BREAKER_OPEN", errs, refusedFor(codes.Unavailable, interceptors.ReasonBreakerOpen))
	w.claimAll("outage: refusals that say when to come back (RetryInfo)", errs, func(err error) bool {
		_, retry := refusal(err)
		return retry > 0
	})
	w.claimThat(median < latency/5, "outage: what a refusal takes, in the median", "below "+(latency/5).String(), median.String())
	if err != nil {
		return err
	}

	others := slices.DeleteFunc(slices.Clone(methods), func(m string) bool { return m == place })
	arrived, err = w.arrivals(ctx, func() { errs = w.client.round(ctx, others) }, others...)
	w.claimAll("outage: calls of other methods that are OK", errs, isOK)
	w.claim("outage: calls of other methods that handlers have seen", fmt.Sprint(len(errs)), fmt.Sprint(arrived))
	w.claim("outage: other breakers that are closed", outOf(len(others), len(others)), outOf(w.closed(others), len(others)))
	return err
}

// failuresToOpen is how many failures after so many successes open a breaker.
func failuresToOpen(b *resiliencev1.Breaker, successes int) int {
	failures := 1
	for {
		all := failures + successes
		if all >= int(b.GetRequestVolumeThreshold()) && failures*100 >= all*int(b.GetErrorPercentThreshold()) {
			return failures
		}
		failures++
	}
}

func (w *walk) healing(ctx context.Context) error {
	sleep := rule(w.policy.GetClient().GetRules(), "place-order").GetBreaker().GetSleepWindow().AsDuration()
	before, err := w.shop.set(ctx, "warehouse", stuck) // so that the probe takes until we let it go
	if err != nil {
		return err
	}
	states := []string{w.state(place)}

	// Somebody keeps calling; the first call that is not refused is the probe.
	probe := make(chan error, 1)
	go func() {
		err := w.client.call(ctx, place)
		for refusedFor(codes.Unavailable, interceptors.ReasonBreakerOpen)(err) && ctx.Err() == nil {
			pause(ctx, 10*time.Millisecond)
			err = w.client.call(ctx, place)
		}
		probe <- err
	}()
	_, err = w.shop.await(ctx, sleep+time.Second, func(r report) bool { return r.Methods[place].Started > before.Methods[place].Started })
	if err != nil {
		return err
	}
	slept := time.Since(w.opening)
	states = append(states, w.state(place))

	const others = 5
	errs := gather(others, together(others, func() error {
		quick, cancel := context.WithTimeout(ctx, time.Second) // a second probe would be stuck as well
		defer cancel()
		return w.client.call(quick, place)
	}))
	now, err := w.shop.set(ctx, "warehouse", up)
	if err != nil {
		return err
	}
	probed := <-probe
	states = append(states, w.state(place))

	w.claimThat(slept >= sleep, "heal: time in which no call was sent", "at least "+sleep.String(), slept.Round(time.Millisecond).String())
	w.claim("heal: half-open, calls sent and calls refused", fmt.Sprintf("1, %d", others), fmt.Sprintf("%d, %d",
		now.Methods[place].Started-before.Methods[place].Started, count(errs, refusedFor(codes.Unavailable, interceptors.ReasonBreakerOpen))))
	w.claim("heal: answer to the probe", "OK", status.Code(probed).String())
	w.claim("heal: states of Place's breaker", "open, half_open, closed", strings.Join(states, ", "))

	arrived, err := w.arrivals(ctx, func() { errs = times(10, func() error { return w.client.call(ctx, place) }) }, place)
	w.claimAll("heal: calls that are OK again", errs, isOK)
	w.claim("heal: calls that the handler has seen", fmt.Sprint(len(errs)), fmt.Sprint(arrived))
	return err
}

func (w *walk) rateLimit(ctx context.Context) error {
	limit := rule(w.policy.GetServer().GetRules(), "list-products").GetRateLimit()
	rate, burst := limit.GetRequestsPerSecond(), int(limit.GetBurst())

	var errs []error
	began := time.Now()
	arrived, err := w.arrivals(ctx, func() {
		errs = crowd(ctx, 2*burst, w.spell, func() error { return w.client.call(ctx, list) })
	}, list)
	most := burst + int(rate*time.Since(began).Seconds()) + 1
	if err != nil {
		return err
	}
	w.claimThat(burst <= arrived && arrived <= most, "rate limit: calls let in",
		fmt.Sprintf("%d to %d", burst, most), outOf(arrived, len(errs)))
	w.claim("rate limit: calls that are OK", fmt.Sprint(arrived), fmt.Sprint(count(errs, isOK)))
	shed := failures(errs)
	w.claimAll("rate limit: others get RESOURCE_EXHAUSTED, RATE_LIMITED", shed, refusedFor(codes.ResourceExhausted, interceptors.ReasonRateLimited))
	next := time.Duration(float64(time.Second) / rate).Round(time.Millisecond)
	var waits []time.Duration
	w.claimAll("rate limit: others get RetryInfo", shed, func(err error) bool {
		_, retry := refusal(err)
		waits = append(waits, retry)
		return retry > 0
	})
	slices.Sort(waits)
	if len(waits) > 0 {
		wait := waits[len(waits)/2]
		w.claimThat(wait <= next, "rate limit: the time in it, in the median", "at most "+next.String(), wait.String())
	}
	w.claim("rate limit: List's breaker, which does not count that", "closed", w.state(list))

	patient, err := dial(w.guard, w.shop.addr, retrying)
	if err != nil {
		return err
	}
	defer patient.conn.Close()
	n := int(rate/4) + 1
	arrived, err = w.arrivals(ctx, func() { errs = times(n, func() error { return patient.call(ctx, list) }) }, list)
	w.claimAll("rate limit: calls OK by gRPC's retry and our pushback", errs, isOK)
	w.claim("rate limit: of those, the handler has seen", fmt.Sprint(n), fmt.Sprint(arrived))
	return err
}

func (w *walk) concurrencyLimit(ctx context.Context) error {
	limit := rule(w.policy.GetServer().GetRules(), "search-orders").GetConcurrencyLimit()
	places, queue := int(limit.GetMaxInFlight()), int(limit.GetMaxQueue())
	before, err := w.shop.set(ctx, "index", stuck) // so that calls stay until we let them go
	if err != nil {
		return err
	}
	call := func() error { return w.client.call(ctx, search) }

	running := together(places, call)
	_, err = w.shop.await(ctx, patience, func(r report) bool { return r.Methods[search].inFlight() == places })
	if err != nil {
		return err
	}
	waiting := together(queue, call)
	_, err = w.shop.await(ctx, patience, func(r report) bool { return r.Queued[search] == queue })
	if err != nil {
		return err
	}
	const more = 4
	refused := gather(more, together(more, func() error {
		quick, cancel := context.WithTimeout(ctx, 2*time.Second) // it must not wait
		defer cancel()
		return w.client.call(quick, search)
	}))
	if _, err = w.shop.set(ctx, "index", up); err != nil {
		return err
	}
	served, queued := gather(places, running), gather(queue, waiting)

	// And now without any order.
	errs := crowd(ctx, 3*(places+queue), w.spell, call)
	after, err := w.shop.look(ctx)
	arrived := after.Methods[search].Started - before.Methods[search].Started

	w.claimAll("concurrency: calls that find a place and are OK", served, isOK)
	w.claimAll("concurrency: calls that wait for a place and are OK", queued, isOK)
	w.claimAll("concurrency: others get RESOURCE_EXHAUSTED", refused,
		refusedFor(codes.ResourceExhausted, interceptors.ReasonConcurrencyLimited))
	w.claimAll("concurrency: in a crowd, too, others get RESOURCE_EXHAUSTED", failures(errs),
		func(err error) bool { return status.Code(err) == codes.ResourceExhausted })
	handled := count(slices.Concat(served, queued, refused, errs), isOK)
	w.claim("concurrency: of all that the handler has seen, are OK", fmt.Sprint(arrived), fmt.Sprint(handled))
	w.claim("concurrency: most calls in the handler at one time", fmt.Sprint(places), fmt.Sprint(after.Methods[search].Most))
	return err
}

func (w *walk) panics(ctx context.Context) error {
	const each = 5
	before, err := w.shop.look(ctx)
	if err != nil {
		return err
	}
	unary := times(each, func() error { return w.client.get(ctx, cursed) })
	bidi := times(each, func() error { return w.client.chat(ctx, cursed) })
	internal := func(err error) bool { return status.Code(err) == codes.Internal }
	w.claimAll("panic: unary calls that get INTERNAL", unary, internal)
	w.claimAll("panic: bidi streams that get INTERNAL", bidi, internal)
	leaks := func(err error) bool {
		all := status.Convert(err).Proto().String()
		return strings.Contains(all, secret) || strings.Contains(all, "corrupt") || strings.Contains(all, ".go:")
	}
	w.claim("panic: answers that leak its text or stack", "0", fmt.Sprint(count(slices.Concat(unary, bidi), leaks)))

	lives := func(pid int) string { return fmt.Sprintf("pid %d answers", pid) }
	alive := w.client.call(ctx, get)
	after, err := w.shop.look(ctx)
	if err = cmp.Or(err, alive); err != nil {
		w.claim("panic: the server lives", lives(w.shop.pid), err.Error())
		return err
	}
	panicked := func(r report) int { return r.Methods[get].Panicked + r.Methods[chat].Panicked }
	w.claim("panic: handlers that have panicked", fmt.Sprint(2*each), fmt.Sprint(panicked(after)-panicked(before)))
	w.claim("panic: the server lives", lives(w.shop.pid), lives(after.PID))
	return nil
}
