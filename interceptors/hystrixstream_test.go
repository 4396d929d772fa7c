package interceptors_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
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

// What a fallback makes of a call is shown beside what the call was.
func TestHystrixFallbacks(t *testing.T) {
	giveUp := errors.New("no answer")
	answer := func(_ context.Context, _ string, req, _ any, _ error) error {
		if req.(*rpctest.Message).GetValue() == "UNAVAILABLE" {
			return nil
		}
		return giveUp
	}
	g := mustGuard(t, "client: {rules: [{methods: ['*'], breaker: {}}]}", interceptors.WithFallback("*", answer))
	conn := rpctest.Start(t, script(), nil, g.DialOptions())
	look(t, g)
	for text, want := range map[string]error{"UNAVAILABLE": nil, "INTERNAL": giveUp, "NOT_FOUND": status.Error(codes.NotFound, "as asked for"), "": nil} {
		if _, err := rpctest.Call(t.Context(), conn, rpctest.Unary, text); fmt.Sprint(err) != fmt.Sprint(want) {
			t.Errorf("%q: %v, want %v", text, err, want)
		}
	}
	e := only(t, look(t, g), "HystrixCommand", "passthrough:///test test.v1.Test/Unary")
	keys := []string{"rollingCountSuccess", "rollingCountFailure", "rollingCountFallbackSuccess", "rollingCountFallbackFailure", "rollingCountFallbackMissing", "rollingCountExceptionsThrown"}
	if got, want := e.numbers(keys...), []int{2, 2, 1, 1, 0, 1}; !slices.Equal(got, want) {
		t.Errorf("got  %v\nwant %v\nfor  %v", got, want, keys)
	}
}

// Calls that hang, wait, and are refused.
func TestHystrixPool(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		g := mustGuard(t, fmt.Sprintf(`%s: {rules: [{methods: ['*'], breaker: {},
			concurrency_limit: {max_in_flight: 3, max_streams: 3, max_queue: 2, max_queue_wait: 5s}}]}`, a.side))
		look(t, g)
		var ends []chan struct{}
		for range 7 {
			end := make(chan struct{})
			ends = append(ends, end)
			go func() {
				_ = a.byHand(t.Context(), g, func(context.Context) error {
					<-end
					return nil
				})
			}()
			synctest.Wait()
		}
		name := strings.TrimPrefix(a.method, "/")
		if a.side == "client" {
			name = "client " + name
		}
		keys := []string{"currentActiveCount", "currentQueueSize", "currentTaskCount", "currentCompletedTaskCount",
			"rollingCountThreadsExecuted", "rollingMaxActiveThreads", "rollingCountCommandRejections",
			"currentPoolSize", "currentCorePoolSize", "currentLargestPoolSize", "currentMaximumPoolSize", "propertyValue_queueSizeRejectionThreshold"}
		check := func(inFlight, rejected int, want ...int) {
			t.Helper()
			all := look(t, g)
			want = append(want, 3, 3, 3, 3, 2)
			if got := only(t, all, "HystrixThreadPool", name).numbers(keys...); !slices.Equal(got, want) {
				t.Errorf("got  %v\nwant %v\nfor  %v", got, want, keys)
			}
			c := only(t, all, "HystrixCommand", name)
			if got := c.numbers("currentConcurrentExecutionCount", "rollingCountSemaphoreRejected"); !slices.Equal(got, []int{inFlight, rejected}) {
				t.Errorf("%v in flight and rejected, want %d and %d", got, inFlight, rejected)
			}
		}
		check(3, 2, 3, 2, 5, 0, 0, 3, 2)
		pass(time.Second)
		close(ends[0])
		close(ends[1])
		synctest.Wait() // the two in the queue have run at once
		check(3, 2, 3, 0, 5, 2, 2, 3, 2)
		pass(20 * time.Millisecond)
		for _, end := range ends[2:] {
			close(end)
		}
		synctest.Wait()
		check(0, 2, 0, 0, 5, 5, 5, 3, 2)
		c := only(t, look(t, g), "HystrixCommand", name)
		// Ran: 20 20 1000 1000 1020. With the wait: 1000 1000 1020 1020 1020.
		if got, want := c.latency("latencyExecute"), []int{20, 265, 1000, 1015, 1020, 1020, 1020, 1020, 1020}; !slices.Equal(got, want) {
			t.Errorf("latencyExecute %v, want %v", got, want)
		}
		if got, want := c.latency("latencyTotal"), []int{1000, 1005, 1020, 1020, 1020, 1020, 1020, 1020, 1020}; !slices.Equal(got, want) {
			t.Errorf("latencyTotal %v, want %v", got, want)
		}
		if got, want := c.numbers("latencyExecute_mean", "latencyTotal_mean"), []int{612, 1012}; !slices.Equal(got, want) {
			t.Errorf("means %v, want %v", got, want)
		}
		pass(10 * time.Second)
		check(0, 0, 0, 0, 5, 5, 0, 0, 0)
	})
}

