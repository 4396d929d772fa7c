package conformance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	otelprom "go.opentelemetry.io/otel/exporters/prometheus"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

func mustGuard(t testing.TB, yaml string, opts ...interceptors.Option) *interceptors.Guard {
	t.Helper()
	p, err := interceptors.Parse("policy.yaml", []byte(yaml))
	if err != nil {
		t.Fatal(err)
	}
	g, err := interceptors.New(p, append(opts, interceptors.WithLogger(slog.New(slog.DiscardHandler)))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = g.Close() })
	return g
}

// scraper is what a Prometheus server sees of a guard.
type scraper struct {
	t    *testing.T
	url  string
	last samples
}

// samples are values by what stands before them in the text, such as
// `name{label="value"}`.
type samples map[string]float64

func newScraper(t *testing.T) (*scraper, interceptors.Option) {
	t.Helper()
	s, provider := newProvider(t)
	return s, interceptors.WithMeterProvider(provider)
}

// newProvider serves an exporter's text on 127.0.0.1.
func newProvider(t *testing.T) (*scraper, *sdkmetric.MeterProvider) {
	t.Helper()
	registry := prometheus.NewRegistry()
	exporter, err := otelprom.New(otelprom.WithRegisterer(registry), otelprom.WithoutScopeInfo(), otelprom.WithoutTargetInfo())
	if err != nil {
		t.Fatal(err)
	}
	provider := sdkmetric.NewMeterProvider(sdkmetric.WithReader(exporter))
	srv := httptest.NewServer(promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	t.Cleanup(func() {
		srv.Close()
		if err := provider.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return &scraper{t: t, url: srv.URL}, provider
}

func (s *scraper) text() string {
	s.t.Helper()
	resp, err := http.Get(s.url)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		s.t.Fatalf("scrape: %s, %v\n%s", resp.Status, err, text)
	}
	http.DefaultClient.CloseIdleConnections()
	return string(text)
}

// scrape reads all samples, and checks that no counter has gone back since the
// last time.
func (s *scraper) scrape() samples {
	s.t.Helper()
	got := samples{}
	for line := range strings.Lines(s.text()) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		at := strings.LastIndex(line, " ")
		v, err := strconv.ParseFloat(strings.TrimSpace(line[at:]), 64)
		if err != nil {
			s.t.Fatalf("%v in %q", err, line)
		}
		got[line[:at]] = v
	}
	for name, before := range s.last {
		metric, _, _ := strings.Cut(name, "{")
		counter := strings.HasSuffix(metric, "_total") || strings.HasSuffix(metric, "_bucket") || strings.HasSuffix(metric, "_count")
		if now, ok := got[name]; counter && (!ok || now < before) {
			s.t.Errorf("%s went from %v to %v (there: %v)", name, before, now, ok)
		}
	}
	s.last = got
	return got
}

// The labels of one method on each side.
func client(method string, more ...string) string {
	return labels(append(more, "resilience_target", "passthrough:///test", "rpc_method", method, "rpc_system_name", "grpc", "side", "client"))
}

func server(method string, more ...string) string {
	return labels(append(more, "rpc_method", method, "rpc_system_name", "grpc", "side", "server"))
}

// labels writes pairs as the exporter does, sorted by name.
func labels(pairs []string) string {
	var all []string
	for p := range slices.Chunk(pairs, 2) {
		all = append(all, fmt.Sprintf("%s=%q", p[0], p[1]))
	}
	slices.Sort(all)
	return "{" + strings.Join(all, ",") + "}"
}

// expect checks samples; series that must be absent are in want with -1.
func (got samples) expect(t *testing.T, want samples) {
	t.Helper()
	for name, v := range want {
		if g, ok := got[name]; v < 0 && ok || v >= 0 && (!ok || g != v) {
			t.Errorf("%s is %v (there: %v), want %v", name, g, ok, v)
		}
	}
	if t.Failed() {
		for _, name := range slices.Sorted(func(yield func(string) bool) {
			for name := range got {
				if !yield(name) {
					return
				}
			}
		}) {
			t.Logf("%s %v", name, got[name])
		}
		t.FailNow()
	}
}

const (
	unary = "test.v1.Test/Unary"
	other = "test.v1.Test/Other"
)

// observed is a guarded server and client, and the calls that its handlers hold.
type observed struct {
	*scraper
	guard *interceptors.Guard
	srv   *grpc.Server
	conn  *grpc.ClientConn

	began chan struct{} // one for each call that is held
	open  chan struct{} // one ends a call that is held
}

func newObserved(t *testing.T, policy string) *observed {
	t.Helper()
	s, option := newScraper(t)
	o := &observed{scraper: s, guard: mustGuard(t, policy, option), began: make(chan struct{}), open: make(chan struct{})}
	service := &rpctest.Service{Unary: func(ctx context.Context, req *rpctest.Message) (*rpctest.Message, error) {
		switch req.GetValue() {
		case "fail":
			return nil, status.Error(codes.Unavailable, "asked to")
		case "panic":
			panic("asked to")
		case "hold":
			o.began <- struct{}{}
			select {
			case <-o.open:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		return req, nil
	}}
	o.srv = rpctest.NewServer(service, o.guard.ServerOptions()...)
	lis := rpctest.Listen()
	go func() { _ = o.srv.Serve(lis) }()
	t.Cleanup(o.srv.Stop)
	o.conn = rpctest.Dial(t, lis, o.guard.DialOptions()...)
	return o
}

func (o *observed) call(method, text string) error {
	_, err := rpctest.Call(o.t.Context(), o.conn, method, text)
	return err
}

// hold makes a call that its handler holds when hold returns.
func (o *observed) hold(method string) <-chan error {
	done := make(chan error, 1)
	go func() { done <- o.call(method, "hold") }()
	<-o.began
	return done
}

// until waits until a sample has a value.
func (s *scraper) until(name string, want float64) samples {
	s.t.Helper()
	for patience := time.Now().Add(10 * time.Second); ; {
		got := s.scrape()
		if got[name] == want {
			return got
		}
		if time.Now().After(patience) {
			got.expect(s.t, samples{name: want})
		}
	}
}

func TestMetricsOfABreaker(t *testing.T) {
	o := newObserved(t, "client: {rules: [{methods: ['*'], breaker: {request_volume_threshold: 4, sleep_window: 1s}}]}")
	for _, text := range []string{"fine", "fine", "fail", "fail"} {
		_ = o.call(rpctest.Unary, text)
	}
	var rejected *interceptors.RejectedError
	if err := o.call(rpctest.Unary, "fine"); !errors.As(err, &rejected) {
		t.Fatalf("the breaker is not open: %v", err)
	}
	const state, calls, changes, decisions = "resilience_breaker_state", "resilience_breaker_calls_total", "resilience_breaker_transitions_total", "resilience_decisions_total"
	opened := changes + client(unary, "from", "closed", "to", "open", "cause", "error_percent")
	halfOpened := changes + client(unary, "from", "open", "to", "half_open", "cause", "sleep_window")
	o.scrape().expect(t, samples{
		decisions + client(unary, "kind", "all", "outcome", "admitted"):                               4,
		decisions + client(unary, "kind", "breaker", "outcome", "rejected", "reason", "BREAKER_OPEN"): 1,
		state + client(unary, "state", "closed"):                                                      0,
		state + client(unary, "state", "open"):                                                        1,
		state + client(unary, "state", "half_open"):                                                   0,
		calls + client(unary, "result", "success"):                                                    2,
		calls + client(unary, "result", "failure"):                                                    2,
		calls + client(unary, "result", "neutral"):                                                    0,
		calls + client(unary, "result", "dropped"):                                                    0,
		opened:     1,
		halfOpened: 0,
		changes + client(unary, "from", "closed", "to", "open", "cause", "slow_calls"):         0,
		changes + client(unary, "from", "half_open", "to", "closed", "cause", "probe_success"): 0,
		changes + client(unary, "from", "half_open", "to", "open", "cause", "probe_failure"):   0,
	})

	<-time.After(rejected.RetryAfter)
	probe := o.hold(rpctest.Unary)
	o.scrape().expect(t, samples{
		state + client(unary, "state", "open"):      0,
		state + client(unary, "state", "half_open"): 1,
		halfOpened: 1,
	})
	o.open <- struct{}{}
	if err := <-probe; err != nil {
		t.Fatal(err)
	}
	o.scrape().expect(t, samples{
		state + client(unary, "state", "closed"):                                               1,
		state + client(unary, "state", "half_open"):                                            0,
		calls + client(unary, "result", "success"):                                             3,
		changes + client(unary, "from", "half_open", "to", "closed", "cause", "probe_success"): 1,
		decisions + client(unary, "kind", "all", "outcome", "admitted"):                        5,
	})
}

// What never happened to a method has no series, but for the first opening: its
// increase from nothing would be no increase.
func TestMetricsOfAHealthyMethodAreFew(t *testing.T) {
	o := newObserved(t, `
client:
  rules:
    - {methods: ['*'], breaker: {slow_call_threshold: 1h}, concurrency_limit: {max_in_flight: 1}}
    - {methods: ['/test.v1.Test/Other'], breaker: {}, concurrency_limit: {max_in_flight: 1, max_queue: 1}}`)
	for _, method := range []string{rpctest.Unary, rpctest.Other} {
		if err := o.call(method, "fine"); err != nil {
			t.Fatal(err)
		}
	}
	const calls, changes, queued = "resilience_breaker_calls_total", "resilience_breaker_transitions_total", "resilience_concurrency_queued"
	want := samples{
		changes + client(unary, "from", "closed", "to", "open", "cause", "slow_calls"): 0,
		changes + client(other, "from", "closed", "to", "open", "cause", "slow_calls"): -1,
		queued + client(unary): -1,
		queued + client(other): 0,
	}
	for _, method := range []string{unary, other} {
		want[calls+client(method, "result", "success")] = 1
		for _, result := range []string{"failure", "neutral", "dropped"} {
			want[calls+client(method, "result", result)] = -1
		}
		want[changes+client(method, "from", "closed", "to", "open", "cause", "error_percent")] = 0
		want[changes+client(method, "from", "open", "to", "half_open", "cause", "sleep_window")] = -1
		want[changes+client(method, "from", "half_open", "to", "closed", "cause", "probe_success")] = -1
		want[changes+client(method, "from", "half_open", "to", "open", "cause", "probe_failure")] = -1
		for state, is := range map[string]float64{"closed": 1, "open": 0, "half_open": 0} {
			want["resilience_breaker_state"+client(method, "state", state)] = is
		}
	}
	o.scrape().expect(t, want)

	_ = o.call(rpctest.Unary, "fail")
	o.scrape().expect(t, samples{
		calls + client(unary, "result", "failure"): 1,
		calls + client(unary, "result", "neutral"): -1,
	})
}

func TestMetricsOfLimitsAndQueues(t *testing.T) {
	o := newObserved(t, `
client: {rules: [{methods: ['/test.v1.Test/Other'], rate_limit: {requests_per_second: 0.001, burst: 2}}]}
server: {rules: [{methods: ['*'], minimum_budget: 1ms, concurrency_limit: {max_in_flight: 1, max_queue: 1}}]}`)
	const decisions, limit, inflight, queued, available = "resilience_decisions_total", "resilience_concurrency_limit", "resilience_concurrency_inflight", "resilience_concurrency_queued", "resilience_rate_available"
	const waits = "resilience_wait_duration_seconds_count"
	waited := waits + server(unary, "kind", "concurrency_limit")

	held := o.hold(rpctest.Unary)
	o.scrape().expect(t, samples{limit + server(unary): 1, inflight + server(unary): 1, queued + server(unary): 0, waited: -1})
	second := make(chan error, 1)
	go func() { second <- o.call(rpctest.Unary, "fine") }()
	o.until(queued+server(unary), 1)
	if err := o.call(rpctest.Unary, "fine"); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a third call: %v", err)
	}
	o.open <- struct{}{}
	for _, c := range []<-chan error{held, second} {
		if err := <-c; err != nil {
			t.Error(err)
		}
	}
	got := o.until(inflight+server(unary), 0)
	got.expect(t, samples{
		queued + server(unary): 0,
		waited:                 1,
		decisions + server(unary, "kind", "all", "outcome", "admitted"):                                                2,
		decisions + server(unary, "kind", "concurrency_limit", "outcome", "rejected", "reason", "CONCURRENCY_LIMITED"): 1,
	})
	if sum := got["resilience_wait_duration_seconds_sum"+server(unary, "kind", "concurrency_limit")]; sum <= 0 || sum > 10 {
		t.Errorf("calls waited for %v seconds", sum)
	}
	if _, ok := got["resilience_wait_duration_seconds_bucket"+strings.TrimSuffix(server(unary, "kind", "concurrency_limit"), "}")+`,le="0.025"}`]; !ok {
		t.Error("the buckets are not made for waits of milliseconds")
	}

	for range 5 {
		_ = o.call(rpctest.Other, "fine")
	}
	got = o.scrape()
	got.expect(t, samples{
		decisions + client(other, "kind", "all", "outcome", "admitted"):                                  2,
		decisions + client(other, "kind", "rate_limit", "outcome", "rejected", "reason", "RATE_LIMITED"): 3,
	})
	if left, ok := got[available+client(other)]; !ok || left < 0 || left >= 1 {
		t.Errorf("%v tokens are left", left)
	}
}

func TestMetricsOfPanicsAndDrains(t *testing.T) {
	o := newObserved(t, "server: {drain: {announce: 1m, grace: 1m}}")
	of := labels([]string{"rpc_system_name", "grpc", "side", "server"})
	const inflight, aborted, drains = "resilience_drain_inflight", "resilience_drain_aborted_total", "resilience_drain_duration_seconds_count"
	held := o.hold(rpctest.Unary)
	o.scrape().expect(t, samples{"resilience_panics_total" + of: 0, inflight + of: 0, drains + of: -1})
	for range 3 {
		if err := o.call(rpctest.Unary, "panic"); status.Code(err) != codes.Internal {
			t.Error(err)
		}
	}

	ctx, cut := context.WithCancel(t.Context())
	defer cut()
	drained := make(chan error, 1)
	go func() { drained <- o.guard.Shutdown(ctx, o.srv) }()
	o.until(inflight+of, 1).expect(t, samples{"resilience_panics_total" + of: 3})
	cut()
	if err := <-drained; err == nil {
		t.Error("nothing was cut")
	}
	<-held
	o.scrape().expect(t, samples{inflight + of: 0, aborted + of: 1, drains + of: 1})
}

func TestMetricsOfReloads(t *testing.T) {
	o := newObserved(t, "client: {rules: [{methods: ['*'], breaker: {}, concurrency_limit: {max_in_flight: 3}}]}")
	of := func(result string) string {
		return "resilience_config_reloads_total" + labels([]string{"rpc_system_name", "grpc", "result", result})
	}
	o.scrape().expect(t, samples{of("applied"): 0, of("rejected"): 0})
	if err := o.call(rpctest.Unary, "fine"); err != nil {
		t.Fatal(err)
	}
	p, err := interceptors.Parse("policy.yaml", []byte("client: {rules: [{methods: ['*'], concurrency_limit: {max_in_flight: 5}}]}"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(o.guard.Reload(p), o.guard.Reload(p)); err != nil {
		t.Fatal(err)
	}
	if err := o.guard.Reload(nil); err == nil {
		t.Error("no error")
	}
	o.scrape().expect(t, samples{
		of("applied"): 2, of("rejected"): 1,
		"resilience_concurrency_limit" + client(unary):                                     5,
		"resilience_decisions_total" + client(unary, "kind", "all", "outcome", "admitted"): 1,
		"resilience_breaker_state" + client(unary, "state", "closed"):                      -1,
	})
}

// The names, the kinds and the labels of everything that there is.
func TestMetricsAreTheOnesThatAreDocumented(t *testing.T) {
	o := newObserved(t, `
client: {rules: [{methods: ['*'], breaker: {}, rate_limit: {requests_per_second: 1000}, concurrency_limit: {max_in_flight: 1, max_queue: 1}}]}
server: {drain: {announce: 1m, grace: 1m}, rules: [{methods: ['*'], minimum_budget: 1h}]}`)
	held := o.hold(rpctest.Unary)
	queued := make(chan error, 1)
	go func() { queued <- o.call(rpctest.Unary, "fine") }()
	o.until("resilience_concurrency_queued"+client(unary), 1)
	_ = o.call(rpctest.Unary, "refused")

	ctx, cut := context.WithCancel(t.Context())
	drained := make(chan error, 1)
	go func() { drained <- o.guard.Shutdown(ctx, o.srv) }()
	o.open <- struct{}{}
	for _, c := range []<-chan error{held, queued} {
		if err := <-c; err != nil {
			t.Error(err)
		}
	}
	last := o.hold(rpctest.Unary)
	cut()
	if err := <-drained; err == nil {
		t.Error("nothing was cut")
	}
	<-last

	const method = "resilience_target rpc_method rpc_system_name side"
	want := map[string]string{
		"resilience_decisions_total counter":           "kind outcome reason " + method,
		"resilience_breaker_state gauge":               method + " state",
		"resilience_breaker_transitions_total counter": "cause from " + method + " to",
		"resilience_breaker_calls_total counter":       "resilience_target result rpc_method rpc_system_name side",
		"resilience_concurrency_limit gauge":           method,
		"resilience_concurrency_inflight gauge":        method,
		"resilience_concurrency_queued gauge":          method,
		"resilience_rate_available gauge":              method,
		"resilience_wait_duration_seconds histogram":   "kind " + method,
		"resilience_panics_total counter":              "rpc_system_name side",
		"resilience_config_reloads_total counter":      "result rpc_system_name",
		"resilience_drain_inflight gauge":              "rpc_system_name side",
		"resilience_drain_duration_seconds histogram":  "rpc_system_name side",
		"resilience_drain_aborted_total counter":       "rpc_system_name side",
	}
	for name, want := range want {
		if got, ok := families(o.text())[name]; !ok || got != want {
			t.Errorf("%s (there: %v) has the labels %q, want %q", name, ok, got, want)
		}
	}
	for name := range families(o.text()) {
		if _, ok := want[name]; !ok {
			t.Errorf("%s is not documented", name)
		}
	}

	// What the guard observes is gone with it; what the provider has recorded
	// belongs to the provider.
	if err := o.guard.Close(); err != nil {
		t.Fatal(err)
	}
	var left []string
	for name := range families(o.text()) {
		left = append(left, name)
	}
	slices.Sort(left)
	if want := []string{"resilience_drain_aborted_total counter", "resilience_drain_duration_seconds histogram", "resilience_wait_duration_seconds histogram"}; !slices.Equal(left, want) {
		t.Errorf("after Close there are %v, want %v", left, want)
	}
}

// families are "name type" of all metrics in a text, with the names of all
// labels that their series have.
func families(text string) map[string]string {
	found, kind := map[string]map[string]bool{}, ""
	for line := range strings.Lines(text) {
		if typ, ok := strings.CutPrefix(line, "# TYPE "); ok {
			kind = strings.TrimSpace(typ)
			found[kind] = map[string]bool{}
		}
		_, pairs, ok := strings.Cut(line, "{")
		if !ok || strings.HasPrefix(line, "#") {
			continue
		}
		for pair := range strings.SplitSeq(pairs[:strings.LastIndex(pairs, "}")], ",") {
			if name, _, _ := strings.Cut(pair, "="); name != "le" {
				found[kind][name] = true
			}
		}
	}
	names := map[string]string{}
	for kind, labels := range found {
		var all []string
		for l := range labels {
			all = append(all, l)
		}
		slices.Sort(all)
		names[kind] = strings.Join(all, " ")
	}
	return names
}
