package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

var (
	oneSuccess = ended{success: 1}
	oneFailure = ended{failure: 1}
	oneNeutral = ended{neutral: 1}
	oneDropped = ended{dropped: 1}
)

// failed is a status with details.
func failed(code codes.Code, details ...protoadapt.MessageV1) error {
	st, err := status.New(code, "").WithDetails(details...)
	if err != nil {
		panic(err)
	}
	return st.Err()
}

// fromPeer is a rejection as it comes over the wire.
func fromPeer(reason interceptors.Reason) error {
	e := &interceptors.RejectedError{Side: interceptors.Server, Method: rpctest.Unary, Reason: reason, RetryAfter: time.Second}
	return status.FromProto(e.GRPCStatus().Proto()).Err()
}

// mute is an error whose Error method panics.
type mute struct{}

func (mute) Error() string { panic("boom") }

// A row of TestOutcome: a call that ended with err.
type outcomeCase struct {
	name     string
	blocks   string // default: breaker: {}
	err      error
	deadline time.Duration // that the caller set; 0: none
	cancel   bool          // by the caller, before the call ends
	want     ended
}

func outcomeCases() []outcomeCase {
	retryInfo := &errdetails.RetryInfo{RetryDelay: durationpb.New(time.Second)}
	foreign := &errdetails.ErrorInfo{Domain: "example.com", Reason: string(interceptors.ReasonRateLimited)}
	unknownReason := &errdetails.ErrorInfo{Domain: interceptors.Domain, Reason: "PANIC"}
	garbled := status.FromProto(&spb.Status{Code: int32(codes.Unavailable), Details: []*anypb.Any{
		{TypeUrl: "type.googleapis.com/google.rpc.ErrorInfo", Value: []byte("\xff")}, {TypeUrl: "???"},
	}}).Err()
	const codesOfOwn = "breaker: {failure_codes: [NOT_FOUND, RESOURCE_EXHAUSTED]}"
	late := status.FromContextError(context.DeadlineExceeded).Err()

	cases := []outcomeCase{
		{name: "no error", want: oneSuccess},
		{name: "no error, cancelled", cancel: true, want: oneNeutral},
		{name: "failure, cancelled", err: failed(codes.Unavailable), cancel: true, want: oneNeutral},
		{name: "not a status", err: errors.New("no"), want: oneFailure},
		{name: "wrapped status", err: fmt.Errorf("stock: %w", failed(codes.NotFound)), want: oneSuccess},
		{name: "context error", err: context.DeadlineExceeded, want: oneFailure},
		{name: "wrapped context error", err: fmt.Errorf("db: %w", context.DeadlineExceeded), want: oneFailure},
		{name: "not the caller's cancel", err: context.Canceled, want: oneSuccess},
		{name: "an error that panics", err: mute{}, want: oneFailure},

		{name: "failure_codes, in", blocks: codesOfOwn, err: failed(codes.NotFound), want: oneFailure},
		{name: "failure_codes, not in", blocks: codesOfOwn, err: failed(codes.Unavailable), want: oneSuccess},
		{name: "failure_codes before RetryInfo", blocks: codesOfOwn, err: failed(codes.ResourceExhausted, retryInfo), want: oneFailure},
		{name: "failure_codes, cancelled", blocks: codesOfOwn, err: failed(codes.NotFound), cancel: true, want: oneNeutral},
		{name: "without a breaker, failure", blocks: "concurrency_limit: {max_in_flight: 1}", err: failed(codes.Unavailable), want: oneFailure},
		{name: "without a breaker, success", blocks: "concurrency_limit: {max_in_flight: 1}", err: failed(codes.NotFound), want: oneSuccess},

		{name: "without a breaker, short deadline", blocks: "concurrency_limit: {max_streams: 1}", err: late, deadline: time.Millisecond, want: oneFailure},

		{name: "no deadline", err: late, want: oneFailure},
		{name: "deadline of min_deadline", err: late, deadline: 50 * time.Millisecond, want: oneFailure},
		{name: "deadline below min_deadline", err: late, deadline: 50*time.Millisecond - 1, want: oneNeutral},
		{name: "short deadline, another failure", err: failed(codes.Unavailable), deadline: time.Millisecond, want: oneFailure},
		{name: "min_deadline of the policy", blocks: "breaker: {min_deadline: 1s}", err: late, deadline: 999 * time.Millisecond, want: oneNeutral},
		{name: "no min_deadline", blocks: "breaker: {min_deadline: 0s}", err: late, deadline: time.Nanosecond, want: oneFailure},
		{name: "timeout below min_deadline", blocks: "breaker: {}, timeout: 20ms, stream_timeout: 20ms", err: late, want: oneFailure},
		{name: "stream_timeout below min_deadline", blocks: "breaker: {}, stream_timeout: 20ms", err: late, want: oneFailure},
		{name: "deadline of such a timeout", blocks: "breaker: {}, timeout: 20ms, stream_timeout: 20ms", err: late, deadline: 20 * time.Millisecond, want: oneFailure},
		{name: "deadline below such a timeout", blocks: "breaker: {}, timeout: 20ms, stream_timeout: 20ms", err: late, deadline: 19 * time.Millisecond, want: oneNeutral},

		{name: "RESOURCE_EXHAUSTED", err: failed(codes.ResourceExhausted), want: oneNeutral},
		{name: "failure_codes, RESOURCE_EXHAUSTED", blocks: codesOfOwn, err: failed(codes.ResourceExhausted), want: oneFailure},
		{name: "RESOURCE_EXHAUSTED with RetryInfo", err: failed(codes.ResourceExhausted, retryInfo), want: oneDropped},
		{name: "ABORTED with RetryInfo", err: failed(codes.Aborted, retryInfo), want: oneSuccess},
		{name: "UNAVAILABLE with RetryInfo", err: failed(codes.Unavailable, retryInfo), want: oneFailure},
		{name: "a foreign domain", err: failed(codes.Unavailable, foreign), want: oneFailure},
		{name: "a reason that is no rejection", err: failed(codes.Internal, unknownReason), want: oneFailure},
		{name: "garbled details", err: garbled, want: oneFailure},
	}
	failures := map[codes.Code]bool{codes.Unavailable: true, codes.DeadlineExceeded: true, codes.Internal: true, codes.Unknown: true, codes.DataLoss: true}
	for code := codes.Canceled; code <= codes.Unauthenticated; code++ {
		want := oneSuccess
		if failures[code] {
			want = oneFailure
		} else if code == codes.ResourceExhausted {
			want = oneNeutral
		}
		cases = append(cases, outcomeCase{name: code.String(), err: failed(code), want: want})
	}
	for reason, want := range map[interceptors.Reason]ended{
		interceptors.ReasonRateLimited:        oneDropped,
		interceptors.ReasonConcurrencyLimited: oneDropped,
		interceptors.ReasonQueueTimeout:       oneDropped,
		interceptors.ReasonBreakerOpen:        oneFailure,
		interceptors.ReasonDraining:           oneNeutral,
		interceptors.ReasonBudgetTooSmall:     oneNeutral,
	} {
		own := &interceptors.RejectedError{Reason: reason}
		cases = append(cases,
			outcomeCase{name: "peer's " + string(reason), err: fromPeer(reason), want: want},
			outcomeCase{name: "own " + string(reason), err: own, want: oneNeutral},
			outcomeCase{name: "wrapped " + string(reason), err: fmt.Errorf("stock: %w", own), want: oneNeutral},
			outcomeCase{name: "joined " + string(reason), err: errors.Join(failed(codes.Internal), own), want: oneNeutral})
	}
	return cases
}

