package interceptors_test

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

func TestCase11_ProbeCancelledByItsCaller(t *testing.T) {
	ends := map[string]func(context.Context) (context.Context, context.CancelFunc){
		"cancelled": context.WithCancel,
		"with too short a time": func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, time.Millisecond)
		},
	}
	for name, start := range ends {
		t.Run(name, func(t *testing.T) {
			eachArm(t, func(t *testing.T, a arm) {
				g, conn := a.setup(t, touchy, script())
				a.trip(t, g, conn)
				time.Sleep(time.Second)
				ctx, cancel := start(t.Context())
				probe := a.start(ctx, conn, "hang")
				a.wantState(t, g, "half_open")
				a.mustNot(t, conn) // the slot is taken
				cancel()
				pass(time.Millisecond)
				if !probe.ended() {
					t.Fatal("the probe still runs")
				}
				a.wantState(t, g, "half_open")
				a.must(t, conn, "")
				a.wantState(t, g, "closed")
				wantEnded(t, g, a.sideOf(), a.method, ended{success: 1, failure: 4, neutral: 1})
			})
		})
	}
}

func TestCase12_FirstMessageOfAStreamIsTheVerdict(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		if a.unary() {
			t.Skip("of streams")
		}
		g, conn := a.setup(t, touchy, script())
		a.trip(t, g, conn)
		time.Sleep(time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		probe := streamOpen(t, ctx, conn, a.method, "100ms")
		a.wantState(t, g, "half_open")
		if _, err := rpctest.Recv(probe); err != nil {
			t.Fatal(err)
		}
		a.wantState(t, g, "closed")
		if held := a.held(t, g); held != 1 {
			t.Errorf("%d permits are out, want the probe's: it is still open", held)
		}
		time.Sleep(time.Hour)

		// Its end is counted, but no news to the breaker.
		if err := rpctest.Send(probe, "UNAVAILABLE"); err != nil {
			t.Fatal(err)
		}
		if _, err := rpctest.Recv(probe); status.Code(err) != codes.Unavailable {
			t.Fatal(err)
		}
		if b := a.state(t, g).Breaker; b.Requests != 0 {
			t.Errorf("the breaker has counted the stream a second time: %+v", *b)
		}
		wantEnded(t, g, a.sideOf(), a.method, ended{failure: 5})
	})
}

func TestCase12_AStreamIsOneProbe(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		if a.unary() {
			t.Skip("of streams")
		}
		g, conn := a.setup(t, "breaker: {request_volume_threshold: 4, sleep_window: 1s, half_open_probes: 2}", script())
		a.trip(t, g, conn)
		time.Sleep(time.Second)
		a.must(t, conn, "") // a message, and the end
		a.wantState(t, g, "half_open")
		a.must(t, conn, "")
		a.wantState(t, g, "closed")
		wantEnded(t, g, a.sideOf(), a.method, ended{success: 2, failure: 4})
	})
}

func TestCase12_FirstMessageAndTheEndAtOnce(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		if a.unary() {
			t.Skip("of streams")
		}
		g, conn := a.setup(t, "breaker: {request_volume_threshold: 4, sleep_window: 1s}", script())
		for range 50 {
			a.trip(t, g, conn)
			time.Sleep(time.Second)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond) // too short to count
			probe := streamOpen(t, ctx, conn, a.method, "10ms")
			_, _ = rpctest.Recv(probe)
			cancel()
			if a.state(t, g).Breaker.State == "half_open" { // the end was first: no verdict
				a.must(t, conn, "")
			}
			a.wantState(t, g, "closed")
			checkIdle(t, g)
		}
	})
}

// racedStream ends by its context while its first message arrives.
type racedStream struct {
	grpc.ClientStream
	ctx      context.Context
	onFinish func(error)
	judging  chan struct{} // closed while the end is being judged
}

func (s *racedStream) RecvMsg(any) error {
	<-s.ctx.Done()
	go s.onFinish(status.FromContextError(s.ctx.Err()).Err())
	<-s.judging
	return nil
}

func TestCase12_EndBeforeTheFirstMessageIsTheVerdict(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		judging, received := make(chan struct{}), make(chan struct{})
		classifier := func(_ context.Context, _ interceptors.Side, _ string, err error) interceptors.Outcome {
			if status.Code(err) == codes.DeadlineExceeded {
				close(judging)
				<-received
			}
			return interceptors.Failure
		}
		g := mustGuard(t, "client: {rules: [{methods: ['*'], "+strict+"}]}", interceptors.WithClassifier(classifier))
		a := arms[1]
		_ = a.byHand(t.Context(), g, func(context.Context) error { return status.Error(codes.Unavailable, "") })
		time.Sleep(5 * time.Second)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		s, err := g.StreamClientInterceptor()(ctx, rpctest.StreamDesc(a.method), nil, a.method,
			func(ctx context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, _ string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
				return &racedStream{ctx: ctx, onFinish: opts[0].(grpc.OnFinishCallOption).OnFinish, judging: judging}, nil
			})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.RecvMsg(nil); err != nil {
			t.Fatal(err)
		}
		a.wantState(t, g, "half_open") // the message came too late
		close(received)
		a.wantState(t, g, "open")
		wantEnded(t, g, interceptors.Client, a.method, ended{failure: 2})
	})
}

