package interceptors_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// hystrixEvent is one event of the stream.
type hystrixEvent map[string]any

func (e hystrixEvent) number(key string) int {
	n, ok := e[key].(float64)
	if !ok || n != float64(int(n)) {
		panic(fmt.Sprintf("%s is %v, no whole number", key, e[key]))
	}
	return int(n)
}

// numbers returns the values of some keys, for comparisons.
func (e hystrixEvent) numbers(keys ...string) []int {
	var all []int
	for _, key := range keys {
		all = append(all, e.number(key))
	}
	return all
}

// latency returns the nine percentiles of a key.
func (e hystrixEvent) latency(key string) []int {
	return hystrixEvent(e[key].(map[string]any)).numbers("0", "25", "50", "75", "90", "95", "99", "99.5", "100")
}

// parseHystrix reads a stream to its end.
func parseHystrix(t testing.TB, stream string) []hystrixEvent {
	t.Helper()
	var all []hystrixEvent
	for _, block := range strings.SplitAfter(stream, "\n\n") {
		if block == "" || block == ":\n\n" {
			continue
		}
		text, ok := strings.CutPrefix(block, "data: ")
		if text = strings.TrimSuffix(text, "\n\n"); !ok || strings.ContainsAny(text, "\n\r") {
			t.Fatalf("not an event: %q", block)
		}
		var e hystrixEvent
		if err := json.Unmarshal([]byte(text), &e); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		all = append(all, e)
	}
	return all
}

// look reads one set of events. It asks for HystrixStream, so it turns recording on.
func look(t testing.TB, g *interceptors.Guard) []hystrixEvent {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // the first set is written all the same
	w := httptest.NewRecorder()
	g.HystrixStream().ServeHTTP(w, httptest.NewRequestWithContext(ctx, "GET", "/hystrix.stream", nil))
	if w.Code != http.StatusOK || !w.Flushed {
		t.Fatalf("status %d, flushed %v: %s", w.Code, w.Flushed, w.Body)
	}
	return parseHystrix(t, w.Body.String())
}

