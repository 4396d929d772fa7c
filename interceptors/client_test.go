package interceptors_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// twice is a method that answers a unary or client-streaming call two times.
const twice = "/test.v1.Test/Twice"

func answerTwice(_ any, ss grpc.ServerStream) error {
	if _, err := rpctest.Recv(ss); err != nil {
		return err
	}
	for range 2 {
		if err := rpctest.Send(ss, "answer"); err != nil {
			return err
		}
	}
	time.Sleep(time.Second) // the status is late
	return nil
}

func TestCase06_TwoAnswersToAUnaryCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, "client: {rules: [{methods: ['*'], breaker: {}, concurrency_limit: {max_in_flight: 1}}]}")
		conn := rpctest.Start(t, new(rpctest.Service), []grpc.ServerOption{grpc.UnknownServiceHandler(answerTwice)}, g.DialOptions())
		for range 3 {
			if _, err := rpctest.Call(t.Context(), conn, twice, ""); status.Code(err) != codes.Internal {
				t.Fatalf("%v, want a cardinality violation", err)
			}
		}
		wantEnded(t, g, interceptors.Client, twice, ended{failure: 3})
		time.Sleep(time.Second) // the handlers end
		wantEnded(t, g, interceptors.Client, twice, ended{failure: 3})
	})
}

func TestCase08_ContextThatHasEnded(t *testing.T) {
	cancelled := func(ctx context.Context) (context.Context, context.CancelFunc) {
		ctx, cancel := context.WithCancel(ctx)
		cancel()
		return ctx, cancel
	}
	expired := func(ctx context.Context) (context.Context, context.CancelFunc) {
		return context.WithDeadline(ctx, time.Now())
	}
	cases := []struct {
		name string
		end  func(context.Context) (context.Context, context.CancelFunc)
		want codes.Code
	}{
		{"cancelled", cancelled, codes.Canceled},
		{"expired", expired, codes.DeadlineExceeded},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			eachArm(t, func(t *testing.T, a arm) {
				g := mustGuard(t, a.side+`: {rules: [{methods: ['*'],
					breaker: {request_volume_threshold: 1, sleep_window: 1s},
					rate_limit: {requests_per_second: 0.001, burst: 2},
					concurrency_limit: {max_in_flight: 1, max_streams: 1}}]}`)
				if err := a.byHand(t.Context(), g, func(context.Context) error { return status.Error(codes.Unavailable, "") }); err == nil {
					t.Fatal("no error")
				}
				time.Sleep(time.Second) // the next call is a probe
				before := a.state(t, g)

				ctx, cancel := c.end(t.Context())
				defer cancel()
				err := a.byHand(ctx, g, func(context.Context) error { t.Error("the call was made"); return nil })
				if status.Code(err) != c.want {
					t.Errorf("%v, want %v", err, c.want)
				}
				after := a.state(t, g)
				if after.Counts.Admitted != before.Counts.Admitted || len(after.Counts.Rejected) != 0 {
					t.Errorf("counted: %+v", after.Counts)
				}
				if after.RateLimit.Available != before.RateLimit.Available {
					t.Errorf("%v tokens are left of %v", after.RateLimit.Available, before.RateLimit.Available)
				}
				wantState(t, g, a.sideOf(), a.method, "open")
				if err := a.byHand(t.Context(), g, func(context.Context) error { return nil }); err != nil {
					t.Errorf("the probe: %v", err)
				}
				wantState(t, g, a.sideOf(), a.method, "closed")
				checkIdle(t, g)
			})
		})
	}
}

func TestCase10_WaitForReadyDoesNotWaitForTheBreaker(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		if a.side == "server" {
			t.Skip("an option of client calls")
		}
		g, conn := a.setup(t, "breaker: {request_volume_threshold: 1}", script())
		if err := a.call(t.Context(), conn, "UNAVAILABLE"); err == nil {
			t.Fatal("no error")
		}
		began := time.Now()
		err := a.call(t.Context(), conn, "", grpc.WaitForReady(true))
		if !errors.Is(err, interceptors.ErrBreakerOpen) {
			t.Errorf("%v, want a rejection by the breaker", err)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("the rejection took %v", took)
		}
		checkIdle(t, g)
	})
}

func TestCase10_WaitForReadyWithoutBackend(t *testing.T) {
	cases := []struct {
		name     string
		deadline time.Duration
		want     ended
	}{
		{"long", time.Second, ended{failure: 1}},
		{"shorter than min_deadline", 49 * time.Millisecond, ended{neutral: 1}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			eachArm(t, func(t *testing.T, a arm) {
				if a.side == "server" {
					t.Skip("an option of client calls")
				}
				lis := rpctest.Listen()
				if err := lis.Close(); err != nil {
					t.Fatal(err)
				}
				g := mustGuard(t, "client: {rules: [{methods: ['*'], breaker: {}, concurrency_limit: {max_in_flight: 1, max_streams: 1}}]}")
				conn := rpctest.Dial(t, lis, g.DialOptions()...)
				ctx, cancel := context.WithTimeout(t.Context(), c.deadline)
				defer cancel()
				began := time.Now()
				if err := a.call(ctx, conn, "", grpc.WaitForReady(true)); status.Code(err) != codes.DeadlineExceeded {
					t.Errorf("%v, want DEADLINE_EXCEEDED", err)
				}
				if took := time.Since(began); took != c.deadline {
					t.Errorf("it took %v, want %v", took, c.deadline)
				}
				synctest.Wait()
				wantEnded(t, g, interceptors.Client, a.method, c.want)
			})
		})
	}
}