func TestCase12_ProbeThatNeverEnds(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		g, conn := a.setup(t, touchy, script())
		a.trip(t, g, conn)
		time.Sleep(time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		lost := a.start(ctx, conn, "hang")
		time.Sleep(time.Second - 2*time.Millisecond)
		a.mustNot(t, conn)
		time.Sleep(2 * time.Millisecond) // its lease is over
		a.must(t, conn, "")
		a.wantState(t, g, "closed")
		if lost.ended() {
			t.Error("the first probe was ended")
		}
		cancel()
		synctest.Wait()
		wantEnded(t, g, a.sideOf(), a.method, ended{success: 1, failure: 4, neutral: 1})
	})
}

func TestCase12_ServerSlowerThanTheLease(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		g, conn := a.setup(t, touchy, script())
		a.trip(t, g, conn)
		time.Sleep(time.Second)
		const slow = "2500ms" // the lease is 1s
		first := a.start(t.Context(), conn, slow)
		time.Sleep(time.Second)
		a.start(t.Context(), conn, slow)
		time.Sleep(time.Second)
		a.mustNot(t, conn) // at most two
		a.wantState(t, g, "half_open")
		pass(501 * time.Millisecond)
		if !first.ended() || first.result().err != nil {
			t.Fatalf("ended %v: %v", first.ended(), first.result().err)
		}
		a.wantState(t, g, "closed")
		pass(time.Second)
		wantEnded(t, g, a.sideOf(), a.method, ended{success: 2, failure: 4})
	})
}

func TestCase13_ProbeRejectedByAnotherGate(t *testing.T) {
	gates := map[string]struct {
		blocks string
		reason interceptors.Reason
	}{
		"rate limit":        {"rate_limit: {requests_per_second: 0.5, burst: 4}", interceptors.ReasonRateLimited},
		"concurrency limit": {"concurrency_limit: {max_in_flight: 1, scope: rule}", interceptors.ReasonConcurrencyLimited},
	}
	for name, gate := range gates {
		t.Run(name, func(t *testing.T) {
			eachArm(t, func(t *testing.T, a arm) {
				g, conn := a.setup(t, "breaker: {request_volume_threshold: 4, sleep_window: 1s}, "+gate.blocks, script())
				a.trip(t, g, conn)
				time.Sleep(time.Second)
				other := arm{side: a.side, method: rpctest.Other}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				other.start(ctx, conn, "hang") // takes the only place
				if err := a.call(t.Context(), conn, ""); reasonOf(err) != gate.reason {
					t.Fatalf("%v, want %s", err, gate.reason)
				}
				a.wantState(t, g, "open") // and ready
				cancel()
				time.Sleep(time.Second)
				a.must(t, conn, "")
				a.wantState(t, g, "closed")
				wantEnded(t, g, a.sideOf(), a.method, ended{success: 1, failure: 4})
			})
		})
	}
}

// answeringStream answers at once.
type answeringStream struct {
	grpc.ClientStream
	onFinish func(error)
}

func (*answeringStream) RecvMsg(any) error { return nil }

// hook is a slog.Handler that calls a function at one message.
type hook struct {
	slog.Handler
	at string
	f  func()
}

func (hook) Enabled(context.Context, slog.Level) bool { return true }

func (h hook) Handle(_ context.Context, r slog.Record) error {
	if r.Message == h.at {
		h.f()
	}
	return nil
}

// In real time: a goroutine that waits for a lock stops the time of a bubble.
func TestCase12_LoggerOfTheVerdictMayWaitForTheStreamsEnd(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	inner, logged := new(answeringStream), false
	logger := slog.New(hook{at: "circuit breaker closed", f: func() {
		logged = true
		cancel()
		over := make(chan struct{})
		go func() { inner.onFinish(status.FromContextError(ctx.Err()).Err()); close(over) }()
		select {
		case <-over:
		case <-time.After(10 * time.Second):
			t.Error("the stream's end waits for the logger")
		}
	}})
	g := mustGuard(t, "client: {rules: [{methods: ['*'], breaker: {request_volume_threshold: 1, sleep_window: 1ms}, concurrency_limit: {max_streams: 1}}]}", interceptors.WithLogger(logger))
	open := func(result error) (grpc.ClientStream, error) {
		return g.StreamClientInterceptor()(ctx, rpctest.StreamDesc(rpctest.Bidi), nil, rpctest.Bidi,
			func(_ context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, _ string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
				inner.onFinish = opts[0].(grpc.OnFinishCallOption).OnFinish
				return inner, result
			})
	}
	if _, err := open(status.Error(codes.Unavailable, "")); err == nil {
		t.Fatal("no error")
	}
	s, err := open(nil)
	for errors.Is(err, interceptors.ErrBreakerOpen) {
		time.Sleep(time.Millisecond)
		s, err = open(nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := s.RecvMsg(nil); err != nil || !logged {
		t.Errorf("%v, logged %v", err, logged)
	}
	wantState(t, g, interceptors.Client, rpctest.Bidi, "closed")
	wantEnded(t, g, interceptors.Client, rpctest.Bidi, ended{failure: 1, neutral: 1})
}
