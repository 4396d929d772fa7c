package interceptors_test

import (
	"context"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/afex/hystrix-go/hystrix"
	"google.golang.org/grpc/codes"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

func TestHystrixCircuitOfOthersIsOurs(t *testing.T) {
	t.Parallel()
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		r := newRig(t, a, touchyHystrix, script())
		r.fresh()
		if b := r.snapshot().Breaker; b.Engine != "hystrix" {
			t.Fatalf("the engine is %s", b.Engine)
		}
		c := r.circuit()
		for range 3 {
			if c.IsOpen() || !c.AllowRequest() {
				t.Fatal("open, and calls pass")
			}
			r.trip()
			r.mustNot()
			if !c.IsOpen() || c.AllowRequest() {
				t.Fatal("closed, and calls are rejected")
			}
			r.heal()
			r.must("")
		}
		if again := r.circuit(); again != c {
			t.Error("there is another circuit of this name")
		}

		// What others do to it is heeded.
		r.fail(1)
		for range 3 {
			if err := c.ReportEvent([]string{"failure"}, time.Now(), 0); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "the failures of others open it", func() bool { return r.state() == "open" })
		r.mustNot()
		if err := c.ReportEvent([]string{"success"}, time.Now(), 0); err != nil {
			t.Fatal(err)
		}
		r.is("closed")
		r.must("")
		r.fresh() // and none the worse for it
		r.must("")
		r.heard(words{success: 1})
		r.ended(ended{success: 1})
	})
}

// Others may be granted the probe of a sleep window.
func TestHystrixProbeOfOthers(t *testing.T) {
	t.Parallel()
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		r := newRig(t, a, touchyHystrix, script())
		r.fresh()
		r.trip()
		r.wake()
		eventually(t, "a probe is let through", r.circuit().AllowRequest)
		r.doze()
		r.mustNot()
		r.is("open")
		if after := r.snapshot().Breaker.RetryAfter; after <= 0 {
			t.Errorf("RetryAfter is %v", after)
		}
		r.heal()
		r.ended(ended{success: 1, failure: 3})
	})
}

func TestHystrixCollectorHearsEveryCall(t *testing.T) {
	t.Parallel()
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		r := newRig(t, a, touchyHystrix, script())
		r.fresh()
		for range 9 {
			r.must("")
		}
		short, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		want := words{success: 9}
		for _, c := range []struct {
			ctx  context.Context
			text string
			code codes.Code
			word words
		}{
			{t.Context(), "NOT_FOUND", codes.NotFound, words{success: 1}},
			{t.Context(), "UNAVAILABLE", codes.Unavailable, words{failure: 1}},
			{t.Context(), "DEADLINE_EXCEEDED", codes.DeadlineExceeded, words{timeout: 1}},
			{short, "DEADLINE_EXCEEDED", codes.DeadlineExceeded, words{expired: 1}},
			{t.Context(), "RESOURCE_EXHAUSTED", codes.ResourceExhausted, words{none: 1}},
			{short, "UNAVAILABLE", codes.Unavailable, words{failure: 1}},
		} {
			r.ends(r.begin(c.ctx, c.text), c.code)
			want = want.plus(c.word, 1)
			r.heard(want)
		}
		ctx, cancel := context.WithCancel(t.Context())
		running := r.begin(ctx, "hang")
		began := time.Now()
		eventually(t, "some time goes by", func() bool { return time.Since(began) > 20*time.Millisecond })
		cancel()
		r.ends(running, codes.Canceled)
		want.cancelled++
		r.heard(want)
		if d := r.told().longest; d < 20*time.Millisecond || d > hystrixPatience {
			t.Errorf("the longest call took %v", d)
		}
		r.is("closed")
		eventually(t, "the guard has heard of all", func() bool {
			b := r.snapshot().Breaker
			return int(b.Requests) == 1+want.sum() && int(b.Failures) == want.failure+want.timeout
		})
		more := 14 - want.failure - want.timeout
		r.fail(more - 1)
		r.is("closed")
		r.fail(1)
		r.is("open")
		if want.failure += more; want.sum() != 27 {
			t.Errorf("it opens at 14 errors of %d and the success before, want at half: 14 of 28", want.sum())
		}
		for range 5 {
			r.mustNot()
		}
		r.heard(want)
		r.heal()
		r.heard(words{success: 1})
	})
}

