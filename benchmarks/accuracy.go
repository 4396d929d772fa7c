package main

import (
	"context"
	"fmt"
	"math"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/failsafe-go/failsafe-go"
	"github.com/failsafe-go/failsafe-go/bulkhead"
	"github.com/failsafe-go/failsafe-go/failsafegrpc"
	"github.com/failsafe-go/failsafe-go/ratelimiter"
	uber "go.uber.org/ratelimit"
	"golang.org/x/time/rate"
)

// accuracy measures, in real time, whether limits give what they are set to, and in
// which order.
func accuracy(r *report, set settings) {
	var rows [][]string
	worst := map[string]*[2]float64{} // deviation and excess
	for _, a := range []struct {
		name string
		make maker
	}{{product, ours(onClient, rateBlock)}, {"x/time/rate", armNamed(xRateArm).make}} {
		worst[a.name] = new([2]float64)
		for _, perSecond := range set.rates {
			for _, pattern := range []string{"steady", "bursty"} {
				for _, callers := range set.rateCallers {
					progress("accuracy: %s, %v a second, %s, %d callers", a.name, perSecond, pattern, callers)
					l := limits{rate: perSecond, burst: int(perSecond)}
					o := offer(a.make(l, nothing), callers, pattern == "bursty", set.rateTime)
					n, right, off := o.deviation(l)
					excess := max(0, o.excess(l))
					rows = append(rows, []string{a.name, number(perSecond), pattern, number(float64(callers)), number(n), number(right), number(off), number(excess)})
					w := worst[a.name]
					w[0], w[1] = max(w[0], off/max(1, 0.001*right)), max(w[1], excess)
				}
			}
		}
	}
	r.section("Accuracy", fmt.Sprintf("In real time, each row once. Token buckets with a burst of one second's worth, full at first; nobody waits. Steady: callers call without a pause, for %v. Bursty: every 100 ms all callers call until they are refused. "+
		"Right is burst + rate × time, from the first call to the last that was refused (if none was, to the last), and admitted are the calls until then. Off is how far that is from right, beyond what the clock leaves open. Excess is the most calls that any span of time "+
		"had beyond rate × span + burst + 1, where a call that was admitted between two readings of the clock is given the span that holds both."+
		" x/time/rate is given the time before it takes its lock, and one that comes late sets its clock back: with many callers the tokens of a span are given out twice. At 10 a second one call is 3 %% of all that are right: a rate that is less off is not seen there.", set.rateTime))
	r.table([]string{"", "a second", "calls", "callers", "admitted", "right", "off", "excess"}, rows)
	r.check("the rate limit: the worst deviation, in units of max(0.1 %, 1 call)", series{worst[product][0]}, 1, "", nil)
	r.check("the rate limit: the most that any span admitted beyond rate × span + burst + 1", series{worst[product][1]}, 0, " calls", nil)
	waiting(r, set)
}

// span is the time in which a call was decided: it began before and ended after.
type span struct{ from, to time.Duration }

// offered is what became of many calls.
type offered struct {
	admitted []span // by when they ended
	last     span   // that was refused
}

// offer lets callers call, for a time.
func offer(call func() error, callers int, bursty bool, d time.Duration) (o offered) {
	const tick = 100 * time.Millisecond
	var mu sync.Mutex
	var all sync.WaitGroup
	start := time.Now()
	for range callers {
		all.Go(func() {
			var admitted []span
			var last span
			for s := (span{from: time.Since(start)}); s.from < d; s.from = time.Since(start) {
				err := call()
				s.to = time.Since(start)
				if err == nil {
					admitted = append(admitted, s)
					continue
				}
				last = s
				if bursty {
					time.Sleep(tick - s.to%tick)
				} else {
					runtime.Gosched()
				}
			}
			mu.Lock()
			defer mu.Unlock()
			o.admitted = append(o.admitted, admitted...)
			if last.from > o.last.from {
				o.last = last
			}
		})
	}
	all.Wait()
	slices.SortFunc(o.admitted, func(a, b span) int { return int(a.to - b.to) })
	return o
}

// deviation compares the calls that were admitted, by the time of the last that was
// refused, with what a bucket has given then that was full at the first call, and is
// empty: burst + rate × time, and less than one more. off is what is beyond what the
// clock leaves open, of both.
func (o offered) deviation(l limits) (n, right, off float64) {
	gives := func(d time.Duration) float64 { return float64(l.burst) + l.rate*d.Seconds() }
	last := o.last
	if last == (span{}) { // none was: by the end
		end := o.admitted[len(o.admitted)-1].to
		last = span{end, end}
	}
	least := 0.0
	for _, s := range o.admitted {
		if s.to <= last.from {
			least++
		}
		if s.from <= last.to {
			n++
		}
	}
	first := o.admitted[0]
	low, high := gives(last.from-first.to)-1, gives(last.to-first.from)
	return n, (low + high) / 2, max(0, low-n, least-high)
}