// One limit for many methods is one pool, whatever method comes first.
func TestHystrixSharedPool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, `server: {rules: [{methods: ['*'], breaker: {}},
			{methods: ["/a.A/*", "/b.B/*"], concurrency_limit: {max_in_flight: 5, scope: rule}}]}`)
		look(t, g)
		for _, method := range []string{"/b.B/M", "/a.A/M", "/a.A/N", "/c.C/M"} {
			for range 2 {
				_ = serveOn(g, method, nil)
			}
		}
		all := look(t, g)
		want := []string{"HystrixCommand a.A/M", "HystrixCommand a.A/N", "HystrixCommand b.B/M", "HystrixCommand c.C/M", "HystrixThreadPool server.rules[1]"}
		if got := names(all); !slices.Equal(got, want) {
			t.Fatalf("got %q, want %q", got, want)
		}
		if got := all[4].numbers("rollingCountThreadsExecuted", "currentCompletedTaskCount", "currentTaskCount", "rollingMaxActiveThreads", "currentPoolSize"); !slices.Equal(got, []int{6, 6, 6, 1, 5}) {
			t.Errorf("got %v", got)
		}
		if all[0]["threadPool"] != "server.rules[1]" || all[3]["threadPool"] != "c.C/M" {
			t.Errorf("pools %v and %v", all[0]["threadPool"], all[3]["threadPool"])
		}
	})
}

// A limit without a breaker is a pool; a rate limit alone is not shown.
func TestHystrixWithoutBreaker(t *testing.T) {
	g := mustGuard(t, `server: {rules: [{methods: ["/a.A/M"], concurrency_limit: {max_in_flight: 5}},
		{methods: ["/a.A/S"], concurrency_limit: {max_streams: 6}}, {methods: ["/b.B/*"], rate_limit: {requests_per_second: 1}}]}`)
	look(t, g)
	_ = serveOn(g, "/a.A/M", nil)
	_ = serve(g, "/a.A/S")
	_ = serveOn(g, "/b.B/M", nil)
	_ = serveOn(g, "/c.C/M", nil)
	all := look(t, g)
	if got := names(all); !slices.Equal(got, []string{"HystrixThreadPool a.A/M", "HystrixThreadPool a.A/S"}) {
		t.Fatalf("got %q", got)
	}
	if got := all[0].number("currentPoolSize") + 10*all[1].number("currentPoolSize"); got != 65 {
		t.Errorf("sizes %d", got)
	}
}

