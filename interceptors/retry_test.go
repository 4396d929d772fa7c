package interceptors_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// gRPC's own service config says for each method what the policy says.
func TestRetryPolicyOfMethods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, `
client:
  rules:
    - methods: ["*"]
      retry: {max_attempts: 4, initial_backoff: 10ms, max_backoff: 1.5s, backoff_multiplier: 1.5, retryable_codes: [unavailable, RESOURCE_EXHAUSTED]}
    - methods: ["/a.B/*"]
      timeout: 1s
    - methods: ["/a.B/C", "/grpc.channelz.v1.Channelz/*"]
      retry: {}
    - methods: ["/a.B/D"]
      retry: {disabled: true}
`)
		conn := rpctest.Start(t, &rpctest.Service{}, nil, g.DialOptions())
		if _, err := rpctest.Call(t.Context(), conn, rpctest.Unary, "x"); err != nil {
			t.Fatal(err)
		}
		for method, want := range map[string]int{
			rpctest.Unary: 4, "/a.B/X": 4, "/a.B/C": 3, "/a.B/D": 0, "/grpc.health.v1.Health/Check": 0, "/grpc.channelz.v1.Channelz/GetServer": 3,
		} {
			got := 0
			if p := conn.GetMethodConfig(method).RetryPolicy; p != nil {
				got = p.MaxAttempts
			}
			if got != want {
				t.Errorf("%s: %d attempts, want %d", method, got, want)
			}
		}
		p := conn.GetMethodConfig(rpctest.Unary).RetryPolicy
		if p.InitialBackoff != 10*time.Millisecond || p.MaxBackoff != 1500*time.Millisecond || p.BackoffMultiplier != 1.5 ||
			len(p.RetryableStatusCodes) != 2 || !p.RetryableStatusCodes[codes.ResourceExhausted] {
			t.Errorf("the policy is %+v", p)
		}
		p = conn.GetMethodConfig("/a.B/C").RetryPolicy
		if p.InitialBackoff != 50*time.Millisecond || p.MaxBackoff != time.Second || p.BackoffMultiplier != 2 || !p.RetryableStatusCodes[codes.Unavailable] {
			t.Errorf("the defaults are %+v", p)
		}
	})
}

// A retry goes to another endpoint; the breaker of the method sees the call, those of the
// endpoints each attempt.
func TestRetryGoesElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, `
client:
  load_balancing: {decay: 10ms, breaker: {error_percent_threshold: 100, consecutive_failures: 30}}
  retry_throttling: {max_tokens: 1000, token_ratio: 1}
  rules: [{methods: ["*"], retry: {max_attempts: 2}, breaker: {request_volume_threshold: 1, error_percent_threshold: 1}}]
`)
		f := newFleet(t, g, addresses(3)...)
		f.conn.Connect()
		synctest.Wait()
		bad := f.servers["10.0.0.1:1"]
		bad.answer(failsWith(codes.Unavailable))
		for range 300 {
			if _, err := rpctest.Call(t.Context(), f.conn, rpctest.Unary, "x"); err != nil {
				t.Fatal(err)
			}
			s, err := rpctest.Open(t.Context(), f.conn, rpctest.ServerStream)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(rpctest.Send(s, "x"), s.CloseSend()); err != nil {
				t.Fatal(err)
			}
			if _, err := rpctest.Recv(s); err != nil {
				t.Fatal(err)
			}
			if _, err := rpctest.Recv(s); err != io.EOF {
				t.Fatal(err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if n := bad.took(); n < 20 {
			t.Errorf("only %d attempts failed: it was not asked", n)
		}
		wantEnded(t, g, interceptors.Client, rpctest.Unary, ended{success: 300})
		wantState(t, g, interceptors.Client, rpctest.Unary, "closed")
		for i := 0; i < 1000 && len(g.Snapshot().Endpoints[0].Ejections) == 0; i++ {
			_, _ = rpctest.Call(t.Context(), f.conn, rpctest.Unary, "x")
			time.Sleep(100 * time.Millisecond)
		}
		if e := g.Snapshot().Endpoints[0]; len(e.Ejections) == 0 {
			t.Errorf("the attempts did not count: %+v", e)
		}
		wantState(t, g, interceptors.Client, rpctest.Unary, "closed")
	})
}

const retries = "client: {rules: [{methods: ['*'], retry: {}}]}"

// What fails, however much of it, is not made worse.
func TestRetriesAreBounded(t *testing.T) {
	for _, part := range []float64{0.02, 0.05, 0.1, 0.2, 0.5, 1} {
		synctest.Test(t, func(t *testing.T) {
			var attempts atomic.Int64
			random := rand.New(rand.NewPCG(1, 2))
			var mu sync.Mutex
			conn := rpctest.Start(t, &rpctest.Service{Unary: func(_ context.Context, req *rpctest.Message) (*rpctest.Message, error) {
				attempts.Add(1)
				mu.Lock()
				defer mu.Unlock()
				if random.Float64() < part {
					return nil, status.Error(codes.Unavailable, "")
				}
				return req, nil
			}}, nil, mustGuard(t, retries).DialOptions())
			call := func(during time.Duration) float64 {
				attempts.Store(0)
				calls := 0
				for end := time.Now().Add(during); time.Now().Before(end); calls++ {
					_, _ = rpctest.Call(t.Context(), conn, rpctest.Unary, "x")
					time.Sleep(10 * time.Millisecond)
				}
				return float64(attempts.Load()) / float64(calls)
			}
			call(5 * time.Second)
			got := call(10 * time.Second)
			if got > 1.1 {
				t.Errorf("with %v failing %.3f attempts a call", part, got)
			}
			if part < 0.06 && got < 1+part/2 {
				t.Errorf("with %v failing only %.3f attempts a call: nothing is retried", part, got)
			}
		})
	}
}