// excess is the most that any span admits beyond rate × span + burst + 1. From the
// i-th call to the j-th it is at least those between, from when the earliest began.
func (o offered) excess(l limits) float64 {
	began := make([]float64, len(o.admitted)) // the earliest from the i-th on
	for i, earliest := len(began)-1, math.Inf(1); i >= 0; i-- {
		earliest = min(earliest, o.admitted[i].from.Seconds())
		began[i] = earliest
	}
	most, least := math.Inf(-1), math.Inf(1)
	for j, s := range o.admitted {
		least = min(least, float64(j)-l.rate*began[j])
		most = max(most, float64(j+1)-l.rate*s.to.Seconds()-least)
	}
	return most - float64(l.burst) - 1
}

// A waiter is a limit that lets calls wait; do is the call.
type waiter func(do func() error) error

// waiting measures in which order those who wait are admitted, and whether all get
// the same.
func waiting(r *report, set settings) {
	const perSecond, callers = 1000, 100
	ours := func(block string) func() waiter {
		return func() waiter {
			i := parsed("client: {rules: [{methods: ['*'], " + block + "}]}").UnaryClientInterceptor()
			return func(do func() error) error { return invoke(i, method, do) }
		}
	}
	fails := func(policy func() failsafe.Policy[any]) func() waiter {
		return func() waiter {
			i := failsafegrpc.NewUnaryClientInterceptor(policy())
			return func(do func() error) error { return invoke(i, method, do) }
		}
	}
	var rows [][]string
	for _, a := range []struct {
		name string
		rate bool
		make func() waiter
	}{
		{product + ", token bucket", true, ours("rate_limit: {requests_per_second: 1000, burst: 10, max_wait: 1h}")},
		{product + ", pacing", true, ours("rate_limit: {algorithm: pacing, requests_per_second: 1000, burst: 10, max_wait: 1h}")},
		{"x/time/rate Wait", true, func() waiter {
			l := rate.NewLimiter(perSecond, 10)
			return func(do func() error) error {
				must(0, l.Wait(context.Background()))
				return do()
			}
		}},
		{"uber ratelimit Take", true, func() waiter {
			l := uber.New(perSecond)
			return func(do func() error) error {
				l.Take()
				return do()
			}
		}},
		{"failsafe-go smooth rate limiter", true, fails(func() failsafe.Policy[any] {
			return ratelimiter.NewSmoothBuilder[any](perSecond, time.Second).WithMaxWaitTime(time.Hour).Build()
		})},
		{product + ", concurrency limit", false, ours("concurrency_limit: {max_in_flight: 1, max_queue: 1000000}")},
		{"failsafe-go bulkhead", false, fails(func() failsafe.Policy[any] {
			return bulkhead.NewBuilder[any](1).WithMaxWaitTime(time.Hour).Build()
		})},
		{"a channel of one place", false, func() waiter {
			places := make(chan struct{}, 1)
			return func(do func() error) error {
				places <- struct{}{}
				defer func() { <-places }()
				return do()
			}
		}},
	} {
		progress("accuracy: %s, waiting", a.name)
		each, total := shares(a.make(), callers, set.rateTime)
		row := []string{a.name, "", number(slices.Min(each)), number(slices.Max(each)), fmt.Sprintf("%.1f %%", 100*overtaken(a.make(), set.queueCallers))}
		if a.rate {
			row[1] = fmt.Sprintf("%.1f %%", 100*total/(perSecond*set.rateTime.Seconds()))
		}
		rows = append(rows, row)
	}
	r.section("Waiting", fmt.Sprintf("%d callers wait, and call again at once, for %v. Rate is what they get together of %d a second; a burst of 10 comes on top, where there is one. Least and most are what one of them gets, where 100 is the same for all. "+
		"Overtaken is the share of %d calls, come one after the other, that were admitted after one that came later. Limits of concurrency have one place, which is held for a `runtime.Gosched`.", callers, set.rateTime, perSecond, set.queueCallers))
	r.table([]string{"", "rate", "least", "most", "overtaken"}, rows)
}

// shares is how much each of n callers gets, in percent of the mean.
func shares(call waiter, n int, d time.Duration) (each []float64, total float64) {
	each = make([]float64, n)
	var all sync.WaitGroup
	start := time.Now()
	for i := range each {
		all.Go(func() {
			for time.Since(start) < d {
				must(0, call(func() error {
					if time.Since(start) < d {
						each[i]++
					}
					return yield()
				}))
			}
		})
	}
	all.Wait()
	for _, got := range each {
		total += got
	}
	for i := range each {
		each[i] *= 100 * float64(n) / total
	}
	return each, total
}

// overtaken is the share of n calls, one after the other, that are admitted after one
// that came later. The first holds its place until all have come.
func overtaken(call waiter, n int) float64 {
	var mu sync.Mutex
	var order []int
	var all sync.WaitGroup
	came := make(chan struct{})
	allCame := make(chan struct{})
	for i := range n {
		all.Go(func() {
			came <- struct{}{}
			must(0, call(func() error {
				mu.Lock()
				order = append(order, i)
				mu.Unlock()
				if i == 0 {
					<-allCame
				}
				return yield()
			}))
		})
		<-came
		for calls := time.Now(); time.Since(calls) < 50*time.Microsecond; {
			runtime.Gosched()
		}
	}
	close(allCame)
	all.Wait()
	late, latest := 0.0, -1
	for _, i := range order {
		if i < latest {
			late++
		}
		latest = max(latest, i)
	}
	return late / float64(n)
}