func TestOutcome(t *testing.T) {
	for _, c := range outcomeCases() {
		t.Run(c.name, func(t *testing.T) {
			eachArm(t, func(t *testing.T, a arm) {
				if c.blocks == "" {
					c.blocks = "breaker: {}"
				}
				g := mustGuard(t, a.side+": {rules: [{methods: ['*'], "+c.blocks+"}]}")
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if c.deadline > 0 {
					ctx, cancel = context.WithTimeout(ctx, c.deadline)
					defer cancel()
				}
				_ = a.byHand(ctx, g, func(context.Context) error {
					if c.cancel {
						cancel()
					}
					return c.err
				})
				wantEnded(t, g, a.sideOf(), a.method, c.want)
				if b := a.state(t, g).Breaker; b != nil && (b.Failures != c.want.failure || b.Requests != c.want.success+c.want.failure) {
					t.Errorf("the breaker has counted %+v", *b)
				}
			})
		})
	}
}

func TestOutcomeOfACancelNearTheDeadline(t *testing.T) {
	const deadline = 100 * time.Millisecond
	for _, tt := range []struct {
		early time.Duration // before the deadline
		min   string        // min_deadline
		want  ended
	}{
		{time.Nanosecond, "50ms", oneFailure}, // the client's reset, of the same deadline
		{20 * time.Millisecond, "50ms", oneFailure},
		{20*time.Millisecond + 1, "50ms", oneNeutral},
		{deadline - 1, "50ms", oneNeutral},     // no sooner: it must be admitted
		{time.Nanosecond, "101ms", oneNeutral}, // it never had a chance
	} {
		t.Run(fmt.Sprint(tt.early, " ", tt.min), func(t *testing.T) {
			eachServerArm(t, func(t *testing.T, a arm) {
				g := mustGuard(t, "server: {rules: [{methods: ['*'], breaker: {min_deadline: "+tt.min+"}}]}")
				ctx, cancel := context.WithTimeout(t.Context(), deadline)
				time.AfterFunc(deadline-tt.early, cancel)
				_ = a.byHand(ctx, g, func(ctx context.Context) error {
					<-ctx.Done()
					return status.FromContextError(ctx.Err()).Err()
				})
				wantEnded(t, g, a.sideOf(), a.method, tt.want)
			})
		})
	}
}