// The settings are those of the policy, before the first call even.
func TestHystrixSettingsAreThePolicys(t *testing.T) {
	t.Parallel()
	g := useGuard(t, "client", "timeout: 1500ms, breaker: {engine: hystrix, request_volume_threshold: 7, error_percent_threshold: 33, sleep_window: 1234ms}, concurrency_limit: {max_in_flight: 17}")
	cc := channel(t, "passthrough:///settings")
	if err := callOn(g.Guard, cc, rpctest.Unary, nil); err != nil {
		t.Fatal(err)
	}
	name := g.HystrixName(interceptors.Client, cc.CanonicalTarget(), rpctest.Unary)
	got, want := hystrix.GetCircuitSettings()[name], hystrix.Settings{Timeout: 1500 * time.Millisecond, MaxConcurrentRequests: 17, RequestVolumeThreshold: 7, SleepWindow: 1234 * time.Millisecond, ErrorPercentThreshold: 33}
	if got == nil || *got != want {
		t.Errorf("%s: %+v, want %+v", name, got, want)
	}
}

// The sleep window is the policy's. A little too late is never too late.
func TestHystrixSleepWindowIsWaitedFor(t *testing.T) {
	t.Parallel()
	const sleep = 50 * time.Millisecond
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		r := newRig(t, a, "breaker: {engine: hystrix, request_volume_threshold: 1, sleep_window: 50ms, min_deadline: 0s}, concurrency_limit: {max_in_flight: 1, max_streams: 1}", script())
		_ = r.do(t.Context(), "") // there is one
		r.fresh()
		r.sleep(sleep)
		began := time.Now()
		r.trip()
		eventually(t, "a probe closes it", func() bool {
			err := r.do(t.Context(), "")
			if after := retryInfo(err); err != nil && (after <= 0 || after > sleep) {
				t.Fatalf("%v: a retry has a chance in %v", err, after)
			}
			return err == nil
		})
		if d := time.Since(began); d < sleep {
			t.Errorf("it was let through after %v, the sleep window is %v", d, sleep)
		}
		r.closed()
		r.heard(words{success: 1})
		r.ended(ended{success: 1, failure: 1})
	})
}

func TestHystrixGuardsDoNotShareCircuits(t *testing.T) {
	t.Parallel()
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		one := newRig(t, a, touchyHystrix+" # one", script())
		other := newRig(t, a, touchyHystrix+" # other", script())
		if one.name == other.name {
			t.Fatalf("both have %s", one.name)
		}
		one.fresh()
		other.fresh()
		for range 2 {
			one.trip()
			one.mustNot()
			other.must("")
			other.is("closed")
			if other.circuit().IsOpen() {
				t.Error("the other circuit is open")
			}
			one.heal()
			one, other = other, one
		}
	})
}