// Rejections by what is not the method's limit.
func TestHystrixOtherRejections(t *testing.T) {
	g := mustGuard(t, `server: {drain: {reject_new: true, announce: 0s, grace: 1h}, rules: [{methods: ['*'], breaker: {},
		rate_limit: {requests_per_second: 0.001, burst: 1}, concurrency_limit: {max_in_flight: 1}}]}`)
	look(t, g)
	_ = serveOn(g, rpctest.Unary, nil)
	_ = serveOn(g, rpctest.Unary, nil)
	srv := rpctest.NewServer(&rpctest.Service{})
	if err := g.Shutdown(t.Context(), srv); err != nil {
		t.Fatal(err)
	}
	if err := serveOn(g, rpctest.Unary, nil); !errors.Is(err, interceptors.ErrDraining) {
		t.Fatal(err)
	}
	all := look(t, g)
	if got := only(t, all, "HystrixCommand", "test.v1.Test/Unary").numbers("rollingCountSemaphoreRejected", "rollingCountShortCircuited", "requestCount"); !slices.Equal(got, []int{2, 0, 1}) {
		t.Errorf("got %v", got)
	}
	if got := only(t, all, "HystrixThreadPool", "test.v1.Test/Unary").number("rollingCountCommandRejections"); got != 0 {
		t.Errorf("%d rejections by the pool", got)
	}
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

// Nothing is recorded until somebody wants to look, then at all methods, old and new.
func TestHystrixRecordsOnDemand(t *testing.T) {
	g := mustGuard(t, hotPolicy)
	_ = serveOn(g, "/p.S/Old", nil)
	h := g.HystrixStream()
	_ = serveOn(g, "/p.S/Old", nil)
	_ = serveOn(g, "/p.S/New", nil)
	_ = callOn(g, nil, "/p.S/New", nil)
	if g.HystrixStream() == nil || h == nil { // asking again forgets nothing
		t.Fatal("no handler")
	}
	all := look(t, g)
	for _, name := range []string{"p.S/Old", "p.S/New", "client p.S/New"} {
		if got := only(t, all, "HystrixCommand", name).number("rollingCountSuccess"); got != 1 {
			t.Errorf("%s: %d successes, want the one since", name, got)
		}
	}
}

// Methods that are first called while recording begins are not forgotten.
func TestHystrixBeginsAmidCalls(t *testing.T) {
	g := mustGuard(t, hotPolicy)
	const callers, methods = 4, 60
	var calls sync.WaitGroup
	for i := range callers {
		calls.Go(func() {
			for n := range methods {
				_ = serveOn(g, fmt.Sprintf("/p%d.S/M%d", i, n), nil)
			}
		})
	}
	g.HystrixStream()
	calls.Wait()
	if n := len(look(t, g)); n != callers*methods*2 {
		t.Errorf("%d events, want a breaker and a pool for each of %d methods", n, callers*methods)
	}
}

func TestHystrixRecordingDoesNotAllocate(t *testing.T) {
	g := mustGuard(t, hotPolicy)
	g.HystrixStream()
	for name, call := range map[string]callOnce{"client": unaryClient(g), "server": unaryServer(g)} {
		if got := testing.AllocsPerRun(1000, func() {
			if err := call(); err != nil {
				t.Fatal(err)
			}
		}); got != 0 {
			t.Errorf("an admitted unary call on the %s: %v allocations, want 0", name, got)
		}
	}
}

func TestHystrixRequests(t *testing.T) {
	g := mustGuard(t, "server: {}")
	h := g.HystrixStream()
	closed := mustGuard(t, "server: {}")
	ofClosed := closed.HystrixStream()
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	var none *interceptors.Guard
	for _, tt := range []struct {
		h              http.Handler
		method, target string
		code           int
		says           string
	}{
		{h, "GET", "/", 200, ":\n\n"}, // nothing to show
		{h, "GET", "/?delay=100", 200, ":\n\n"},
		{h, "GET", "/?delay=60000&x=1", 200, ":\n\n"},
		{h, "GET", "/?delay=99", 400, `delay: found "99", allowed 100 to 60000 (milliseconds)` + "\n"},
		{h, "GET", "/?delay=60001", 400, ""},
		{h, "GET", "/?delay=", 400, ""},
		{h, "GET", "/?delay=1s", 400, ""},
		{h, "GET", "/?delay=-1000", 400, ""},
		{h, "GET", "/?delay=99999999999999999999", 400, ""},
		{h, "GET", "/?delay=-9223372036854775807", 400, ""},
		{h, "HEAD", "/", 405, ""},
		{h, "POST", "/", 405, ""},
		{h, "OPTIONS", "/", 405, ""},
		{ofClosed, "GET", "/", 503, "interceptors: the guard is closed\n"},
		{none.HystrixStream(), "GET", "/", 500, "interceptors: nil *Guard (was the error of Load or New ignored?)\n"},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		w := httptest.NewRecorder()
		tt.h.ServeHTTP(w, httptest.NewRequestWithContext(ctx, tt.method, tt.target, nil))
		if w.Code != tt.code || tt.says != "" && w.Body.String() != tt.says {
			t.Errorf("%s %s: %d %q, want %d %q", tt.method, tt.target, w.Code, w.Body, tt.code, tt.says)
		}
		header := map[string]string{"Content-Type": "text/plain; charset=utf-8"}
		switch tt.code {
		case 200:
			header = map[string]string{"Content-Type": "text/event-stream", "X-Accel-Buffering": "no", "Cache-Control": "no-cache, no-store, max-age=0, must-revalidate"}
		case 405:
			header["Allow"] = "GET"
		}
		for key, want := range header {
			if got := w.Header().Get(key); got != want {
				t.Errorf("%s %s: %s is %q, want %q", tt.method, tt.target, key, got, want)
			}
		}
	}
}

// rigid is a writer that cannot flush.
type rigid struct {
	header http.Header
	code   int
	body   strings.Builder
}

func (r *rigid) Header() http.Header         { return r.header }
func (r *rigid) WriteHeader(code int)        { r.code = code }
func (r *rigid) Write(p []byte) (int, error) { return r.body.Write(p) }

// wrapped hides what it wraps, unwrapped does not.
type wrapped struct{ http.ResponseWriter }

type unwrapped struct{ wrapped }

func (u unwrapped) Unwrap() http.ResponseWriter { return u.ResponseWriter }

func TestHystrixWriters(t *testing.T) {
	g := mustGuard(t, "server: {}")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r := httptest.NewRequestWithContext(ctx, "GET", "/", nil)
	for name, wrap := range map[string]func(http.ResponseWriter) http.ResponseWriter{
		"unwrapped":       func(w http.ResponseWriter) http.ResponseWriter { return unwrapped{wrapped{w}} },
		"unwrapped twice": func(w http.ResponseWriter) http.ResponseWriter { return unwrapped{wrapped{unwrapped{wrapped{w}}}} },
	} {
		w := httptest.NewRecorder()
		g.HystrixStream().ServeHTTP(wrap(w), r)
		if w.Code != 200 || w.Body.String() != ":\n\n" || !w.Flushed {
			t.Errorf("%s: %d %q", name, w.Code, w.Body)
		}
	}
	for name, wrap := range map[string]func(http.ResponseWriter) http.ResponseWriter{
		"mute":            func(w http.ResponseWriter) http.ResponseWriter { return w },
		"mute, unwrapped": func(w http.ResponseWriter) http.ResponseWriter { return unwrapped{wrapped{w}} },
		"hidden":          func(w http.ResponseWriter) http.ResponseWriter { return wrapped{w} },
	} {
		w := &rigid{header: http.Header{}}
		g.HystrixStream().ServeHTTP(wrap(w), r)
		if w.code != 500 || !strings.Contains(w.body.String(), "can flush") || !strings.HasPrefix(w.header.Get("Content-Type"), "text/plain") {
			t.Errorf("%s: %d %q %v", name, w.code, &w.body, w.header)
		}
	}
}

// paced is a writer that notes when it was flushed and with how much.
type paced struct {
	*httptest.ResponseRecorder
	began time.Time

	mu      sync.Mutex
	flushes []time.Duration
	sets    []int
}

func (p *paced) Flush() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.flushes = append(p.flushes, time.Since(p.began))
	p.sets = append(p.sets, p.Body.Len())
}

