package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// touchy opens at the fourth failure in ten seconds, for one second.
const touchy = "breaker: {request_volume_threshold: 4, sleep_window: 1s}, concurrency_limit: {max_in_flight: 50, max_streams: 50}"

// trip fails calls until the breaker is open.
func (a arm) trip(t *testing.T, g *interceptors.Guard, conn grpc.ClientConnInterface) {
	t.Helper()
	for range 4 {
		if err := a.call(t.Context(), conn, "UNAVAILABLE"); status.Code(err) != codes.Unavailable {
			t.Fatalf("%v, want UNAVAILABLE", err)
		}
	}
	a.wantState(t, g, "open")
}

func (a arm) wantState(t *testing.T, g *interceptors.Guard, want string) {
	t.Helper()
	synctest.Wait()
	wantState(t, g, a.sideOf(), a.method, want)
}

// must makes a call that succeeds.
func (a arm) must(t *testing.T, conn grpc.ClientConnInterface, text string) {
	t.Helper()
	if err := a.call(t.Context(), conn, text); err != nil {
		t.Fatalf("call %q: %v", text, err)
	}
}

// mustNot makes a call that the breaker rejects.
func (a arm) mustNot(t *testing.T, conn grpc.ClientConnInterface) {
	t.Helper()
	if err := a.call(t.Context(), conn, ""); reasonOf(err) != interceptors.ReasonBreakerOpen {
		t.Fatalf("%v, want a rejection by the breaker", err)
	}
}

func TestCase14_StaleResults(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		g, conn := a.setup(t, touchy, script())
		success := a.start(t.Context(), conn, "500ms")
		failure := a.start(t.Context(), conn, "3s UNAVAILABLE")
		a.trip(t, g, conn)
		pass(501 * time.Millisecond)
		if !success.ended() || success.result().err != nil {
			t.Fatalf("ended %v: %v", success.ended(), success.result().err)
		}
		a.wantState(t, g, "open") // a success from before the opening does not close
		a.mustNot(t, conn)
		time.Sleep(time.Second)
		a.must(t, conn, "")
		a.wantState(t, g, "closed")
		for range 3 { // one failure fewer than it takes
			_ = a.call(t.Context(), conn, "UNAVAILABLE")
		}
		pass(2 * time.Second)
		if !failure.ended() || failure.result().err == nil {
			t.Fatalf("ended %v: %v", failure.ended(), failure.result().err)
		}
		a.wantState(t, g, "closed") // nor does a failure from before it open
		if b := a.state(t, g).Breaker; b.Failures != 3 {
			t.Errorf("%d failures in the window, want 3", b.Failures)
		}
		wantEnded(t, g, a.sideOf(), a.method, ended{success: 2, failure: 8})
	})
}

// strict opens at the first failure.
const strict = "breaker: {request_volume_threshold: 1, error_percent_threshold: 1}"

func TestCase15_WhatNeverOpens(t *testing.T) {
	kinds := []struct {
		name     string
		err      error
		deadline time.Duration
		cancel   bool // by the caller, while the call runs
		neutral  bool
	}{
		{"NotFound", status.Error(codes.NotFound, ""), time.Minute, false, false},
		{"InvalidArgument", status.Error(codes.InvalidArgument, ""), time.Minute, false, false},
		{"Canceled", status.Error(codes.Canceled, ""), time.Minute, true, true},
		{"cancelled, whatever the code", status.Error(codes.Unavailable, ""), time.Minute, true, true},
		{"1 ms deadline", status.Error(codes.DeadlineExceeded, ""), time.Millisecond, false, true},
		{"own rejection", &interceptors.RejectedError{Reason: interceptors.ReasonBreakerOpen}, time.Minute, false, true},
		{"own rejection, wrapped", fmt.Errorf("stock: %w", &interceptors.RejectedError{Reason: interceptors.ReasonRateLimited}), time.Minute, false, true},
	}
	eachArm(t, func(t *testing.T, a arm) {
		g := mustGuard(t, a.side+": {rules: [{methods: ['*'], "+strict+"}]}")
		var want ended
		for i := range 10_000 {
			k := kinds[i%len(kinds)]
			ctx, cancel := context.WithTimeout(t.Context(), k.deadline)
			err := a.byHand(ctx, g, func(context.Context) error {
				if k.cancel {
					cancel()
				}
				return k.err
			})
			cancel()
			if err == nil || a.state(t, g).Breaker.State != "closed" {
				t.Fatalf("%s: %v, %+v", k.name, err, *a.state(t, g).Breaker)
			}
			if k.neutral {
				want.neutral++
			} else {
				want.success++
			}
		}
		wantEnded(t, g, a.sideOf(), a.method, want)
	})
}

