package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"io"
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

// deadlineSeen serves with a handler that says how much time it was given, in
// its error's text, or "none".
func deadlineSeen() *rpctest.Service {
	return bothKinds(func(ctx context.Context, _ string) error {
		deadline, ok := ctx.Deadline()
		if !ok {
			return status.Error(codes.Aborted, "none")
		}
		return status.Error(codes.Aborted, time.Until(deadline).String())
	})
}

func TestTimeoutSetsTheDeadline(t *testing.T) {
	const none = 0
	for _, tt := range []struct {
		name   string
		rule   string
		caller time.Duration // the caller's deadline; 0: none
		unary  string        // what the handler sees
		stream string
	}{
		{"no deadline of the caller", "timeout: 2s, stream_timeout: 3s", none, "2s", "3s"},
		{"the caller's is later", "timeout: 2s, stream_timeout: 3s", time.Minute, "2s", "3s"},
		{"the caller's is sooner", "timeout: 2s, stream_timeout: 3s", time.Second, "1s", "1s"},
		{"the caller's is the same", "timeout: 2s, stream_timeout: 2s", 2 * time.Second, "2s", "2s"},
		{"timeout is for unary calls", "timeout: 2s", none, "2s", "none"},
		{"stream_timeout is for streams", "stream_timeout: 3s", none, "none", "3s"},
		{"0s switches off", "timeout: 0s, stream_timeout: 0s", none, "none", "none"},
		{"no timeout", "breaker: {}", none, "none", "none"},
		{"no timeout, caller's deadline", "breaker: {}", time.Second, "1s", "1s"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			eachArm(t, func(t *testing.T, a arm) {
				_, conn := a.setup(t, tt.rule, deadlineSeen())
				ctx, cancel := t.Context(), context.CancelFunc(func() {})
				if tt.caller > 0 {
					ctx, cancel = context.WithTimeout(ctx, tt.caller)
				}
				defer cancel()
				want := tt.stream
				if a.unary() {
					want = tt.unary
				}
				if got := status.Convert(a.call(ctx, conn, "")).Message(); got != want {
					t.Errorf("the handler has %s, want %s", got, want)
				}
			})
		})
	}
}

// A more specific rule's 0s switches the timeouts of a less specific one off.
func TestTimeoutZeroSwitchesAnInheritedOneOff(t *testing.T) {
	for _, side := range []string{"client", "server"} {
		t.Run(side, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := mustGuard(t, side+`: {rules: [{methods: ['*'], timeout: 2s, stream_timeout: 3s, breaker: {}},
					{methods: [/test.v1.Test/Unary, /test.v1.Test/Bidi], timeout: 0s, stream_timeout: 0s}]}`)
				var server []grpc.ServerOption
				var dial []grpc.DialOption
				if side == "client" {
					dial = g.DialOptions()
				} else {
					server = g.ServerOptions()
				}
				conn := rpctest.Start(t, deadlineSeen(), server, dial)
				for method, want := range map[string]string{
					rpctest.Unary: "none", rpctest.Bidi: "none", rpctest.Other: "2s", rpctest.ServerStream: "3s",
				} {
					if got := status.Convert(arm{method: method}.call(t.Context(), conn, "")).Message(); got != want {
						t.Errorf("%s has %s, want %s", method, got, want)
					}
				}
			})
		})
	}
}

func TestTimeoutEndsTheCall(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		d := newDesk()
		g, conn := a.setup(t, "timeout: 2s, stream_timeout: 2s, concurrency_limit: {max_in_flight: 1, max_streams: 1}, breaker: {}", d.service())
		p := a.start(t.Context(), conn, "")
		pass(2*time.Second - 1)
		if p.ended() || a.held(t, g) != 1 {
			t.Errorf("before its time the call has ended %v: %v; %d permits are out", p.ended(), p.result().err, a.held(t, g))
		}
		pass(1)
		if !p.ended() || p.result().took != 2*time.Second || status.Code(p.result().err) != codes.DeadlineExceeded {
			t.Errorf("ended %v after %v: %v, want DEADLINE_EXCEEDED after 2s", p.ended(), p.result().took, p.result().err)
		}
		side := interceptors.Client
		if a.side == "server" {
			side = interceptors.Server
		}
		wantEnded(t, g, side, a.method, ended{failure: 1})
	})
}

// streams are handlers that do not end when their time is over, as a handler
// that waits for its context does.
var streams = map[string]func(ss grpc.ServerStream) error{
	"idle in RecvMsg": func(ss grpc.ServerStream) error {
		for {
			if _, err := rpctest.Recv(ss); err != nil {
				return err
			}
		}
	},
	"waits for its context": func(ss grpc.ServerStream) error {
		<-ss.Context().Done()
		return ss.Context().Err()
	},
	"answers success in the end": func(ss grpc.ServerStream) error {
		<-ss.Context().Done()
		return nil
	},
	"sends for ever": func(ss grpc.ServerStream) error {
		for {
			if err := rpctest.Send(ss, "again"); err != nil {
				return err
			}
			time.Sleep(time.Millisecond)
		}
	},
}