// Three hops, each with the suite and retries: what the last one gets is no more than a
// quarter above what the first one is asked.
func TestRetriesInAChain(t *testing.T) {
	for _, part := range []float64{0.05, 0.09, 0.12, 0.3, 1} {
		synctest.Test(t, func(t *testing.T) {
			var attempts atomic.Int64
			handler := func(ctx context.Context, req *rpctest.Message) (*rpctest.Message, error) {
				attempts.Add(1)
				if rand.Float64() < part {
					return nil, status.Error(codes.Unavailable, "")
				}
				return req, nil
			}
			var conn *grpc.ClientConn
			for range 3 {
				conn = rpctest.Start(t, &rpctest.Service{Unary: handler}, mustGuard(t, "server: {}").ServerOptions(), mustGuard(t, retries).DialOptions())
				next := conn
				handler = func(ctx context.Context, req *rpctest.Message) (*rpctest.Message, error) {
					reply := new(rpctest.Message)
					return reply, next.Invoke(ctx, rpctest.Unary, req, reply)
				}
			}
			calls := 0
			call := func(during time.Duration) {
				for end := time.Now().Add(during); time.Now().Before(end); calls++ {
					_, _ = rpctest.Call(t.Context(), conn, rpctest.Unary, "x")
					time.Sleep(10 * time.Millisecond)
				}
			}
			call(5 * time.Second)
			attempts.Store(0)
			calls = 0
			call(10 * time.Second)
			if got := float64(attempts.Load()) / float64(calls); got > 1.25 {
				t.Errorf("with %v failing %.3f attempts a call", part, got)
			}
		})
	}
}

// A server's pushback is obeyed: the retry comes when it says, and not at all if it says so.
func TestRetryObeysPushback(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, `
client: {rules: [{methods: ["*"], retry: {initial_backoff: 1ms, max_backoff: 1ms, retryable_codes: [RESOURCE_EXHAUSTED]}}]}
server: {rules: [{methods: ["*"], rate_limit: {requests_per_second: 1, burst: 1}}]}
`)
		conn := rpctest.Start(t, &rpctest.Service{}, g.ServerOptions(), g.DialOptions())
		began := time.Now()
		for range 2 {
			if _, err := rpctest.Call(t.Context(), conn, rpctest.Unary, "x"); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(began); took < time.Second || took > 1300*time.Millisecond {
			t.Errorf("the retry came after %v, want 1 to 1.2s", took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		began = time.Now()
		if _, err := rpctest.Call(ctx, conn, rpctest.Unary, "x"); status.Code(err) != codes.ResourceExhausted || time.Since(began) > 10*time.Millisecond {
			t.Errorf("a retry that would be too late: %v after %v", err, time.Since(began))
		}
	})
}

// Retries of what may have been done are said loudly, at the start and at a reload.
func TestUnsafeRetriesWarn(t *testing.T) {
	var log strings.Builder
	opt := interceptors.WithLogger(slog.New(slog.NewTextHandler(&log, nil)))
	g := mustGuard(t, `client: {rules: [{methods: ["*"], retry: {retryable_codes: [UNAVAILABLE, RESOURCE_EXHAUSTED]}}]}`, opt)
	if log.Len() > 0 {
		t.Errorf("logged: %s", log.String())
	}
	unsafe := `client: {rules: [{name: orders, methods: ["/a.B/C"], retry: {retryable_codes: [UNAVAILABLE, internal, DEADLINE_EXCEEDED]}}]}`
	check := func() {
		t.Helper()
		if got := log.String(); strings.Count(got, "level=WARN") != 1 || !strings.Contains(got, `rule=orders pattern=/a.B/C codes="INTERNAL DEADLINE_EXCEEDED"`) {
			t.Errorf("logged: %s", got)
		}
		log.Reset()
	}
	mustReload(t, g, unsafe)
	check()
	mustGuard(t, unsafe, opt)
	check()
}

// A channel keeps the service config that it was made with.
func TestRetryCannotBeReloaded(t *testing.T) {
	g := mustGuard(t, retries)
	mustReload(t, g, "client: {retry_throttling: {max_tokens: 20}, rules: [{methods: ['*'], retry: {max_attempts: 2}}]}")
	g.DialOptions()
	mustReload(t, g, "client: {retry_throttling: {max_tokens: 20}, rules: [{methods: ['*'], timeout: 1s, retry: {max_attempts: 2}}]}")
	for _, other := range []string{
		"client: {retry_throttling: {max_tokens: 20}, rules: [{methods: ['*'], retry: {max_attempts: 3}}]}",
		"client: {rules: [{methods: ['*'], retry: {max_attempts: 2}}]}",
		"client: {}",
		"client: {load_balancing: {}, retry_throttling: {max_tokens: 20}, rules: [{methods: ['*'], retry: {max_attempts: 2}}]}",
	} {
		if err := reload(g, other); err == nil || !strings.Contains(err.Error(), "a channel keeps the service config") {
			t.Errorf("%s: %v", other, err)
		}
	}
}