func TestCase15_OwnRejectionsAreNotCounted(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		g := mustGuard(t, a.side+": {rules: [{methods: ['*'], "+strict+"}]}")
		call := func(result error) error {
			return a.byHand(t.Context(), g, func(context.Context) error { return result })
		}
		_ = call(status.Error(codes.Unavailable, ""))
		for range 10_000 {
			if err := call(nil); !errors.Is(err, interceptors.ErrBreakerOpen) {
				t.Fatal(err)
			}
		}
		time.Sleep(5 * time.Second) // the rejections have not made it any longer
		if err := call(nil); err != nil {
			t.Error(err)
		}
		a.wantState(t, g, "closed")
		if n := a.state(t, g).Counts.Rejected[interceptors.ReasonBreakerOpen]; n != 10_000 {
			t.Errorf("%d rejections, want 10,000", n)
		}
		wantEnded(t, g, a.sideOf(), a.method, ended{success: 1, failure: 1})
	})
}

func TestCase15_MessagesThatCannotBeSent(t *testing.T) {
	const invalid, tooLarge = "\xff", 1 << 10
	for name, text := range map[string]string{"invalid UTF-8": invalid, "too large": strings.Repeat("x", 2*tooLarge)} {
		t.Run(name, func(t *testing.T) {
			eachArm(t, func(t *testing.T, a arm) {
				if a.side == "server" {
					t.Skip("of clients")
				}
				g, conn := a.setup(t, "breaker: {request_volume_threshold: 1, failure_codes: [RESOURCE_EXHAUSTED, INTERNAL]}", script())
				for range 100 {
					if a.unary() {
						if _, err := rpctest.Call(t.Context(), conn, a.method, text, grpc.MaxCallSendMsgSize(tooLarge)); err == nil {
							t.Fatal("it was sent")
						}
						continue
					}
					s, err := rpctest.Open(t.Context(), conn, a.method, grpc.MaxCallSendMsgSize(tooLarge))
					if err != nil {
						t.Fatal(err)
					}
					if err := rpctest.Send(s, text); err == nil {
						t.Fatal("it was sent")
					}
				}
				a.wantState(t, g, "closed")
				wantEnded(t, g, interceptors.Client, a.method, ended{neutral: 100})
			})
		})
	}
}

func TestCase15_MessagesThatAreTooLarge(t *testing.T) {
	const limit = 1 << 10
	limits := map[string]struct {
		server []grpc.ServerOption
		dial   []grpc.DialOption
	}{
		"to send":                {nil, []grpc.DialOption{grpc.WithDefaultCallOptions(grpc.MaxCallSendMsgSize(limit))}},
		"for the server":         {[]grpc.ServerOption{grpc.MaxRecvMsgSize(limit)}, nil},
		"for the server to send": {[]grpc.ServerOption{grpc.MaxSendMsgSize(limit)}, nil},
		"to receive":             {nil, []grpc.DialOption{grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(limit))}},
	}
	const resourceExhausted = "{rules: [{methods: ['*'], breaker: {request_volume_threshold: 1, failure_codes: [RESOURCE_EXHAUSTED]}}]}"
	for name, l := range limits {
		for _, a := range arms[:2] { // the same guard is on the server
			t.Run(name+" "+a.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					g := mustGuard(t, "{client: "+resourceExhausted+", server: "+resourceExhausted+"}")
					conn := rpctest.Start(t, script(), g.ServerOptions(l.server...), g.DialOptions(l.dial...))
					for range 5 {
						if err := a.call(t.Context(), conn, strings.Repeat("x", 2*limit)); status.Code(err) != codes.ResourceExhausted {
							t.Fatal(err)
						}
					}
					a.must(t, conn, "")
					synctest.Wait()
					wantEnded(t, g, interceptors.Client, a.method, ended{success: 1, neutral: 5})
					for _, m := range g.Snapshot().Methods {
						if m.Breaker.State != "closed" || m.Counts.Failure != 0 {
							t.Errorf("%v: %+v, %+v", m.Side, *m.Breaker, m.Counts)
						}
					}
				})
			})
		}
	}
}

func TestCase15_RejectionByAGuardFurtherDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// front calls back; the client guard in front rejects, and its handler passes
		// that on. Nothing is wrong with front.
		down := mustGuard(t, "client: {rules: [{methods: ['*'], "+strict+"}]}")
		back := rpctest.Start(t, script(), nil, down.DialOptions())
		front := &rpctest.Service{Unary: func(ctx context.Context, req *rpctest.Message) (*rpctest.Message, error) {
			_, err := rpctest.Call(ctx, back, rpctest.Unary, "UNAVAILABLE")
			if errors.Is(err, interceptors.ErrBreakerOpen) {
				return nil, fmt.Errorf("back: %w", err)
			}
			return req, nil
		}}
		g := mustGuard(t, "server: {rules: [{methods: ['*'], "+strict+"}]}")
		conn := rpctest.Start(t, front, g.ServerOptions(), nil)
		if _, err := rpctest.Call(t.Context(), conn, rpctest.Unary, ""); err != nil {
			t.Fatal(err) // it tripped the breaker to back
		}
		for range 100 {
			if _, err := rpctest.Call(t.Context(), conn, rpctest.Unary, ""); reasonOf(err) != interceptors.ReasonBreakerOpen {
				t.Fatal(err)
			}
		}
		wantState(t, g, interceptors.Server, rpctest.Unary, "closed")
		wantEnded(t, g, interceptors.Server, rpctest.Unary, ended{success: 1, neutral: 100})
	})
}

