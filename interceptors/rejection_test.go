package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

const pushbackTrailer = "grpc-retry-pushback-ms"

// rejection is how a call is brought to be rejected, and what that looks like.
type rejection struct {
	name     string
	blocks   string
	opts     []interceptors.Option
	before   func(t *testing.T, a arm, conn *grpc.ClientConn) // what makes the gate say no
	deadline time.Duration                                    // of the rejected call
	reason   interceptors.Reason
	is       error
	code     codes.Code
	retry    time.Duration // RetryInfo; 0: none
	pushback time.Duration // the trailer, before jitter; 0: none, -1: "do not retry"
}

func callsOnce(t *testing.T, a arm, conn *grpc.ClientConn) {
	if err := a.call(t.Context(), conn, "answer"); err != nil {
		t.Fatal(err)
	}
}

// holds starts calls that are held until the test ends.
func holds(n int) func(*testing.T, arm, *grpc.ClientConn) {
	return func(t *testing.T, a arm, conn *grpc.ClientConn) {
		ctx, cancel := context.WithCancel(t.Context())
		for range n {
			a.start(ctx, conn, "hold")
		}
		t.Cleanup(cancel)
	}
}

func fails(t *testing.T, a arm, conn *grpc.ClientConn) {
	if err := a.call(t.Context(), conn, "fail"); status.Code(err) != codes.Unavailable {
		t.Fatal(err)
	}
}

var rejections = []rejection{
	{
		name: "rate", blocks: "rate_limit: {requests_per_second: 1, burst: 1}", before: callsOnce,
		reason: interceptors.ReasonRateLimited, is: interceptors.ErrRateLimited, code: codes.ResourceExhausted, retry: time.Second, pushback: time.Second,
	},
	{
		name: "rate, nearer deadline", blocks: "rate_limit: {requests_per_second: 1, burst: 1}", before: callsOnce, deadline: 700 * time.Millisecond,
		reason: interceptors.ReasonRateLimited, is: interceptors.ErrRateLimited, code: codes.ResourceExhausted, retry: time.Second, pushback: -1,
	},
	{
		name: "rate, later deadline", blocks: "rate_limit: {requests_per_second: 1, burst: 1}", before: callsOnce, deadline: 2 * time.Second,
		reason: interceptors.ReasonRateLimited, is: interceptors.ErrRateLimited, code: codes.ResourceExhausted, retry: time.Second, pushback: time.Second,
	},
	{
		name: "external limiter", blocks: "rate_limit: {external: never}",
		opts:   []interceptors.Option{interceptors.WithLimiter("never", limiterFunc(func(context.Context) error { return errors.New("no") }))},
		reason: interceptors.ReasonRateLimited, is: interceptors.ErrRateLimited, code: codes.ResourceExhausted,
	},
	{
		name: "concurrency", blocks: "concurrency_limit: {max_in_flight: 1, max_streams: 1}", before: holds(1),
		reason: interceptors.ReasonConcurrencyLimited, is: interceptors.ErrConcurrencyLimited, code: codes.ResourceExhausted,
		retry: 100 * time.Millisecond, pushback: 100 * time.Millisecond,
	},
	{
		name: "queue full", blocks: "concurrency_limit: {max_in_flight: 1, max_streams: 1, max_queue: 1, max_queue_wait: 40ms}", before: holds(2),
		reason: interceptors.ReasonConcurrencyLimited, is: interceptors.ErrConcurrencyLimited, code: codes.ResourceExhausted,
		retry: 40 * time.Millisecond, pushback: 40 * time.Millisecond,
	},
	{
		name: "queue timeout", blocks: "concurrency_limit: {max_in_flight: 1, max_streams: 1, max_queue: 1, max_queue_wait: 40ms}", before: holds(1),
		reason: interceptors.ReasonQueueTimeout, is: interceptors.ErrQueueTimeout, code: codes.ResourceExhausted,
		retry: 40 * time.Millisecond, pushback: 40 * time.Millisecond,
	},
	{
		name: "breaker", blocks: "breaker: {request_volume_threshold: 1, sleep_window: 7s}", before: fails,
		reason: interceptors.ReasonBreakerOpen, is: interceptors.ErrBreakerOpen, code: codes.Unavailable, retry: 7 * time.Second,
	},
	{
		name: "budget", blocks: "minimum_budget: 100ms", deadline: 99 * time.Millisecond,
		reason: interceptors.ReasonBudgetTooSmall, is: interceptors.ErrBudgetTooSmall, code: codes.DeadlineExceeded, pushback: -1,
	},
}