// A set at once and then one each delay, each with one flush.
func TestHystrixDelay(t *testing.T) {
	for query, delay := range map[string]time.Duration{"": time.Second, "?delay=250": 250 * time.Millisecond} {
		synctest.Test(t, func(t *testing.T) {
			g := mustGuard(t, "server: {}")
			ctx, cancel := context.WithTimeout(t.Context(), 3*delay+1)
			defer cancel()
			w := &paced{ResponseRecorder: httptest.NewRecorder(), began: time.Now()}
			g.HystrixStream().ServeHTTP(w, httptest.NewRequestWithContext(ctx, "GET", "/"+query, nil))
			if want := []time.Duration{0, 0, delay, 2 * delay, 3 * delay}; !slices.Equal(w.flushes, want) {
				t.Errorf("flushed at %v, want %v", w.flushes, want)
			}
			if want := []int{0, 3, 6, 9, 12}; !slices.Equal(w.sets, want) {
				t.Errorf("bytes at each flush %v, want %v", w.sets, want)
			}
		})
	}
}

func TestHystrixEndsWithTheGuard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, "server: {}")
		began, h := time.Now(), g.HystrixStream()
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		var all sync.WaitGroup
		for range 5 {
			all.Go(func() {
				h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(ctx, "GET", "/?delay=60000", nil))
			})
		}
		pass(90 * time.Second)
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
		all.Wait()
		if took := time.Since(began); took != 90*time.Second {
			t.Errorf("streams ended after %v", took)
		}
	})
}