func TestStreamTimeoutEndsWhateverTheHandlerWaitsFor(t *testing.T) {
	for name, stream := range streams {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := mustGuard(t, "server: {rules: [{methods: ['*'], stream_timeout: 1s, breaker: {}, concurrency_limit: {max_in_flight: 1, max_streams: 1}}]}")
				conn := rpctest.Start(t, &rpctest.Service{Stream: stream}, g.ServerOptions(), nil)
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				began := time.Now()
				s, err := rpctest.Open(ctx, conn, rpctest.Bidi)
				for err == nil {
					_, err = rpctest.Recv(s)
				}
				if status.Code(err) != codes.DeadlineExceeded || time.Since(began) != time.Second {
					t.Errorf("after %v: %v, want DEADLINE_EXCEEDED after 1s", time.Since(began), err)
				}
				pass(time.Millisecond)
				wantEnded(t, g, interceptors.Server, rpctest.Bidi, ended{failure: 1})
			})
		})
	}
}

// A handler that ignores its context: the client has its answer in time, the
// permit is out until the handler ends.
func TestStreamTimeoutOfADeafHandler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := arms[3]
		g, conn := a.setup(t, "stream_timeout: 1s, concurrency_limit: {max_in_flight: 1, max_streams: 1}", &rpctest.Service{
			Stream: func(grpc.ServerStream) error { time.Sleep(10 * time.Second); return nil },
		})
		p := a.start(t.Context(), conn, "")
		pass(10*time.Second - 1)
		if !p.ended() || p.result().took != time.Second || status.Code(p.result().err) != codes.DeadlineExceeded {
			t.Errorf("ended %v after %v: %v", p.ended(), p.result().took, p.result().err)
		}
		if held := a.held(t, g); held != 1 {
			t.Errorf("%d permits are out while the handler runs, want 1", held)
		}
		pass(1)
		wantEnded(t, g, interceptors.Server, a.method, ended{failure: 1})
	})
}

// A handler that is blocked because its client does not read is freed too.
func TestStreamTimeoutOfAClientThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		large := strings.Repeat("x", 64<<10)
		g := mustGuard(t, "server: {rules: [{methods: ['*'], stream_timeout: 1s, concurrency_limit: {max_in_flight: 1, max_streams: 1}}]}")
		conn := rpctest.Start(t, &rpctest.Service{Stream: func(ss grpc.ServerStream) error {
			for {
				if err := rpctest.Send(ss, large); err != nil {
					return err
				}
			}
		}}, g.ServerOptions(), nil)
		s, err := rpctest.Open(t.Context(), conn, rpctest.ServerStream)
		if err != nil {
			t.Fatal(err)
		}
		pass(time.Second)
		wantEnded(t, g, interceptors.Server, rpctest.ServerStream, ended{failure: 1})
		for err == nil {
			_, err = rpctest.Recv(s)
		}
		if status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("the client has %v after what had been sent", err)
		}
	})
}

// A stream that ends in time is not touched by what was to end it.
func TestStreamTimeoutOfAStreamThatEndsInTime(t *testing.T) {
	for _, a := range []arm{arms[1], arms[3]} {
		t.Run(a.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, conn := a.setup(t, "stream_timeout: 1s", &rpctest.Service{})
				s, err := rpctest.Open(t.Context(), conn, a.method)
				if err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(rpctest.Send(s, "one"), s.CloseSend()); err != nil {
					t.Fatal(err)
				}
				if text, err := rpctest.Recv(s); text != "one" || err != nil {
					t.Errorf("got %q, %v", text, err)
				}
				if _, err := rpctest.Recv(s); err != io.EOF {
					t.Errorf("got %v, want EOF", err)
				}
				pass(2 * time.Second)
				checkIdle(t, g)
				if c := a.state(t, g).Counts; c.Success != 1 {
					t.Errorf("%+v, want one success", c)
				}
			})
		})
	}
}

// The caller's cancellation before the stream_timeout stays the caller's.
func TestStreamTimeoutDoesNotHideTheCallersCancel(t *testing.T) {
	for _, a := range []arm{arms[1], arms[3]} {
		t.Run(a.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDesk()
				g, conn := a.setup(t, "stream_timeout: 1s, breaker: {}", d.service())
				ctx, cancel := context.WithCancel(t.Context())
				p := a.start(ctx, conn, "")
				cancel()
				synctest.Wait()
				if !p.ended() || status.Code(p.result().err) != codes.Canceled {
					t.Errorf("ended %v: %v", p.ended(), p.result().err)
				}
				if c := a.state(t, g).Counts; c.Neutral != 1 {
					t.Errorf("%+v, want one neutral", c)
				}
				checkIdle(t, g)
			})
		})
	}
}

