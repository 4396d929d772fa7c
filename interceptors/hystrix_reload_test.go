package interceptors_test

import (
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/afex/hystrix-go/hystrix"
	metriccollector "github.com/afex/hystrix-go/hystrix/metric_collector"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// A reload finds the circuit of each method again: its name says nothing of the policy.
func TestReloadFindsItsHystrixCircuits(t *testing.T) {
	const method = "/reload.R/M"
	policy := func(blocks string) string { return "server: {rules: [{methods: ['" + method + "'], " + blocks + "}]}" }
	// No policy has named the engine when this guard was made.
	g := mustGuard(t, policy("breaker: {}"))
	if err := serveOn(g, method, nil); err != nil || g.HystrixName(interceptors.Server, "", method) != "" {
		t.Fatalf("%v, named %q", err, g.HystrixName(interceptors.Server, "", method))
	}
	mustReload(t, g, policy("breaker: {engine: hystrix, request_volume_threshold: 2, sleep_window: 1h}"))
	name := g.HystrixName(interceptors.Server, "", method)
	if !strings.HasSuffix(name, ".server"+method) {
		t.Fatalf("named %q", name)
	}
	state := func(engine, want string) {
		t.Helper()
		if b := gatesOf(t, g, interceptors.Server, method).Breaker; b.Engine != engine || b.State != want {
			t.Fatalf("%+v, want %s %s", *b, engine, want)
		}
	}
	state("hystrix", "closed")
	circuit, created, err := hystrix.GetCircuit(name)
	if created || err != nil {
		t.Fatalf("created %v, %v: want the circuit of the guard", created, err)
	}
	eventually(t, "it opens", func() bool {
		_ = serveOn(g, method, status.Error(codes.Unavailable, ""))
		return circuit.IsOpen()
	})
	state("hystrix", "open")

	circuits := len(hystrix.GetCircuitSettings())
	for _, blocks := range []string{
		"breaker: {engine: hystrix, request_volume_threshold: 7, error_percent_threshold: 70, sleep_window: 30m}, timeout: 3s, concurrency_limit: {max_in_flight: 12}",
		"breaker: {engine: hystrix, request_volume_threshold: 7, error_percent_threshold: 70, sleep_window: 30m}, timeout: 3s, concurrency_limit: {max_in_flight: 12}",
	} {
		mustReload(t, g, policy(blocks))
		if got := g.HystrixName(interceptors.Server, "", method); got != name {
			t.Errorf("named %q, was %q", got, name)
		}
		state("hystrix", "open")
		if err := serveOn(g, method, nil); reasonOf(err) != interceptors.ReasonBreakerOpen {
			t.Errorf("%v, want a rejection by the breaker", err)
		}
	}
	if again, created, _ := hystrix.GetCircuit(name); created || again != circuit {
		t.Error("it is another circuit")
	}
	if s := hystrix.GetCircuitSettings()[name]; s.RequestVolumeThreshold != 7 || s.ErrorPercentThreshold != 70 || s.SleepWindow.Minutes() != 30 || s.Timeout.Seconds() != 3 {
		t.Errorf("settings %+v", *s)
	}

	// Another engine begins anew; the circuit stays as it was.
	mustReload(t, g, policy("breaker: {}"))
	state("window", "closed")
	if got := g.HystrixName(interceptors.Server, "", method); got != "" {
		t.Errorf("named %q", got)
	}
	mustReload(t, g, policy("breaker: {engine: hystrix, sleep_window: 1h}"))
	state("hystrix", "open")
	if n := len(hystrix.GetCircuitSettings()); n != circuits {
		t.Errorf("%d circuits, were %d", n, circuits)
	}
	checkIdle(t, g)
}

// unmade makes no collectors for the circuits of a method, but what it is told to.
type unmade struct {
	method string
	f      func()
}

var (
	making       atomic.Pointer[unmade]
	watchMethods = sync.OnceFunc(func() {
		metriccollector.Registry.Register(func(name string) metriccollector.MetricCollector {
			if m := making.Load(); m != nil && strings.HasSuffix(name, m.method) {
				m.f()
			}
			return new(tally)
		})
	})
)

// failing makes f run instead, until the test ends or something else is made.
func failing(t *testing.T, method string, f func()) (again func()) {
	watchMethods()
	making.Store(&unmade{method, f})
	again = func() { making.Store(nil) }
	t.Cleanup(again)
	return again
}

// A method that was refused a circuit keeps the window engine, and its state.
func TestReloadKeepsTheEngineOfWhoWasRefusedACircuit(t *testing.T) {
	const method = "/reload.R/Refused"
	policy := func(blocks string) string { return "server: {rules: [{methods: ['*'], " + blocks + "}]}" }
	const blocks = "breaker: {engine: hystrix, request_volume_threshold: 1, sleep_window: 1h}"
	again := failing(t, method, func() { panic("no collector") })
	g := mustGuard(t, policy(blocks))
	_ = serveOn(g, method, errDown)
	again()
	for _, p := range []string{blocks, blocks + ", timeout: 3s"} {
		mustReload(t, g, policy(p))
		if b := gatesOf(t, g, interceptors.Server, method).Breaker; b.Engine != "window" || b.State != "open" {
			t.Errorf("%+v, want window, open", *b)
		}
	}
	mustReload(t, g, policy("breaker: {}"))
	mustReload(t, g, policy(blocks)) // now it has changed
	if b := gatesOf(t, g, interceptors.Server, method).Breaker; b.Engine != "hystrix" || b.State != "closed" {
		t.Errorf("%+v, want hystrix, closed", *b)
	}
	checkIdle(t, g)
}

// A collector that ends the goroutine of a reload leaves the guard to others.
func TestReloadThatEndsInGoexit(t *testing.T) {
	const method = "/reload.R/Goexit"
	again := failing(t, method, runtime.Goexit)
	g := mustGuard(t, "server: {rules: [{methods: ['*'], breaker: {}}]}")
	_ = serveOn(g, method, nil)
	var reloads sync.WaitGroup
	reloads.Go(func() { _ = reload(g, "server: {rules: [{methods: ['*'], breaker: {engine: hystrix}}]}") })
	reloads.Wait()
	again()
	mustReload(t, g, "server: {rules: [{methods: ['*'], breaker: {engine: hystrix}}]}")
	if b := gatesOf(t, g, interceptors.Server, method).Breaker; b.Engine != "hystrix" {
		t.Errorf("%+v", *b)
	}
	checkIdle(t, g)
}

// printer is a logger of hystrix-go's.
type printer func()

func (p printer) Printf(string, ...any) { p() }

// A reload does not wait for hystrix-go's logger, which may make a first call of another
// method, and so wait for the reload.
func hystrixLoggerWaits(t *testing.T) {
	const policy = "server: {rules: [{methods: ['*'], breaker: {engine: hystrix, request_volume_threshold: 1}, timeout: 1h}]}"
	g := mustGuard(t, policy)
	logging, reloaded := make(chan struct{}), make(chan struct{})
	hystrix.SetLogger(printer(sync.OnceFunc(func() {
		close(logging)
		<-reloaded
		_ = serveOn(g, "/reload.R/Log", nil)
	})))
	go func() {
		<-logging
		mustReload(t, g, strings.ReplaceAll(policy, "1h", "2h"))
		close(reloaded)
	}()
	eventually(t, "it opens", func() bool {
		_ = serveOn(g, "/reload.R/Logged", errDown)
		return gatesOf(t, g, interceptors.Server, "/reload.R/Logged").Breaker.State == "open"
	})
	<-reloaded
	checkIdle(t, g)
}