// pipeListener accepts the connections that its tests make.
type pipeListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe"} }

func (l *pipeListener) dial() net.Conn {
	server, client := net.Pipe()
	l.conns <- server
	return client
}

// A client that does not read holds its goroutine for ten seconds; one that reads
// keeps its stream, whatever the server's WriteTimeout.
func TestHystrixWriteDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, "server: {}")
		h, began := g.HystrixStream(), time.Now()
		var mu sync.Mutex
		ended := map[string]time.Duration{}
		srv := &http.Server{WriteTimeout: 3 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			h.ServeHTTP(w, r)
			mu.Lock()
			defer mu.Unlock()
			ended[r.URL.Path] = time.Since(began)
		})}
		lis := newPipeListener()
		go func() { _ = srv.Serve(lis) }()
		idle, reader, slow := lis.dial(), lis.dial(), lis.dial()
		for conn, path := range map[net.Conn]string{idle: "/idle", reader: "/reader", slow: "/slow?delay=30000"} {
			if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path); err != nil {
				t.Fatal(err)
			}
		}
		var got strings.Builder
		var all sync.WaitGroup
		all.Go(func() { _, _ = io.Copy(&got, reader) })
		all.Go(func() { _, _ = io.Copy(io.Discard, slow) })
		pass(100 * time.Second)
		mu.Lock()
		if ended["/idle"] != 10*time.Second {
			t.Errorf("the client that did not read was let go after %v", ended["/idle"])
		}
		if n := len(ended); n != 1 {
			t.Errorf("%d streams have ended: %v", n, ended)
		}
		mu.Unlock()
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		mu.Lock()
		if ended["/reader"] != 100*time.Second || ended["/slow"] != 100*time.Second {
			t.Errorf("the others ended after %v", ended)
		}
		mu.Unlock()
		if err := srv.Close(); err != nil {
			t.Fatal(err)
		}
		all.Wait()
		_ = idle.Close()
		if n := strings.Count(got.String(), ":\n\n"); n < 100 || n > 101 { // the last tick meets Close
			t.Errorf("%d comments in 100 s", n)
		}
	})
}

// A real server, real clients, and calls meanwhile.
func TestHystrixOverHTTP(t *testing.T) {
	g := mustGuard(t, `{client: {rules: [{methods: ['*'], breaker: {}, concurrency_limit: {max_in_flight: 100}}]},
		server: {rules: [{methods: ['*'], breaker: {}}]}}`)
	var inside sync.WaitGroup
	h := g.HystrixStream()
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		inside.Add(1)
		defer inside.Done()
		h.ServeHTTP(unwrapped{wrapped{w}}, r)
	}))
	defer web.Close()
	conn := rpctest.Start(t, &rpctest.Service{Unary: func(_ context.Context, req *rpctest.Message) (*rpctest.Message, error) {
		if req.GetValue() == "fail" {
			return nil, errDown
		}
		return req, nil
	}}, g.ServerOptions(), g.DialOptions())
	ctx, stop := context.WithCancel(t.Context())
	var calls sync.WaitGroup
	calls.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			text := "ok"
			if i%4 == 0 {
				text = "fail"
			}
			_, _ = rpctest.Call(ctx, conn, rpctest.Unary, text)
		}
	})
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			reader, leave := context.WithCancel(t.Context())
			defer leave()
			req, err := http.NewRequestWithContext(reader, "GET", web.URL+"?delay=100", nil)
			if err != nil {
				t.Error(err)
				return
			}
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			seen, lines := map[string]int{}, bufio.NewScanner(resp.Body)
			for (seen["HystrixCommand"] < 8 || seen["calls"] == 0) && lines.Scan() {
				if lines.Text() == "" || lines.Text() == ":" {
					continue
				}
				e := parseHystrix(t, lines.Text()+"\n\n")[0]
				seen[e["type"].(string)]++
				if e["type"] == "HystrixCommand" {
					seen["calls"] += e.number("rollingCountSuccess") + e.number("rollingCountFailure")
				}
			}
			if seen["HystrixCommand"] < 8 || seen["HystrixThreadPool"] < 3 || seen["calls"] == 0 {
				t.Errorf("saw %v: %v", seen, lines.Err())
			}
		})
	}
	readers.Wait() // and are gone:
	inside.Wait()
	stop()
	calls.Wait()
}