func TestMinimumBudget(t *testing.T) {
	for _, tt := range []struct {
		budget   string
		deadline time.Duration
		passes   bool
	}{
		{"100ms", 99 * time.Millisecond, false},
		{"100ms", 100 * time.Millisecond, true},
		{"100ms", 0, true}, // no deadline: all the time in the world
		{"0s", time.Millisecond, true},
	} {
		t.Run(fmt.Sprint(tt.budget, " ", tt.deadline), func(t *testing.T) {
			eachArm(t, func(t *testing.T, a arm) {
				g, conn := a.setup(t, "rate_limit: {requests_per_second: 1, burst: 5}, breaker: {}, minimum_budget: "+tt.budget, &rpctest.Service{})
				ctx, cancel := t.Context(), context.CancelFunc(func() {})
				if tt.deadline > 0 {
					ctx, cancel = context.WithTimeout(ctx, tt.deadline)
				}
				defer cancel()
				err := a.call(ctx, conn, "")
				if passed := err == nil; passed != tt.passes {
					t.Errorf("got %v, want it to pass: %v", err, tt.passes)
				}
				if !tt.passes && (reasonOf(err) != interceptors.ReasonBudgetTooSmall || status.Code(err) != codes.DeadlineExceeded) {
					t.Errorf("got %v", err)
				}
				want := 5.
				if tt.passes {
					want = 4
				}
				if got := a.state(t, g).RateLimit.Available; got != want {
					t.Errorf("%v tokens are left, want %v", got, want)
				}
				checkIdle(t, g)
			})
		})
	}
}

// What is left of the deadline after a wait must be enough too.
func TestMinimumBudgetAfterAWait(t *testing.T) {
	for _, wait := range []string{
		"concurrency_limit: {max_in_flight: 1, max_streams: 1, max_queue: 3}",
		"rate_limit: {requests_per_second: 1, burst: 1, max_wait: 10s}",
	} {
		t.Run(wait, func(t *testing.T) {
			eachArm(t, func(t *testing.T, a arm) {
				d := newDesk()
				g, conn := a.setup(t, "minimum_budget: 100ms, "+wait, d.service())
				a.start(t.Context(), conn, "first")
				ctx, cancel := context.WithTimeout(t.Context(), 1050*time.Millisecond)
				defer cancel()
				p := a.start(ctx, conn, "waits")
				pass(time.Second)
				d.next(nil)
				if !p.ended() || reasonOf(p.result().err) != interceptors.ReasonBudgetTooSmall || !near(p.result().took, time.Second) {
					t.Errorf("ended %v after %v: %v, want a rejection after the wait of 1s", p.ended(), p.result().took, p.result().err)
				}
				if seen := d.seen(); len(seen) != 1 {
					t.Errorf("the handler has seen %q", seen)
				}
				checkIdle(t, g)
			})
		})
	}
}

// A call waits for a place for no longer than it may run.
func TestTimeoutBoundsTheWaitForAPlace(t *testing.T) {
	for _, tt := range []struct {
		wait  string // max_queue_wait
		want  time.Duration
		retry time.Duration
	}{
		{"", time.Second, 100 * time.Millisecond},
		{", max_queue_wait: 1m", time.Second, time.Minute},
		{", max_queue_wait: 300ms", 300 * time.Millisecond, 300 * time.Millisecond},
	} {
		t.Run("max_queue"+tt.wait, func(t *testing.T) {
			eachArm(t, func(t *testing.T, a arm) {
				g := mustGuard(t, a.side+": {rules: [{methods: ['*'], concurrency_limit: {max_in_flight: 1, max_streams: 1, max_queue: 3"+tt.wait+"}, timeout: 1s, stream_timeout: 1s}]}")
				deaf := make(chan struct{}) // to its timeout: it keeps the only place
				go func() {
					_ = a.byHand(context.Background(), g, func(context.Context) error { <-deaf; return nil })
				}()
				synctest.Wait()
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				began := time.Now()
				err := a.byHand(ctx, g, func(context.Context) error { t.Error("it passed"); return nil })
				if took := time.Since(began); took != tt.want || reasonOf(err) != interceptors.ReasonQueueTimeout || retryInfo(err) != tt.retry {
					t.Errorf("after %v: %v, retry in %v; want QUEUE_TIMEOUT after %v, retry in %v", took, err, retryInfo(err), tt.want, tt.retry)
				}
				close(deaf)
				synctest.Wait()
				checkIdle(t, g)
			})
		})
	}
}

func TestMinimumBudgetNamesTheRuleThatGaveIt(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		g := mustGuard(t, a.side+": {rules: [{name: all, methods: ['*'], minimum_budget: 1s}, {name: service, methods: ['/test.v1.Test/*'], timeout: 5s}]}")
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		err := a.byHand(ctx, g, func(context.Context) error { t.Error("it passed"); return nil })
		if r, ok := errors.AsType[*interceptors.RejectedError](err); !ok || r.Reason != interceptors.ReasonBudgetTooSmall || r.Rule != "all" {
			t.Errorf("%v, want a rejection by the rule all", err)
		}
		checkIdle(t, g)
	})
}