func TestClassifierHasTheFinalWord(t *testing.T) {
	for want, outcome := range map[ended]interceptors.Outcome{
		oneSuccess: interceptors.Success, oneFailure: interceptors.Failure,
		oneNeutral: interceptors.Neutral, oneDropped: interceptors.Dropped,
	} {
		for _, err := range []error{failed(codes.Unavailable), failed(codes.NotFound), fromPeer(interceptors.ReasonRateLimited), errors.New("no")} {
			eachArm(t, func(t *testing.T, a arm) {
				classifier := func(ctx context.Context, side interceptors.Side, method string, got error) interceptors.Outcome {
					if ctx == nil || side != a.sideOf() || method != a.method || got != err {
						t.Errorf("asked about %v %s: %v", side, method, got)
					}
					return outcome
				}
				g := mustGuard(t, a.side+": {rules: [{methods: ['*'], breaker: {}}]}", interceptors.WithClassifier(classifier))
				_ = a.byHand(t.Context(), g, func(context.Context) error { return err })
				wantEnded(t, g, a.sideOf(), a.method, want)
			})
		}
	}
}

func TestClassifierIsNotAsked(t *testing.T) {
	cases := []struct {
		name string
		f    func(cancel func()) error
		want ended
	}{
		{"no error", func(func()) error { return nil }, oneSuccess},
		{"cancelled", func(cancel func()) error { cancel(); return failed(codes.Unavailable) }, oneNeutral},
		{"own rejection", func(func()) error { return &interceptors.RejectedError{Reason: interceptors.ReasonBreakerOpen} }, oneNeutral},
		{"panic", func(func()) error { panic("boom") }, oneFailure},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			eachArm(t, func(t *testing.T, a arm) {
				g := mustGuard(t, a.side+": {rules: [{methods: ['*'], breaker: {}}]}", interceptors.WithClassifier(
					func(context.Context, interceptors.Side, string, error) interceptors.Outcome {
						t.Error("it was asked")
						return interceptors.Dropped
					}))
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				survive(func() { _ = a.byHand(ctx, g, func(context.Context) error { return c.f(cancel) }) })
				wantEnded(t, g, a.sideOf(), a.method, c.want)
			})
		})
	}
}