func TestHystrixTargetsDoNotShareCircuits(t *testing.T) {
	t.Parallel()
	g := useGuard(t, "client", touchyHystrix+" # targets")
	a, b, same := channel(t, "passthrough:///a"), channel(t, "passthrough:///b"), channel(t, "passthrough:a")
	name := g.HystrixName(interceptors.Client, a.CanonicalTarget(), rpctest.Unary)
	open := func() bool { c, _, _ := hystrix.GetCircuit(name); return c.IsOpen() }
	eventually(t, "a opens", func() bool { _ = callOn(g.Guard, a, rpctest.Unary, errDown); return open() })
	if err := callOn(g.Guard, same, rpctest.Unary, nil); reasonOf(err) != interceptors.ReasonBreakerOpen {
		t.Errorf("%v; another spelling is the same target", err)
	}
	for range 20 {
		if err := callOn(g.Guard, b, rpctest.Unary, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := callOn(g.Guard, a, rpctest.Other, nil); err != nil {
		t.Errorf("another method: %v", err)
	}
	// Closed, for the next round.
	s := hystrix.GetCircuitSettings()[name]
	hystrix.ConfigureCommand(name, hystrix.CommandConfig{RequestVolumeThreshold: int(s.RequestVolumeThreshold), ErrorPercentThreshold: s.ErrorPercentThreshold, SleepWindow: 1})
	eventually(t, "a closes", func() bool { _ = callOn(g.Guard, a, rpctest.Unary, nil); return !open() })
}

func TestHystrixName(t *testing.T) {
	t.Parallel()
	const policy = `{rules: [
		{methods: ['*'], breaker: {engine: hystrix}},
		{methods: ['/a.A/*'], breaker: {}},
		{methods: ['/a.A/Off'], breaker: {disabled: true}},
		{methods: ['/a.A/On'], breaker: {engine: HYSTRIX}}]}`
	g := mustGuard(t, "{client: "+policy+", server: "+policy+"}")
	for _, c := range []struct {
		side           interceptors.Side
		target, method string
		want           string // without the guard's number
	}{
		{interceptors.Client, "dns:///shop:443", "/b.B/M", "client/dns:///shop:443/b.B/M"},
		{interceptors.Server, "dns:///shop:443", "/b.B/M", "server/b.B/M"},
		{interceptors.Server, "", "/a.A/On", "server/a.A/On"},
		{interceptors.Client, "dns:///shop:443", "/a.A/M", ""},
		{interceptors.Client, "dns:///shop:443", "/a.A/Off", ""},
		{interceptors.Server, "", "/grpc.health.v1.Health/Check", ""},
		{interceptors.Server, "", "", "server"},
	} {
		got := g.HystrixName(c.side, c.target, c.method)
		if prefix, rest, _ := strings.Cut(got, "."); rest != c.want || got != "" && !strings.HasPrefix(prefix, "grpc") {
			t.Errorf("HystrixName(%v, %q, %q) = %q, want grpc?.%s", c.side, c.target, c.method, got, c.want)
		}
	}
	without := mustGuard(t, "{client: {rules: [{methods: ['*'], breaker: {}}]}}")
	if got := without.HystrixName(interceptors.Client, "dns:///shop:443", "/b.B/M"); got != "" {
		t.Errorf("%q without the engine", got)
	}
	if got := (*interceptors.Guard)(nil).HystrixName(interceptors.Client, "", "/b.B/M"); got != "" {
		t.Errorf("%q of no guard", got)
	}
}

// goroutines returns the first lines of all goroutines by their numbers, and how
// many are hystrix-go's own: two a circuit.
func goroutines() (others map[string]string, monitors int) {
	buf := make([]byte, 1<<20)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	others = map[string]string{}
	for stack := range strings.SplitSeq(string(buf), "\n\n") {
		if strings.Contains(stack, "hystrix.(*metricExchange).Monitor(") || strings.Contains(stack, "hystrix.(*poolMetrics).Monitor(") {
			monitors++
			continue
		}
		number, _, _ := strings.Cut(strings.TrimPrefix(stack, "goroutine "), " ")
		others[number] = stack
	}
	return others, monitors
}

// Not parallel: it counts all goroutines.
func TestHystrixLeavesTwoGoroutinesACircuit(t *testing.T) {
	before, monitors := goroutines()
	t.Run("calls", func(t *testing.T) {
		onHystrixArms(t, arms, func(t *testing.T, a arm) {
			r := useRig(t, a, touchyHystrix+" # goroutines")
			if _, old := tallies.Load(r.name); !old {
				monitors += 2
			}
			r.conn = rpctest.Start(t, script(), r.serverOptions(), r.dialOptions())
			r.fresh()
			for range 20 {
				r.must("")
			}
			ctx, cancel := context.WithCancel(t.Context())
			running := r.begin(ctx, "hang")
			cancel()
			r.ends(running, codes.Canceled)
			r.ended(ended{success: 20, neutral: 1})
		})
	})
	var left []string
	eventually(t, "nothing else is left", func() bool {
		left = nil
		after, n := goroutines()
		for number, stack := range after {
			if before[number] == "" {
				left = append(left, stack)
			}
		}
		if n != monitors {
			t.Fatalf("%d goroutines of hystrix-go, want %d", n, monitors)
		}
		return len(left) == 0
	})
}
