package interceptors_test

import (
	"strings"
	"testing"

	"github.com/afex/hystrix-go/hystrix"
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
