package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"github.com/afex/hystrix-go/hystrix"
	"github.com/google/pprof/profile"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
	sdk "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"google.golang.org/grpc"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// named are n names of methods, and a policy with a client rule for each.
func named(n int, blocks string) (names []string, policy string) {
	var b strings.Builder
	b.WriteString("client:\n  rules:\n")
	for i := range n {
		names = append(names, fmt.Sprintf("/bench.v1.Service%d/Method%d", i/10, i))
		fmt.Fprintf(&b, "    - methods: [%s]\n%s", names[i], blocks)
	}
	return names, b.String()
}

// threeGates are the blocks of a rule as they stand in a file.
func threeGates(engine string, places int) string {
	return fmt.Sprintf(`      breaker: {engine: %s, error_percent_threshold: 25, request_volume_threshold: 50}
      rate_limit: {requests_per_second: 10000000, burst: 10000000}
      concurrency_limit: {max_in_flight: %d, max_streams: %[2]d}
`, engine, places)
}

// invoke makes a client call of a method; do is the call.
func invoke(intercept grpc.UnaryClientInterceptor, method string, do func() error) error {
	return intercept(context.Background(), method, nil, nil, nil, func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return do() })
}

func nothing() error { return nil }

func yield() error {
	runtime.Gosched()
	return nil
}

// scale measures what becomes of a call with many methods and goroutines.
func scale(r *report, set settings) {
	var subjects []subject
	var labels [][]string
	for _, methods := range set.sizes {
		names, policy := named(methods, threeGates("window", 100_000))
		intercept, counts, epoch := parsed(policy).UnaryClientInterceptor(), map[string]*[4]atomic.Uint64{}, time.Now()
		for _, m := range names {
			must(0, invoke(intercept, m, nothing))
			counts[m] = new([4]atomic.Uint64)
		}
		// Each goroutine calls all methods in turn, from one that it picks.
		inTurn := func(one func(method string) error) func() func() error {
			return func() func() error {
				i := rand.IntN(methods)
				return func() error {
					i = (i + 1) % methods
					return one(names[i])
				}
			}
		}
		for _, width := range set.sizes {
			labels = append(labels, []string{number(float64(methods)), number(float64(width))})
			subjects = append(subjects,
				subject{name: fmt.Sprint("ours/", methods), width: width, calls: inTurn(func(m string) error { return invoke(intercept, m, yield) })},
				subject{name: fmt.Sprint("floor/", methods), width: width, calls: inTurn(func(m string) error { return counted(epoch, counts, m, yield) })})
		}
	}
	got := measure("scale", subjects, set.scaleRounds, 10*set.batch)
	var rows [][]string
	for i, label := range labels {
		ours, floor := got[subjects[2*i].key()].ns, got[subjects[2*i+1].key()].ns
		rows = append(rows, append(label, spread(ours), spread(floor), spread(over(ours, floor))))
	}
	r.section("Scale", "Clients with breaker, token bucket and concurrency limit; the floor has as many methods in its map. Each goroutine calls all methods in turn, and yields within each call (`runtime.Gosched`), "+
		"so that all goroutines are within a call at once. Wall clock over calls, on all cores.")
	r.table([]string{"methods", "goroutines", "ours, ns", "the floor, ns", "difference, ns"}, rows)

	memory(r, set)
	bulk(r, set)
}