// clerk answers, fails or holds a call as its text asks for.
func clerk() *rpctest.Service {
	return bothKinds(func(ctx context.Context, text string) error {
		switch text {
		case "fail":
			return status.Error(codes.Unavailable, "down")
		case "hold":
			<-ctx.Done()
		}
		return nil
	})
}

func TestRejections(t *testing.T) {
	for _, r := range rejections {
		t.Run(r.name, func(t *testing.T) {
			eachArm(t, func(t *testing.T, a arm) {
				g, conn := a.setup(t, r.blocks, clerk(), r.opts...)
				if r.before != nil {
					r.before(t, a, conn)
				}
				ctx, cancel := t.Context(), context.CancelFunc(func() {})
				if r.deadline > 0 {
					ctx, cancel = context.WithTimeout(ctx, r.deadline)
				}
				defer cancel()
				var header, trailer metadata.MD
				err := a.call(ctx, conn, "answer", grpc.Header(&header), grpc.Trailer(&trailer))
				r.check(t, a, err)
				checkPushback(t, trailer, r.want(a))
				if len(header) > 0 {
					t.Errorf("the response has headers, %v, which disable the client's retry", header)
				}
				if n := a.state(t, g).Counts.Rejected[r.reason]; n != 1 {
					t.Errorf("%d rejections counted, want 1", n)
				}
			})
		})
	}
}

// want is the pushback in the trailer; a client's own rejection has no trailer.
func (r rejection) want(a arm) time.Duration {
	if a.side == "client" {
		return 0
	}
	return r.pushback
}

func (r rejection) check(t *testing.T, a arm, err error) {
	t.Helper()
	if status.Code(err) != r.code {
		t.Errorf("got %v, want %v", err, r.code)
	}
	info := detailOf[*errdetails.ErrorInfo](err)
	if info.GetDomain() != "grpc-resilience" || info.GetReason() != string(r.reason) ||
		info.GetMetadata()["method"] != a.method || info.GetMetadata()["rule"] != "the-rule" {
		t.Errorf("ErrorInfo %v", info)
	}
	if !near(retryInfo(err), r.retry) {
		t.Errorf("RetryInfo %v, want %v", retryInfo(err), r.retry)
	}
	quota := detailOf[*errdetails.QuotaFailure](err)
	if (quota != nil) != (r.reason == interceptors.ReasonRateLimited) {
		t.Errorf("QuotaFailure %v", quota)
	}
	if quota != nil && quota.GetViolations()[0].GetSubject() != "the-rule" {
		t.Errorf("QuotaFailure %v, want the rule as its subject", quota)
	}
	if a.side == "server" {
		return // from here on: what only this process sees
	}
	var rejected *interceptors.RejectedError
	if !errors.As(err, &rejected) || !errors.Is(err, r.is) {
		t.Fatalf("%T is no RejectedError of %v", err, r.is)
	}
	if !near(rejected.RetryAfter, r.retry) {
		t.Errorf("RetryAfter %v, want %v", rejected.RetryAfter, r.retry)
	}
	rejected.RetryAfter = 0
	if want := (interceptors.RejectedError{Side: interceptors.Client, Method: a.method, Rule: "the-rule", Reason: r.reason}); *rejected != want {
		t.Errorf("got %+v, want %+v", *rejected, want)
	}
}