// only returns the event of a type and name.
func only(t testing.TB, all []hystrixEvent, kind, name string) hystrixEvent {
	t.Helper()
	var found []hystrixEvent
	for _, e := range all {
		if e["type"] == kind && e["name"] == name {
			found = append(found, e)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d %s events of %q in %v", len(found), kind, name, names(all))
	}
	return found[0]
}

func names(all []hystrixEvent) (names []string) {
	for _, e := range all {
		names = append(names, fmt.Sprint(e["type"], " ", e["name"]))
	}
	return names
}

const (
	aNumber     = "number"
	aString     = "string"
	aBoolean    = "boolean"
	percentiles = "percentiles"
)

// What the dashboard and Turbine read, by type of event. The first throws an event
// away that lacks a key, or the value of one is null.
var hystrixKeys = map[string]map[string]string{
	"HystrixCommand": {
		"type": aString, "name": aString, "group": aString, "threadPool": aString,
		"currentTime": aNumber, "reportingHosts": aNumber,
		"requestCount": aNumber, "errorCount": aNumber, "errorPercentage": aNumber, "isCircuitBreakerOpen": aBoolean,
		"rollingCountSuccess": aNumber, "rollingCountFailure": aNumber, "rollingCountTimeout": aNumber,
		"rollingCountShortCircuited": aNumber, "rollingCountBadRequests": aNumber, "rollingCountExceptionsThrown": aNumber,
		"rollingCountSemaphoreRejected": aNumber, "rollingCountThreadPoolRejected": aNumber,
		"rollingCountFallbackSuccess": aNumber, "rollingCountFallbackFailure": aNumber,
		"rollingCountFallbackRejection": aNumber, "rollingCountFallbackMissing": aNumber,
		"rollingCountEmit": aNumber, "rollingCountFallbackEmit": aNumber,
		"rollingCountCollapsedRequests": aNumber, "rollingCountResponsesFromCache": aNumber,
		"currentConcurrentExecutionCount": aNumber, "rollingMaxConcurrentExecutionCount": aNumber,
		"latencyExecute": percentiles, "latencyExecute_mean": aNumber, "latencyTotal": percentiles, "latencyTotal_mean": aNumber,
		"propertyValue_circuitBreakerEnabled":                            aBoolean,
		"propertyValue_circuitBreakerErrorThresholdPercentage":           aNumber,
		"propertyValue_circuitBreakerForceClosed":                        aBoolean,
		"propertyValue_circuitBreakerForceOpen":                          aBoolean,
		"propertyValue_circuitBreakerRequestVolumeThreshold":             aNumber,
		"propertyValue_circuitBreakerSleepWindowInMilliseconds":          aNumber,
		"propertyValue_executionIsolationSemaphoreMaxConcurrentRequests": aNumber,
		"propertyValue_executionIsolationStrategy":                       aString,
		"propertyValue_executionIsolationThreadInterruptOnTimeout":       aBoolean,
		"propertyValue_executionIsolationThreadPoolKeyOverride":          aString,
		"propertyValue_executionIsolationThreadTimeoutInMilliseconds":    aNumber,
		"propertyValue_executionTimeoutInMilliseconds":                   aNumber,
		"propertyValue_fallbackIsolationSemaphoreMaxConcurrentRequests":  aNumber,
		"propertyValue_metricsRollingStatisticalWindowInMilliseconds":    aNumber,
		"propertyValue_requestCacheEnabled":                              aBoolean,
		"propertyValue_requestLogEnabled":                                aBoolean,
	},
	"HystrixThreadPool": {
		"type": aString, "name": aString, "currentTime": aNumber, "reportingHosts": aNumber,
		"currentActiveCount": aNumber, "currentQueueSize": aNumber, "currentTaskCount": aNumber, "currentCompletedTaskCount": aNumber,
		"currentPoolSize": aNumber, "currentCorePoolSize": aNumber, "currentLargestPoolSize": aNumber, "currentMaximumPoolSize": aNumber,
		"rollingCountThreadsExecuted": aNumber, "rollingMaxActiveThreads": aNumber, "rollingCountCommandRejections": aNumber,
		"propertyValue_queueSizeRejectionThreshold":                   aNumber,
		"propertyValue_metricsRollingStatisticalWindowInMilliseconds": aNumber,
	},
}

func jsonType(v any) string {
	switch v := v.(type) {
	case float64:
		return aNumber
	case string:
		return aString
	case bool:
		return aBoolean
	case map[string]any:
		want := []string{"0", "100", "25", "50", "75", "90", "95", "99", "99.5"}
		for _, p := range v {
			if _, ok := p.(float64); !ok {
				return fmt.Sprintf("object with %v", v)
			}
		}
		if slices.Equal(slices.Sorted(maps.Keys(v)), want) {
			return percentiles
		}
	}
	return fmt.Sprintf("%T", v)
}

func TestHystrixEventsHaveEveryKey(t *testing.T) {
	g := mustGuard(t, `server: {rules: [{methods: ['*'], breaker: {}, concurrency_limit: {max_in_flight: 3}}]}`)
	_ = serveOn(g, rpctest.Unary, nil)
	all := look(t, g)
	for kind, keys := range hystrixKeys {
		e := only(t, all, kind, "test.v1.Test/Unary")
		for key, want := range keys {
			if got := jsonType(e[key]); got != want {
				t.Errorf("%s.%s: %s, want %s", kind, key, got, want)
			}
		}
		for key := range e {
			if keys[key] == "" {
				t.Errorf("%s.%s is not in the table", kind, key)
			}
		}
	}
}

// Numbers are exact in virtual time.
func TestHystrixCounts(t *testing.T) {
	onArms(t, arms, func(t *testing.T, a arm) {
		g := mustGuard(t, fmt.Sprintf(`%s: {rules: [{methods: ['*'], timeout: 700ms, stream_timeout: 800ms, minimum_budget: 60ms,
			breaker: {error_percent_threshold: 40, request_volume_threshold: 7, window: 30s, sleep_window: 2s},
			rate_limit: {requests_per_second: 1, burst: 8},
			concurrency_limit: {max_in_flight: 2, max_streams: 2, max_queue: 3, max_queue_wait: 1s}}]}`, a.side))
		look(t, g)
		end := func(err error) func(context.Context) error {
			return func(context.Context) error {
				time.Sleep(20 * time.Millisecond)
				return err
			}
		}
		soon, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		_ = a.byHand(soon, g, end(nil)) // budget
		for _, err := range []error{nil, nil, status.Error(codes.NotFound, ""), errDown, status.Error(codes.ResourceExhausted, "")} {
			_ = a.byHand(t.Context(), g, end(err))
		}
		gone, cancel := context.WithCancel(t.Context())
		_ = a.byHand(gone, g, func(ctx context.Context) error {
			cancel()
			return ctx.Err()
		})
		_ = a.byHand(t.Context(), g, func(context.Context) error {
			time.Sleep(time.Second)
			return status.Error(codes.DeadlineExceeded, "")
		})
		name := map[bool]string{true: "test.v1.Test/Unary", false: "test.v1.Test/Bidi"}[a.unary()]
		group := a.side
		if a.side == "client" {
			name = "client " + name // there is no channel, hence no target
			group = "client "
		}
		keys := []string{"requestCount", "errorCount", "errorPercentage",
			"rollingCountSuccess", "rollingCountFailure", "rollingCountTimeout", "rollingCountShortCircuited",
			"rollingCountSemaphoreRejected", "rollingCountBadRequests", "rollingCountExceptionsThrown", "rollingCountFallbackMissing",
			"currentConcurrentExecutionCount", "rollingMaxConcurrentExecutionCount"}
		check := func(open bool, want ...int) hystrixEvent {
			t.Helper()
			e := only(t, look(t, g), "HystrixCommand", name)
			if got := e.numbers(keys...); !slices.Equal(got, want) {
				t.Errorf("got  %v\nwant %v\nfor  %v", got, want, keys)
			}
			if e["isCircuitBreakerOpen"] != open {
				t.Errorf("open: %v", e["isCircuitBreakerOpen"])
			}
			return e
		}
		check(false, 5, 2, 40, 3, 1, 1, 0, 0, 2, 4, 2, 0, 1)
		// The seventh and the eighth that count open the breaker.
		_ = a.byHand(t.Context(), g, end(errDown))
		_ = a.byHand(t.Context(), g, end(errDown))
		for range 3 {
			if err := a.byHand(t.Context(), g, end(nil)); !errors.Is(err, interceptors.ErrBreakerOpen) {
				t.Fatal(err)
			}
		}
		check(true, 7, 4, 57, 3, 3, 1, 3, 0, 2, 9, 7, 0, 1)
		// Half-open counts as open.
		pass(2 * time.Second)
		probe := make(chan struct{})
		go func() {
			_ = a.byHand(t.Context(), g, func(context.Context) error {
				<-probe
				return nil
			})
		}()
		synctest.Wait()
		check(true, 7, 4, 57, 3, 3, 1, 3, 0, 2, 9, 7, 1, 1)
		close(probe)
		synctest.Wait()
		e := check(false, 8, 4, 50, 4, 3, 1, 3, 0, 2, 9, 7, 0, 1)

		timeout := 700
		if !a.unary() {
			timeout = 800
		}
		for key, want := range map[string]any{
			"group": group, "threadPool": name, "reportingHosts": 1.0, "currentTime": float64(time.Now().UnixMilli()),
			"propertyValue_circuitBreakerErrorThresholdPercentage":           40.0,
			"propertyValue_circuitBreakerRequestVolumeThreshold":             7.0,
			"propertyValue_circuitBreakerSleepWindowInMilliseconds":          2000.0,
			"propertyValue_circuitBreakerEnabled":                            true,
			"propertyValue_circuitBreakerForceOpen":                          false,
			"propertyValue_circuitBreakerForceClosed":                        false,
			"propertyValue_executionIsolationStrategy":                       "SEMAPHORE",
			"propertyValue_executionIsolationSemaphoreMaxConcurrentRequests": 2.0,
			"propertyValue_executionTimeoutInMilliseconds":                   float64(timeout),
			"propertyValue_executionIsolationThreadTimeoutInMilliseconds":    float64(timeout),
			// That of the counts: the dashboard divides by it.
			"propertyValue_metricsRollingStatisticalWindowInMilliseconds": 10000.0,
		} {
			if e[key] != want {
				t.Errorf("%s: %v, want %v", key, e[key], want)
			}
		}
		// All of it is over in 10 s, but for latencies.
		pass(10 * time.Second)
		e = check(false, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
		if got := e.latency("latencyExecute"); got[8] != 2020 && got[8] != 1000 {
			t.Errorf("latencies: %v", got)
		}
		pass(time.Minute)
		if e = only(t, look(t, g), "HystrixCommand", name); slices.Max(e.latency("latencyTotal")) != 0 || e.number("latencyTotal_mean") != 0 {
			t.Errorf("latencies an age later: %v", e)
		}
	})
}

// No two methods of a guard share a name, whatever they are called.
func TestHystrixNames(t *testing.T) {
	g := mustGuard(t, "{client: {rules: [{methods: ['*'], breaker: {}, concurrency_limit: {max_in_flight: 1}}]}, server: {rules: [{methods: ['*'], breaker: {}}]}}")
	look(t, g)
	for _, target := range []string{"dns:///a:1", "dns:///b:1", "passthrough:///<script>\" x"} {
		_ = callOn(g, channel(t, target), "/p.S/M", nil)
	}
	hostile := []string{"/p.S/M", "/dns:///a:1 p.S/M", "/p.S/\"></div><script>alert(1)</script>", "/p.S/\n\ndata: x", "/\\u0000\x00\u2028", "/p.S/Größe", "/p.S/%", "/", "//p.S/M"}
	for _, method := range hostile {
		_ = serveOn(g, method, nil)
	}
	all := look(t, g)
	seen := map[string]bool{}
	for _, e := range all {
		key := fmt.Sprint(e["type"], e["name"])
		if seen[key] {
			t.Errorf("%s twice", key)
		}
		seen[key] = true
		group, _ := e["group"].(string)
		pool, _ := e["threadPool"].(string)
		if strings.ContainsAny(e["name"].(string)+group+pool, "<>\"'&\\\n\x00\u2028") {
			t.Errorf("a hostile name: %v", e)
		}
	}
	if len(all) != 3*2+len(hostile) {
		t.Errorf("%d events: %q", len(all), names(all))
	}
	e := only(t, all, "HystrixCommand", "dns:///a:1 p.S/M")
	if e["group"] != "client dns:///a:1" || e["threadPool"] != e["name"] {
		t.Errorf("group %v, pool %v", e["group"], e["threadPool"])
	}
	only(t, all, "HystrixCommand", "p.S/Größe")
}
