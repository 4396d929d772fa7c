package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

func TestHotPathDoesNotAllocate(t *testing.T) {
	g := mustGuard(t, hotPolicy)
	for name, call := range map[string]callOnce{"client": unaryClient(g), "server": unaryServer(g)} {
		if got := testing.AllocsPerRun(1000, func() {
			if err := call(); err != nil {
				t.Fatal(err)
			}
		}); got != 0 {
			t.Errorf("an admitted unary call on the %s: %v allocations, want 0", name, got)
		}
	}
	checkIdle(t, g)
}

// The messages of a stream cost nothing, its life a few allocations.
func TestStreamAllocations(t *testing.T) {
	g := mustGuard(t, hotPolicy)
	for name, call := range map[string]callOnce{"client": streamClient(g), "server": streamServer(g)} {
		if got := testing.AllocsPerRun(1000, func() {
			if err := call(); err != nil {
				t.Fatal(err)
			}
		}); got > 6 {
			t.Errorf("a stream on the %s: %v allocations, want at most 6", name, got)
		}
	}
	checkIdle(t, g)
	s, err := openStream(g, endlessStream{})
	if err != nil {
		t.Fatal(err)
	}
	if got := testing.AllocsPerRun(1000, func() {
		if err := errors.Join(s.SendMsg(nil), s.RecvMsg(nil)); err != nil {
			t.Fatal(err)
		}
	}); got != 0 {
		t.Errorf("a message in each direction: %v allocations, want 0", got)
	}
}

// A client's rejection is the error and nothing else; its status is built when
// somebody asks for it.
func TestRejectionAllocatesItsErrorOnly(t *testing.T) {
	for _, tt := range []struct {
		name, rules string
		first       error // how the call before ends; nil: the others are made within it
		is          error
	}{
		{"rate limit", "rate_limit: {requests_per_second: 0.001, burst: 1}", nil, interceptors.ErrRateLimited},
		{"concurrency limit", "concurrency_limit: {max_in_flight: 1}", nil, interceptors.ErrConcurrencyLimited},
		{"open breaker", "breaker: {request_volume_threshold: 1, sleep_window: 1h}", status.Error(codes.Unavailable, ""), interceptors.ErrBreakerOpen},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := mustGuard(t, "client: {rules: [{methods: ['*'], "+tt.rules+"}]}")
			call := unaryClient(g)
			measure := func() {
				if got := testing.AllocsPerRun(1000, func() {
					if err := call(); !errors.Is(err, tt.is) {
						t.Fatal(err)
					}
				}); got > 1 {
					t.Errorf("%v allocations, want 1", got)
				}
			}
			_ = g.UnaryClientInterceptor()(t.Context(), rpctest.Unary, nil, nil, nil,
				func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
					if tt.first == nil {
						measure()
					}
					return tt.first
				})
			if tt.first != nil {
				measure()
			}
			checkIdle(t, g)
		})
	}
}

// A method with all gates and their counters costs less than a kilobyte and no
// goroutine.
func TestMemoryOfAMethod(t *testing.T) {
	g := mustGuard(t, `server: {rules: [{methods: ['*'], breaker: {}, rate_limit: {requests_per_second: 1000000},
		concurrency_limit: {max_in_flight: 100, max_streams: 100, max_queue: 10}}]}`)
	methods := make([]string, 3000) // fewer than get state of their own
	for i := range methods {
		methods[i] = fmt.Sprintf("/test.v1.Service%d/Method", i)
	}
	heap, goroutines := heapInUse(), runtime.NumGoroutine()
	for _, method := range methods {
		if err := serve(g, method); err != nil {
			t.Fatal(err)
		}
	}
	grown := float64(heapInUse()-heap) / float64(len(methods))
	t.Logf("%.0f bytes of heap per method", grown)
	if grown > 1000 {
		t.Errorf("%.0f bytes of heap per method, want at most 1000", grown)
	}
	if n := runtime.NumGoroutine() - goroutines; n > 0 {
		t.Errorf("%d goroutines more", n)
	}
	if n := len(g.Snapshot().Methods); n != len(methods) {
		t.Errorf("%d methods have state, want %d", n, len(methods))
	}
}

func heapInUse() int64 {
	runtime.GC()
	runtime.GC() // what sync.Pool gave up in the first
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