func TestClassifierOutOfRangeIsIgnored(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		g := mustGuard(t, a.side+": {rules: [{methods: ['*'], breaker: {}}]}", interceptors.WithClassifier(
			func(context.Context, interceptors.Side, string, error) interceptors.Outcome { return 4 }))
		_ = a.byHand(t.Context(), g, func(context.Context) error { return failed(codes.Unavailable) })
		wantEnded(t, g, a.sideOf(), a.method, oneFailure)
	})
}

func TestOutcomeOfAPeersRejection(t *testing.T) {
	for _, a := range arms[:2] { // of a client, over the wire
		t.Run(a.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := mustGuard(t, `{client: {rules: [{methods: ['*'], breaker: {request_volume_threshold: 1}}]},
					server: {rules: [{methods: ['*'], rate_limit: {requests_per_second: 1, burst: 1}}]}}`)
				conn := rpctest.Start(t, script(), g.ServerOptions(), g.DialOptions())
				a.must(t, conn, "")
				if err := a.call(t.Context(), conn, ""); reasonOf(err) != interceptors.ReasonRateLimited {
					t.Error(err)
				}
				wantEnded(t, g, interceptors.Client, a.method, ended{success: 1, dropped: 1})
				wantEnded(t, g, interceptors.Server, a.method, ended{success: 1})
			})
		})
	}
}

func TestOutcomeOfAPushback(t *testing.T) {
	for _, a := range arms[:2] {
		t.Run(a.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				shedding := bothKinds(func(ctx context.Context, text string) error {
					var code codes.Code
					if err := code.UnmarshalJSON([]byte(text)); err != nil {
						return err
					}
					return errors.Join(grpc.SetTrailer(ctx, metadata.Pairs(pushbackTrailer, "10")), status.Error(code, ""))
				})
				g, conn := a.setup(t, "breaker: {}", shedding)
				for _, code := range []string{`"RESOURCE_EXHAUSTED"`, `"UNAVAILABLE"`} {
					if err := a.call(t.Context(), conn, code); err == nil {
						t.Error("no error")
					}
				}
				want := ended{dropped: 1, failure: 1}
				if a.unary() { // its trailer is out of an interceptor's reach
					want = ended{neutral: 1, failure: 1}
				}
				wantEnded(t, g, interceptors.Client, a.method, want)
			})
		})
	}
}

func TestOutcomeOfAClosedChannel(t *testing.T) {
	for _, a := range arms[:2] {
		for _, draining := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, server draining %v", a.name, draining), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					g := mustGuard(t, "client: {rules: [{methods: ['*'], "+strict+"}]}")
					srv, lis := rpctest.NewServer(script()), rpctest.Listen()
					served := make(chan error)
					go func() { served <- srv.Serve(lis) }()
					conn := rpctest.Dial(t, lis, g.DialOptions()...)
					running := a.start(t.Context(), conn, "hang")
					if draining { // after a GOAWAY, gRPC has another error
						go srv.GracefulStop()
						synctest.Wait()
					}
					if err := conn.Close(); err != nil {
						t.Fatal(err)
					}
					synctest.Wait()
					if running.result().err == nil {
						t.Error("no error")
					}
					if err := a.call(t.Context(), conn, ""); err == nil {
						t.Error("a call on a closed channel")
					}
					wantEnded(t, g, interceptors.Client, a.method, ended{neutral: 2})
					srv.Stop()
					if err := <-served; err != nil {
						t.Error(err)
					}
				})
			})
		}
	}
}

