package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

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
			// Those that hang are the most that there were, before the first of them ends.
			if got := c.numbers("currentConcurrentExecutionCount", "rollingCountSemaphoreRejected", "rollingMaxConcurrentExecutionCount"); !slices.Equal(got, []int{inFlight, rejected, want[5]}) {
				t.Errorf("%v in flight, rejected and most in flight, want %d, %d and %d", got, inFlight, rejected, want[5])
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

// Calls of methods beyond the cap are in the pool that they share, and nowhere else.
func TestHystrixSharedPoolBeyondTheCap(t *testing.T) {
	g := mustGuard(t, `server: {rules: [{methods: ['*'], concurrency_limit: {max_in_flight: 1, scope: rule}}, {methods: ["/b.B/*"], breaker: {}},
		{methods: ["/c.C/*"], concurrency_limit: {max_in_flight: 2, scope: rule}}, {methods: ["/d.D/*"], concurrency_limit: {max_in_flight: 3}}]}`)
	g.HystrixStream()
	for i := range maxStates {
		_ = serveOn(g, fmt.Sprintf("/a.A/M%d", i), nil)
	}
	for i := range 10 {
		for _, service := range "bcd" { // the rule's limit with another rule's breaker, and limits of which all methods are beyond
			_ = serveOn(g, fmt.Sprintf("/%[1]c.S/M%[2]d", service, i), nil)
			_ = serveOn(g, fmt.Sprintf("/%[1]c.%[3]c/M%[2]d", service, i, service-'a'+'A'), nil)
		}
	}
	// One is in flight when another of them comes.
	_, err := g.UnaryServerInterceptor()(context.Background(), nil, &grpc.UnaryServerInfo{FullMethod: "/b.B/M"}, func(context.Context, any) (any, error) {
		return nil, serveOn(g, "/a.A/Other", nil)
	})
	if !errors.Is(err, interceptors.ErrConcurrencyLimited) {
		t.Fatal(err)
	}
	all := look(t, g)
	if got, want := names(all), []string{"HystrixThreadPool server.rules[0]"}; !slices.Equal(got, want) {
		t.Fatalf("got %.200q, want %q", got, want)
	}
	const calls = maxStates + 4*10 + 1
	if got := all[0].numbers("rollingCountThreadsExecuted", "currentCompletedTaskCount", "currentTaskCount", "rollingCountCommandRejections"); !slices.Equal(got, []int{calls, calls, calls, 1}) {
		t.Errorf("got %v, want %d calls and a rejection", got, calls)
	}
}

// A call that has waited too long is one that the pool had no place for.
func TestHystrixQueueTimeout(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		g := mustGuard(t, fmt.Sprintf(`%s: {rules: [{methods: ['*'], breaker: {},
			concurrency_limit: {max_in_flight: 1, max_streams: 1, max_queue: 1, max_queue_wait: 2s}}]}`, a.side))
		look(t, g)
		end := make(chan struct{})
		go func() {
			_ = a.byHand(t.Context(), g, func(context.Context) error {
				<-end
				return nil
			})
		}()
		synctest.Wait()
		if err := a.byHand(t.Context(), g, func(context.Context) error { return nil }); !errors.Is(err, interceptors.ErrQueueTimeout) {
			t.Fatal(err)
		}
		all := look(t, g)
		if got := all[0].number("rollingCountSemaphoreRejected") + 10*all[1].number("rollingCountCommandRejections"); got != 11 || len(all) != 2 {
			t.Errorf("rejected %d in %q, want 1 by the command and by the pool", got, names(all))
		}
		close(end)
		synctest.Wait()
	})
}

// A limit without a breaker is a pool; a rate limit alone is not shown.
func TestHystrixWithoutBreaker(t *testing.T) {
	g := mustGuard(t, `server: {rules: [{methods: ["/a.A/M"], concurrency_limit: {max_in_flight: 5}},
		{methods: ["/a.A/S"], concurrency_limit: {max_streams: 6}}, {methods: ["/b.B/*"], rate_limit: {requests_per_second: 1}}]}`)
	_ = serve(g, "/a.A/S") // a stream, by its limit alone: it was over when recording began
	look(t, g)
	_ = serveOn(g, "/a.A/M", nil)
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