func TestCase16_BackendOfOpenStreamsDies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, "{client: {rules: [{methods: ['*'], breaker: {}}]}, server: {rules: [{methods: ['*'], breaker: {}}]}}")
		srv, lis := rpctest.NewServer(script(), g.ServerOptions()...), rpctest.Listen()
		served := make(chan error)
		go func() { served <- srv.Serve(lis) }()
		conn := rpctest.Dial(t, lis, g.DialOptions()...)
		errs := make(chan error)
		for range 100 {
			s := streamOpen(t, t.Context(), conn, rpctest.Bidi, "hang")
			go func() {
				_, err := rpctest.Recv(s)
				errs <- err
			}()
		}
		synctest.Wait()
		srv.Stop()
		for range 100 {
			if err := <-errs; status.Code(err) != codes.Unavailable {
				t.Errorf("%v, want UNAVAILABLE", err)
			}
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
		synctest.Wait()
		wantState(t, g, interceptors.Client, rpctest.Bidi, "open")
		wantEnded(t, g, interceptors.Client, rpctest.Bidi, ended{failure: 100})
		wantEnded(t, g, interceptors.Server, rpctest.Bidi, ended{neutral: 100}) // it was the callers that went
	})
}

func TestCase18_TimeAndTheWindow(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		g, conn := a.setup(t, touchy, script())
		fail := func(n int) {
			for range n {
				if err := a.call(t.Context(), conn, "UNAVAILABLE"); reasonOf(err) != "" {
					t.Fatal(err)
				}
			}
		}
		fail(3)
		time.Sleep(10 * time.Second) // the window has moved on
		fail(3)
		a.wantState(t, g, "closed")
		time.Sleep(8900 * time.Millisecond) // they are just in it still
		fail(1)
		a.wantState(t, g, "open")

		time.Sleep(1000 * time.Hour)
		a.wantState(t, g, "open") // until a call comes
		a.must(t, conn, "")
		a.wantState(t, g, "closed")
		fail(3)
		time.Sleep(1000 * time.Hour)
		fail(3)
		a.wantState(t, g, "closed")
		fail(1)
		a.wantState(t, g, "open")
		checkIdle(t, g)
	})
}

func TestOpenBreakerSpendsNothing(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		g, conn := a.setup(t, "breaker: {request_volume_threshold: 4}, rate_limit: {requests_per_second: 0.001, burst: 5}", script())
		a.trip(t, g, conn)
		before := a.state(t, g).RateLimit.Available
		a.mustNot(t, conn)
		if after := a.state(t, g).RateLimit.Available; after < before {
			t.Errorf("%v tokens are left of %v", after, before)
		}
		checkIdle(t, g)
	})
}

func TestSlowCalls(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		g, conn := a.setup(t, "breaker: {request_volume_threshold: 2, slow_call_threshold: 100ms, slow_call_percent_threshold: 50}", script())
		a.must(t, conn, "99ms")
		a.must(t, conn, "99ms")
		a.wantState(t, g, "closed")
		a.must(t, conn, "100ms")
		a.must(t, conn, "100ms")
		if a.unary() {
			a.wantState(t, g, "open")
		} else { // a stream may take its time
			a.wantState(t, g, "closed")
		}
		wantEnded(t, g, a.sideOf(), a.method, ended{success: 4})
	})
}

func TestWaitingIsNotSlowness(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		g, conn := a.setup(t, `breaker: {request_volume_threshold: 1, slow_call_threshold: 100ms, slow_call_percent_threshold: 1},
			concurrency_limit: {max_in_flight: 1, max_streams: 1, max_queue: 3}`, script())
		for range 4 {
			a.start(t.Context(), conn, "99ms")
		}
		pass(time.Second)
		a.wantState(t, g, "closed")
		wantEnded(t, g, a.sideOf(), a.method, ended{success: 4})
	})
}

// tellsLate is a stream whose SendMsg returns after all others have been told.
type tellsLate struct{ grpc.ClientStream }

func (s tellsLate) SendMsg(m any) error {
	err := s.ClientStream.SendMsg(m)
	time.Sleep(time.Second)
	return err
}

// gRPC tells the RecvMsg that waits of a message that could not be marshalled.
func TestCase15_UnsendableWhileReceiving(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		late := func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			s, err := streamer(ctx, desc, cc, method, opts...)
			return tellsLate{s}, err
		}
		g, conn := clientStreams(t, oneStream, grpc.WithChainStreamInterceptor(late))
		s := streamOpen(t, t.Context(), conn, rpctest.Bidi, "10s UNAVAILABLE")
		received := make(chan error)
		go func() { _, err := rpctest.Recv(s); received <- err }()
		synctest.Wait()
		go func() { _ = s.SendMsg("not a message") }()
		if err := <-received; status.Code(err) != codes.Internal {
			t.Fatal(err)
		}
		wantEnded(t, g, interceptors.Client, rpctest.Bidi, ended{neutral: 1})
		time.Sleep(time.Minute)
		wantEnded(t, g, interceptors.Client, rpctest.Bidi, ended{neutral: 1})
	})
}