// Every name that a guard keeps, and what overflows, which is not shown.
func TestHystrixOfManyMethods(t *testing.T) {
	g := mustGuard(t, "server: {"+everything+"}")
	g.HystrixStream()
	for i := range maxStates + 50 {
		if err := serve(g, fmt.Sprintf("/s%d.v1.S/M", i)); err != nil {
			t.Fatal(err)
		}
	}
	commands := 0
	for _, e := range look(t, g) {
		if e["type"] == "HystrixCommand" {
			commands++
		}
		if strings.Contains(e["name"].(string), "OTHER") {
			t.Errorf("overflow: %v", e)
		}
	}
	if commands != maxStates {
		t.Errorf("%d commands, want %d", commands, maxStates)
	}
}

// What it costs a call to be recorded: compare with BenchmarkUnaryClient and
// BenchmarkUnaryServer.
func BenchmarkUnaryClientRecorded(b *testing.B) {
	g := mustGuard(b, hotPolicy)
	g.HystrixStream()
	serialAndParallel(b, unaryClient(g))
}

func BenchmarkUnaryServerRecorded(b *testing.B) {
	g := mustGuard(b, hotPolicy)
	g.HystrixStream()
	serialAndParallel(b, unaryServer(g))
}

// What a set of events costs, by the number of methods, each with all its samples.
func BenchmarkHystrixEvents(b *testing.B) {
	for _, methods := range []int{1, 100, maxStates} {
		b.Run(fmt.Sprint(methods), func(b *testing.B) {
			g := mustGuard(b, "server: {"+everything+"}")
			h := g.HystrixStream()
			for i := range methods {
				for range 100 {
					if err := serve(g, fmt.Sprintf("/s%d.v1.S/M", i)); err != nil {
						b.Fatal(err)
					}
				}
			}
			ctx, cancel := context.WithCancel(context.Background())
			cancel() // after one set
			r := httptest.NewRequestWithContext(ctx, "GET", "/", nil)
			b.ReportAllocs()
			for b.Loop() {
				w := httptest.NewRecorder()
				w.Body = nil
				h.ServeHTTP(w, r)
			}
		})
	}
}

// Over HTTP/2 a write deadline ends a stream even when nothing is being written.
func TestHystrixOverHTTP2(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, "server: {}")
		protocols := new(http.Protocols)
		protocols.SetUnencryptedHTTP2(true)
		srv := &http.Server{WriteTimeout: 3 * time.Second, Protocols: protocols, Handler: g.HystrixStream()}
		lis := newPipeListener()
		go func() { _ = srv.Serve(lis) }()
		transport := &http.Transport{Protocols: protocols, DialContext: func(context.Context, string, string) (net.Conn, error) { return lis.dial(), nil }}
		resp, err := (&http.Client{Transport: transport}).Get("http://hystrix/?delay=30000")
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		text := make([]byte, 3)
		for i := range 4 {
			if _, err := io.ReadFull(resp.Body, text); err != nil || string(text) != ":\n\n" {
				t.Fatalf("set %d: %q, %v", i, text, err)
			}
		}
		if took := time.Since(began); took != 90*time.Second || resp.ProtoMajor != 2 {
			t.Errorf("four sets in %v over %s", took, resp.Proto)
		}
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(resp.Body, text); err != io.EOF {
			t.Errorf("after Close: %v, want the end", err)
		}
		_ = resp.Body.Close()
		transport.CloseIdleConnections()
		if err := srv.Close(); err != nil {
			t.Fatal(err)
		}
	})
}