// memory is what a method's gates take.
func memory(r *report, set settings) {
	const few, many = 100, 1e6 // a circuit of hystrix-go is never freed; beyond 4,096 methods one rule gives them state in common
	l := limits{volume: 20, rate: 1000, burst: 1000, places: 100}
	guarded := func(policy string) func(string) error {
		i := parsed(policy).UnaryClientInterceptor()
		return func(m string) error { return invoke(i, m, nothing) }
	}
	byOne := func(engine string) func(int) func(string) error {
		return func(int) func(string) error {
			return guarded("client:\n  rules:\n    - methods: ['*']\n" + threeGates(engine, l.places))
		}
	}
	byMany := func(n int) func(string) error {
		_, policy := named(n, threeGates("window", l.places))
		return guarded(policy)
	}
	header, rows := []string{""}, [][]string{}
	for _, n := range set.sizes[1:] {
		header = append(header, fmt.Sprintf("%s methods, B", number(float64(n))), "goroutines")
	}
	for _, a := range []struct {
		name  string
		most  int  // methods
		rules bool // count too
		held  bool // to the budget
		make  func(n int) (one func(method string) error)
	}{
		{product + ", three gates by one rule", few, false, false, byOne("window")},
		{product + ", three gates by a rule for each method, the rules not counted", many, false, true, byMany},
		{product + ", the same, and the rules", many, true, false, byMany},
		{product + ", three gates by one rule, engine hystrix", few, false, false, byOne("hystrix")},
		{byHandArm, many, false, false, func(int) func(string) error {
			i := byHand(l)
			return func(m string) error { return invoke(i, m, nothing) }
		}},
		{failsafeClient, many, false, false, func(int) func(string) error {
			kept := []grpc.UnaryClientInterceptor{} // as long as the function is
			return func(m string) error {
				kept = append(kept, failsafeOnClient(l))
				return invoke(kept[len(kept)-1], m, nothing)
			}
		}},
		{"hystrix-go, a circuit and its pool", few, false, false, func(int) func(string) error {
			return func(string) error {
				return hystrix.DoC(context.Background(), newCircuit(l), func(context.Context) error { return nil }, nil)
			}
		}},
	} {
		row := []string{a.name}
		for _, n := range set.sizes[1:] {
			if n > a.most {
				row = append(row, "", "")
				continue
			}
			names, _ := named(n, "")
			heap, goroutines := heapInUse(), runtime.NumGoroutine()
			one := a.make(n)
			if !a.rules {
				heap, goroutines = heapInUse(), runtime.NumGoroutine()
			}
			for _, m := range names {
				must(0, one(m))
			}
			bytes, started := float64(heapInUse()-heap)/float64(n), float64(runtime.NumGoroutine()-goroutines)/float64(n)
			runtime.KeepAlive(one)
			row = append(row, number(bytes), number(started))
			if a.held {
				r.check(fmt.Sprintf("a method with three gates, of %s: heap", number(float64(n))), series{bytes}, 1000, " B", nil)
				r.check(fmt.Sprintf("a method with three gates, of %s: goroutines", number(float64(n))), series{started}, 0, "", nil)
			}
		}
		rows = append(rows, row)
	}
	r.section("Memory", fmt.Sprintf("Heap and goroutines that a method takes, when so many have been called once; measured once. One rule gives at most 4,096 methods a state of their own; a circuit of hystrix-go is never freed. Both are measured with %d methods only. "+
		"What failsafe-go takes has its settings in it, since each method needs policies of its own.", few))
	r.table(header, rows)
}

func heapInUse() int64 {
	runtime.GC()
	runtime.GC() // what sync.Pool gave up in the first
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// bulk measures what is done once, or once a scrape, with many methods.
func bulk(r *report, set settings) {
	n := set.sizes[len(set.sizes)-1]
	names, policy := named(n, threeGates("window", 100))
	dir := must(os.MkdirTemp("", "benchmarks"))
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "policy.yaml")
	must(0, os.WriteFile(path, []byte(policy), 0o600))
	callAll := func(opts ...interceptors.Option) {
		i := parsed(policy, opts...).UnaryClientInterceptor()
		for _, m := range names {
			must(0, invoke(i, m, nothing))
		}
	}
	var own observers
	callAll(interceptors.WithMeterProvider(&own))
	reader := sdk.NewManualReader()
	callAll(interceptors.WithMeterProvider(sdk.NewMeterProvider(sdk.WithReader(reader), sdk.WithCardinalityLimit(0))))

	var rows [][]string
	for _, b := range []struct {
		what string
		goal float64 // ms; 0: none
		do   func()
	}{
		{fmt.Sprintf("Load of a policy with %s rules, %s KB of YAML", number(float64(n)), number(float64(len(policy))/1e3)), 100, func() { must(interceptors.Load(path, quiet)) }},
		{"of that, Parse", 0, func() { must(interceptors.Parse("policy", []byte(policy))) }},
		{fmt.Sprintf("the same policy parsed and made a guard, and the first call of each of %s methods", number(float64(n))), 0, func() { callAll() }},
		{fmt.Sprintf("collection of the metrics of %s methods, OpenTelemetry's SDK included", number(float64(n))), 50, func() {
			var all metricdata.ResourceMetrics
			must(0, reader.Collect(context.Background(), &all))
		}},
		{"of that, the guard's part: its callback, to an observer that does nothing", 0, func() { must(0, own.callback(context.Background(), noop.Observer{})) }},
	} {
		progress("scale: %s", b.what)
		var ms series
		for range set.repeats {
			runtime.GC()
			start := time.Now()
			b.do()
			ms = append(ms, time.Since(start).Seconds()*1e3)
		}
		rows = append(rows, []string{b.what, spread(ms)})
		if b.goal > 0 {
			r.check(b.what, ms, b.goal, " ms", func() *profile.Profile { return profiled(set.profile, b.do) })
		}
	}
	r.section("Once, and once a scrape", "Each rule names one method and has all three gates. The SDK's limit of series (2,000 an instrument by default, beyond which they are folded into one) is off.")
	r.table([]string{"", "ms"}, rows)
}

// observers are a meter provider that measures nothing and keeps a guard's callback.
type observers struct {
	noop.MeterProvider
	callback metric.Callback
}

func (o *observers) Meter(string, ...metric.MeterOption) metric.Meter { return observer{to: o} }

type observer struct {
	noop.Meter
	to *observers
}

func (o observer) RegisterCallback(f metric.Callback, _ ...metric.Observable) (metric.Registration, error) {
	o.to.callback = f
	return noop.Registration{}, nil
}