// checkPushback checks that the trailer says want or up to a fifth more; 0: that
// it says nothing; -1: not to retry.
func checkPushback(t *testing.T, trailer metadata.MD, want time.Duration) {
	t.Helper()
	got := trailer.Get(pushbackTrailer)
	if want == 0 {
		if len(got) != 0 {
			t.Errorf("pushback %q, want none", got)
		}
		return
	}
	if len(got) != 1 {
		t.Fatalf("pushback %q, want one", got)
	}
	millis, err := strconv.Atoi(got[0])
	if err != nil {
		t.Fatal(err)
	}
	if want < 0 {
		if millis != -1 {
			t.Errorf("pushback %d, want -1", millis)
		}
		return
	}
	after := time.Duration(millis) * time.Millisecond
	if after < want || after > want*12/10+time.Millisecond {
		t.Errorf("pushback %v, want %v or up to a fifth more", after, want)
	}
}

// Those who were refused together must not come back together.
func TestPushbackIsJittered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := arms[2]
		_, conn := a.setup(t, "rate_limit: {requests_per_second: 0.001, burst: 1}", clerk())
		callsOnce(t, a, conn)
		seen := map[string]bool{}
		low, high := 0, 0 // pushbacks near the ends of their range
		for range 100 {
			var trailer metadata.MD
			_ = a.call(t.Context(), conn, "answer", grpc.Trailer(&trailer))
			checkPushback(t, trailer, 1000*time.Second)
			seen[trailer.Get(pushbackTrailer)[0]] = true
			switch millis, _ := strconv.Atoi(trailer.Get(pushbackTrailer)[0]); {
			case millis < 1_050_000:
				low++
			case millis > 1_150_000:
				high++
			}
		}
		if len(seen) < 90 || low == 0 || high == 0 {
			t.Errorf("100 pushbacks: %d different, %d below 1.05 and %d above 1.15 of RetryInfo", len(seen), low, high)
		}
	})
}

func TestDrainingRejection(t *testing.T) {
	eachServerArm(t, func(t *testing.T, a arm) {
		g := mustGuard(t, "server: {drain: {announce: 0s, reject_new: true}, rules: [{name: the-rule, methods: ['*'], timeout: 1s, stream_timeout: 1s}]}")
		conn := rpctest.Start(t, clerk(), g.ServerOptions(), nil)
		// Another server of the guard: its drain is this one's too.
		if err := g.Shutdown(t.Context(), grpc.NewServer(g.ServerOptions()...)); err != nil {
			t.Fatal(err)
		}
		var header, trailer metadata.MD
		err := a.call(t.Context(), conn, "answer", grpc.Header(&header), grpc.Trailer(&trailer))
		rejection{reason: interceptors.ReasonDraining, code: codes.Unavailable}.check(t, a, err)
		checkPushback(t, trailer, 0)
		if len(header) > 0 {
			t.Errorf("the response has headers: %v", header)
		}
		checkIdle(t, g)
	})
}

// attempts notes when each attempt reached the server and the pushback that it
// was answered with.
type attempts struct {
	mu       sync.Mutex
	at       []time.Time
	pushback []string
}

func (n *attempts) note(ctx context.Context, began time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	sent := ""
	if ts, ok := grpc.ServerTransportStreamFromContext(ctx).(interface{ Trailer() metadata.MD }); ok {
		if v := ts.Trailer().Get(pushbackTrailer); len(v) == 1 {
			sent = v[0]
		}
	}
	n.at, n.pushback = append(n.at, began), append(n.pushback, sent)
}

// options puts the count outside of the guard.
func (n *attempts) options(g *interceptors.Guard) []grpc.ServerOption {
	return append([]grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			began := time.Now()
			defer n.note(ctx, began)
			return h(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			began := time.Now()
			defer n.note(ss.Context(), began)
			return h(srv, ss)
		}),
	}, g.ServerOptions()...)
}