func TestOutcomeOfSendMsg(t *testing.T) {
	const twoAttempts = `{"methodConfig": [{"name": [{}], "retryPolicy": {
		"maxAttempts": 2, "initialBackoff": "1s", "maxBackoff": "1s", "backoffMultiplier": 1, "retryableStatusCodes": ["UNAVAILABLE"]}}]}`
	down := &rpctest.Service{Stream: func(grpc.ServerStream) error { return status.Error(codes.Unavailable, "") }}
	cases := []struct {
		name     string
		deadline time.Duration
		want     ended
	}{
		{"all attempts have failed", time.Minute, oneFailure},
		{"deadline during the backoff", 500 * time.Millisecond, oneFailure},
		{"short deadline during the backoff", 20 * time.Millisecond, oneNeutral},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := mustGuard(t, "client: {rules: [{methods: ['*'], "+oneStream+"}]}")
				conn := rpctest.Start(t, down, nil, g.DialOptions(grpc.WithDefaultServiceConfig(twoAttempts)))
				ctx, cancel := context.WithTimeout(t.Context(), c.deadline)
				defer cancel()
				s, err := rpctest.Open(ctx, conn, rpctest.Bidi)
				for err == nil {
					synctest.Wait()
					err = rpctest.Send(s, "")
				}
				if err == io.EOF {
					t.Fatal("Send left the status for Recv: the test proves nothing")
				}
				synctest.Wait()
				wantEnded(t, g, interceptors.Client, rpctest.Bidi, c.want)
			})
		})
	}
}

func TestOutcomeOfASendWhoseRetryCannotConnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const threeAttempts = `{"methodConfig": [{"name": [{}], "retryPolicy": {
			"maxAttempts": 3, "initialBackoff": "1s", "maxBackoff": "1s", "backoffMultiplier": 1, "retryableStatusCodes": ["UNAVAILABLE"]}}]}`
		g := mustGuard(t, "client: {rules: [{methods: ['*'], "+oneStream+"}]}")
		srv, lis := rpctest.NewServer(&rpctest.Service{Stream: func(grpc.ServerStream) error { return status.Error(codes.Unavailable, "") }}), rpctest.Listen()
		served := make(chan error)
		go func() { served <- srv.Serve(lis) }()
		conn := rpctest.Dial(t, lis, g.DialOptions(grpc.WithDefaultServiceConfig(threeAttempts))...)
		s, err := rpctest.Open(t.Context(), conn, rpctest.Bidi)
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		go func() { // during the backoff of the first retry
			time.Sleep(time.Millisecond)
			srv.Stop()
			_ = lis.Close()
		}()
		for err == nil {
			err = rpctest.Send(s, "")
			synctest.Wait()
		}
		if err == io.EOF || status.Code(err) != codes.Unavailable {
			t.Fatalf("Send: %v: the test proves nothing", err)
		}
		wantEnded(t, g, interceptors.Client, rpctest.Bidi, oneFailure)
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}

// stuckStream cannot send: its peer does not read.
type stuckStream struct {
	grpc.ClientStream
	ctx context.Context
}

func (s stuckStream) SendMsg(any) error {
	<-s.ctx.Done()
	return status.FromContextError(s.ctx.Err()).Err()
}

func TestOutcomeOfASendThatRunsOutOfTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, "client: {rules: [{methods: ['*'], "+oneStream+", stream_timeout: 1s}]}")
		s, err := g.StreamClientInterceptor()(t.Context(), rpctest.StreamDesc(rpctest.Bidi), nil, rpctest.Bidi,
			func(ctx context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
				return stuckStream{ctx: ctx}, nil
			})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.SendMsg(nil); status.Code(err) != codes.DeadlineExceeded {
			t.Fatal(err)
		}
		wantEnded(t, g, interceptors.Client, rpctest.Bidi, oneFailure) // not an error of this side
	})
}