// retryConfig is gRPC's own retry, with a backoff that cannot be mistaken for a
// pushback.
const retryConfig = `{"methodConfig": [{"name": [{}], "retryPolicy": {
	"maxAttempts": 5, "initialBackoff": "0.001s", "maxBackoff": "0.001s", "backoffMultiplier": 1,
	"retryableStatusCodes": ["RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"]}}]}`

func (a arm) retrying(t *testing.T, blocks string) (*interceptors.Guard, *grpc.ClientConn, *attempts) {
	t.Helper()
	n := new(attempts)
	g := mustGuard(t, fmt.Sprintf("server: {rules: [{methods: ['*'], %s}]}", blocks))
	conn := rpctest.Start(t, clerk(), n.options(g), []grpc.DialOption{grpc.WithDefaultServiceConfig(retryConfig)})
	return g, conn, n
}

func TestCase29_BuiltInRetryWaitsAsTold(t *testing.T) {
	eachServerArm(t, func(t *testing.T, a arm) {
		g, conn, n := a.retrying(t, "rate_limit: {requests_per_second: 1, burst: 1}")
		callsOnce(t, a, conn)
		p := a.start(t.Context(), conn, "answer")
		pass(10 * time.Second)
		if !p.ended() || p.result().err != nil {
			t.Fatalf("the retried call: ended %v: %v", p.ended(), p.result().err)
		}
		if tries := len(n.at) - 1; tries != 2 {
			t.Fatalf("%d attempts, want the refused one and one when there is a token", tries)
		}
		waited := n.at[2].Sub(n.at[1])
		if told, err := time.ParseDuration(n.pushback[1] + "ms"); err != nil || waited != told || waited < time.Second {
			t.Errorf("the second attempt came after %v, told was %q ms", waited, n.pushback[1])
		}
		synctest.Wait()
		checkIdle(t, g)
	})
}

func TestCase29_NegativePushbackIsExactlyOneAttempt(t *testing.T) {
	for _, blocks := range []string{
		"rate_limit: {requests_per_second: 1, burst: 1}", // the deadline is nearer than the next token
		"minimum_budget: 1s",
	} {
		t.Run(blocks, func(t *testing.T) {
			eachServerArm(t, func(t *testing.T, a arm) {
				_, conn, n := a.retrying(t, blocks)
				callsOnce(t, a, conn)
				ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
				defer cancel()
				p := a.start(ctx, conn, "answer")
				if !p.ended() || p.result().took != 0 || reasonOf(p.result().err) == "" {
					t.Errorf("ended %v after %v: %v", p.ended(), p.result().took, p.result().err)
				}
				if got := n.pushback[1:]; !slices.Equal(got, []string{"-1"}) {
					t.Errorf("pushbacks %q, want one attempt that was told not to retry", got)
				}
			})
		})
	}
}

// A retry after an open breaker must be free to pick another server: it comes
// with the client's own backoff, and as often as the client likes.
func TestCase29_OpenBreakerDoesNotHoldRetriesBack(t *testing.T) {
	eachServerArm(t, func(t *testing.T, a arm) {
		g, conn, n := a.retrying(t, "breaker: {request_volume_threshold: 1, sleep_window: 1m}")
		p := a.start(t.Context(), conn, "fail")
		pass(time.Second)
		if !p.ended() || reasonOf(p.result().err) != interceptors.ReasonBreakerOpen || len(n.at) != 5 {
			t.Errorf("ended %v after %d attempts: %v, want all 5, the last refused by the open breaker", p.ended(), len(n.at), p.result().err)
		}
		if p.result().took > 10*time.Millisecond {
			t.Errorf("the attempts took %v, the client's backoff is 1ms", p.result().took)
		}
		checkIdle(t, g)
	})
}
