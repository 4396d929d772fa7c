package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// standIn is a fallback that answers "stand-in" and remembers what it was asked.
type standIn struct {
	mu     sync.Mutex
	causes []error
}

func (s *standIn) answer(_ context.Context, _ string, _, reply any, cause error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.causes = append(s.causes, cause)
	if m, ok := reply.(*rpctest.Message); ok {
		m.Value = "stand-in"
	}
	return nil
}

// asked returns the causes since it was last called.
func (s *standIn) asked() []error {
	s.mu.Lock()
	defer s.mu.Unlock()
	asked := s.causes
	s.causes = nil
	return asked
}

func (s *standIn) forAll() interceptors.Option { return interceptors.WithFallback("*", s.answer) }

// clientUnary is the arm that fallbacks are for.
var clientUnary = arms[0]

// clientRules is a policy with one rule for every client call.
func clientRules(blocks string) string {
	return "client: {rules: [{methods: ['*'], " + blocks + "}]}"
}

func TestFallbackIsAskedByOutcome(t *testing.T) {
	for _, c := range outcomeCases() {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				if c.blocks == "" {
					c.blocks = "breaker: {}"
				}
				s := new(standIn)
				g := mustGuard(t, clientRules(c.blocks), s.forAll())
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if c.deadline > 0 {
					ctx, cancel = context.WithTimeout(ctx, c.deadline)
					defer cancel()
				}
				err := clientUnary.byHand(ctx, g, func(context.Context) error {
					if c.cancel {
						cancel()
					}
					return c.err
				})
				wantEnded(t, g, interceptors.Client, rpctest.Unary, c.want)

				want := c.want == oneFailure || c.want == oneDropped
				if c.want == oneNeutral && c.err != nil && !c.cancel {
					code := status.Code(c.err)
					var rejected *interceptors.RejectedError
					want = errors.As(c.err, &rejected) ||
						code == codes.Unavailable || code == codes.DeadlineExceeded || code == codes.ResourceExhausted
				}
				switch asked := s.asked(); {
				case want && (len(asked) != 1 || asked[0] != c.err || err != nil):
					t.Errorf("asked for %d causes, returned %v; want it asked for the error, and nil", len(asked), err)
				case !want && (len(asked) != 0 || err != c.err):
					t.Errorf("asked for %d causes; want the call's own end", len(asked))
				}
			})
		})
	}
}

// An interceptor further in may return the context's error as it is. Within
// min_deadline that is neutral.
func TestFallbackAndTheBareErrorOfAContext(t *testing.T) {
	for err, want := range map[error]int{
		context.DeadlineExceeded:                             1,
		fmt.Errorf("stock: %w", context.DeadlineExceeded):    1,
		errors.Join(errors.New("no"), context.Canceled, nil): 0,
	} {
		synctest.Test(t, func(t *testing.T) {
			s := new(standIn)
			g := mustGuard(t, clientRules("breaker: {min_deadline: 1s}"), s.forAll())
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			defer cancel()
			_ = clientUnary.byHand(ctx, g, func(context.Context) error { return err })
			if asked := s.asked(); len(asked) != want {
				t.Errorf("%v: asked for %v", err, asked)
			}
			if want == 1 {
				wantEnded(t, g, interceptors.Client, rpctest.Unary, oneNeutral)
			}
		})
	}
}

// A classifier that calls an error neutral has not made an answer of it.
func TestFallbackAndTheClassifier(t *testing.T) {
	for _, tt := range []struct {
		out  interceptors.Outcome
		code codes.Code
		want bool
	}{
		{interceptors.Success, codes.Unavailable, false},
		{interceptors.Failure, codes.NotFound, true},
		{interceptors.Dropped, codes.NotFound, true},
		{interceptors.Neutral, codes.NotFound, false},
		{interceptors.Neutral, codes.Internal, false},
		{interceptors.Neutral, codes.Unavailable, true},
		{interceptors.Neutral, codes.DeadlineExceeded, true},
		{interceptors.Neutral, codes.ResourceExhausted, true},
	} {
		s := new(standIn)
		g := mustGuard(t, clientRules("breaker: {}"), s.forAll(),
			interceptors.WithClassifier(func(context.Context, interceptors.Side, string, error) interceptors.Outcome { return tt.out }))
		_ = clientUnary.byHand(t.Context(), g, func(context.Context) error { return status.Error(tt.code, "") })
		if asked := s.asked(); (len(asked) == 1) != tt.want {
			t.Errorf("%v, %v: asked %v", tt.out, tt.code, asked)
		}
	}
}

func TestFallbackOfEachRejection(t *testing.T) {
	ok := func(context.Context) error { return nil }
	for _, tt := range []struct {
		blocks string
		first  func(ctx context.Context) error // the call before; nil: the others are made within it
		budget time.Duration
		want   interceptors.Reason
	}{
		{strict, func(context.Context) error { return errDown }, 0, interceptors.ReasonBreakerOpen},
		{"rate_limit: {requests_per_second: 0.001, burst: 1}", ok, 0, interceptors.ReasonRateLimited},
		{"rate_limit: {external: full}", ok, 0, interceptors.ReasonRateLimited},
		{"concurrency_limit: {max_in_flight: 1}", nil, 0, interceptors.ReasonConcurrencyLimited},
		{"concurrency_limit: {max_in_flight: 1, max_queue: 1, max_queue_wait: 1s}", nil, 0, interceptors.ReasonQueueTimeout},
		{"minimum_budget: 1s", ok, time.Millisecond, interceptors.ReasonBudgetTooSmall},
	} {
		t.Run(string(tt.want)+" of "+tt.blocks, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := new(standIn)
				g := mustGuard(t, clientRules(tt.blocks), s.forAll(),
					interceptors.WithLimiter("full", limiterFunc(func(context.Context) error { return errors.New("full") })))
				rejected := func() {
					s.asked()
					before := gatesOf(t, g, interceptors.Client, rpctest.Unary).Counts
					ctx := t.Context()
					if tt.budget > 0 {
						var cancel context.CancelFunc
						ctx, cancel = context.WithTimeout(ctx, tt.budget)
						defer cancel()
					}
					err := clientUnary.byHand(ctx, g, func(context.Context) error { t.Error("it was sent"); return nil })
					if asked := s.asked(); err != nil || len(asked) != 1 || reasonOf(asked[0]) != tt.want {
						t.Fatalf("returned %v, asked for %v", err, asked)
					} else if _, ok := asked[0].(*interceptors.RejectedError); !ok {
						t.Errorf("the cause is a %T", asked[0])
					}
					after := gatesOf(t, g, interceptors.Client, rpctest.Unary).Counts
					if after.Rejected[tt.want] != before.Rejected[tt.want]+1 || after.Admitted != before.Admitted || after.Success != before.Success {
						t.Errorf("counts before %+v, after %+v", before, after)
					}
				}
				_ = clientUnary.byHand(t.Context(), g, func(ctx context.Context) error {
					if tt.first == nil {
						rejected()
						return nil
					}
					return tt.first(ctx)
				})
				if tt.first != nil {
					rejected()
				}
				checkIdle(t, g)
			})
		})
	}
}

// A deadline that is over, before the call or in a queue, is no reason not to
// answer; a caller that has gone is.
func TestFallbackAndTheContext(t *testing.T) {
	for _, where := range []string{"before", "queue of places", "queue for tokens", "limiter", "call"} {
		for _, cancelled := range []bool{false, true} {
			if where == "queue for tokens" && !cancelled {
				continue // its deadline is known to be sooner than its turn: a rejection
			}
			t.Run(fmt.Sprintf("%s, cancelled %v", where, cancelled), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := new(standIn)
					blocks := map[string]string{
						"before": "breaker: {}", "call": "breaker: {}", "limiter": "rate_limit: {external: slow}",
						"queue of places":  "concurrency_limit: {max_in_flight: 1, max_queue: 1}",
						"queue for tokens": "rate_limit: {requests_per_second: 0.01, burst: 1, max_wait: 1h}",
					}[where]
					free := true
					g := mustGuard(t, clientRules(blocks), s.forAll(),
						interceptors.WithLimiter("slow", limiterFunc(func(ctx context.Context) error {
							if free {
								return nil
							}
							<-ctx.Done()
							return ctx.Err()
						})))
					wait := func(ctx context.Context) error {
						<-ctx.Done()
						return status.FromContextError(ctx.Err()).Err()
					}
					try := func() {
						free = false
						// A deadline that is too far off to be refused because of it.
						ctx, cancel := context.WithTimeout(t.Context(), 200*time.Second)
						defer cancel()
						if cancelled {
							time.AfterFunc(50*time.Second, cancel)
						}
						if where == "before" {
							<-ctx.Done()
						}
						err := clientUnary.byHand(ctx, g, wait)
						asked := s.asked()
						if cancelled && (status.Code(err) != codes.Canceled || len(asked) != 0) {
							t.Errorf("returned %v, asked for %v", err, asked)
						}
						if !cancelled && (err != nil || len(asked) != 1 || status.Code(asked[0]) != codes.DeadlineExceeded) {
							t.Errorf("returned %v, asked for %v", err, asked)
						}
					}
					_ = clientUnary.byHand(t.Context(), g, func(context.Context) error {
						if where == "queue of places" {
							try()
						}
						return nil
					})
					if where != "queue of places" {
						try()
					}
					checkIdle(t, g)
				})
			})
		}
	}
}

// A rejection that meets a caller who has gone is for nobody.
func TestFallbackOfARejectionOfACallerWhoHasGone(t *testing.T) {
	s := new(standIn)
	ctx, cancel := context.WithCancel(t.Context())
	g := mustGuard(t, clientRules("rate_limit: {external: full}"), s.forAll(), interceptors.WithLimiter("full", limiterFunc(func(context.Context) error {
		cancel()
		return errors.New("full")
	})))
	if err := clientUnary.byHand(ctx, g, func(context.Context) error { return nil }); status.Code(err) != codes.Canceled || len(s.asked()) != 0 {
		t.Errorf("returned %v", err)
	}
	// The same when the channel was closed: that is the caller's doing.
	g = mustGuard(t, clientRules("rate_limit: {external: full}"), s.forAll(), interceptors.WithLimiter("full", limiterFunc(func(context.Context) error {
		return errors.New("full")
	})))
	conn := rpctest.Start(t, script(), nil, g.DialOptions())
	if _, err := rpctest.Call(t.Context(), conn, rpctest.Unary, ""); err != nil || len(s.asked()) != 1 {
		t.Errorf("returned %v", err)
	}
	_ = conn.Close()
	if _, err := rpctest.Call(t.Context(), conn, rpctest.Unary, ""); reasonOf(err) != interceptors.ReasonRateLimited || len(s.asked()) != 0 {
		t.Errorf("returned %v", err)
	}
}

// Messages that cannot be sent, or are over a limit of either side, are mistakes
// of the program; not even a classifier makes them anything else.
func TestFallbackIsNotAskedForMessages(t *testing.T) {
	const limit = 1 << 10
	long := strings.Repeat("x", 2*limit)
	failure := interceptors.WithClassifier(func(context.Context, interceptors.Side, string, error) interceptors.Outcome {
		return interceptors.Failure
	})
	for _, tt := range []struct {
		name, text string
		server     []grpc.ServerOption
		call       []grpc.CallOption
	}{
		{"invalid UTF-8", "\xff", nil, nil},
		{"too large to send", long, nil, []grpc.CallOption{grpc.MaxCallSendMsgSize(limit)}},
		{"too large for the server", long, []grpc.ServerOption{grpc.MaxRecvMsgSize(limit)}, nil},
		{"too large for the server to send", long, []grpc.ServerOption{grpc.MaxSendMsgSize(limit)}, nil},
		{"too large to receive", long, nil, []grpc.CallOption{grpc.MaxCallRecvMsgSize(limit)}},
	} {
		for judge, opts := range map[string][]interceptors.Option{"": nil, ", failures": {failure}} {
			t.Run(tt.name+judge, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := new(standIn)
					g := mustGuard(t, clientRules("breaker: {}"), append(opts, s.forAll())...)
					conn := rpctest.Start(t, script(), tt.server, g.DialOptions())
					if _, err := rpctest.Call(t.Context(), conn, rpctest.Unary, tt.text, tt.call...); err == nil || len(s.asked()) != 0 {
						t.Errorf("returned %v", err)
					}
				})
			})
		}
	}
}

// Through gRPC: the reply is the fallback's, streams have none.
func TestFallbackOverTheWire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(standIn)
		g := mustGuard(t, clientRules("breaker: {}"), s.forAll())
		conn := rpctest.Start(t, script(), nil, g.DialOptions())
		for text, want := range map[string]string{"UNAVAILABLE": "stand-in", "fine": "fine"} {
			if got, err := rpctest.Call(t.Context(), conn, rpctest.Unary, text); got != want || err != nil {
				t.Errorf("%s: %q, %v", text, got, err)
			}
		}
		if _, err := rpctest.Call(t.Context(), conn, rpctest.Unary, "NOT_FOUND"); status.Code(err) != codes.NotFound {
			t.Error(err)
		}
		if asked := s.asked(); len(asked) != 1 || status.Convert(asked[0]).Message() != "as asked for" {
			t.Errorf("asked for %v", asked)
		}
		if err := arms[1].call(t.Context(), conn, "UNAVAILABLE"); status.Code(err) != codes.Unavailable || len(s.asked()) != 0 {
			t.Errorf("a stream: %v", err)
		}
		wantEnded(t, g, interceptors.Client, rpctest.Unary, ended{success: 2, failure: 1})
	})
}

// The rejection of the server's guard, or of another one further in, is for the
// fallback of the guard outside.
func TestFallbackOfAnotherGuardsRejection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const full = "{rules: [{methods: ['*'], rate_limit: {requests_per_second: 0.001, burst: 1}}]}"
		for name, policy := range map[string]string{"server": "server: " + full, "client": "client: " + full} {
			s := new(standIn)
			other, g := mustGuard(t, policy), mustGuard(t, clientRules("breaker: {}"), s.forAll())
			conn := rpctest.Start(t, script(), other.ServerOptions(), g.DialOptions(other.DialOptions()...))
			for i := range 3 {
				if _, err := rpctest.Call(t.Context(), conn, rpctest.Unary, "fine"); err != nil || len(s.asked()) != min(i, 1) {
					t.Errorf("%s, call %d: %v", name, i, err)
				}
			}
		}
	})
}

// A panic or Goexit further in goes up as it was; the fallback is for errors.
func TestCase17_FallbackIsNotAskedForAPanic(t *testing.T) {
	for name, blowUp := range blowUps {
		s := new(standIn)
		g := mustGuard(t, clientRules(placeForOne), s.forAll())
		p := survive(func() {
			_ = clientUnary.byHand(t.Context(), g, func(context.Context) error { blowUp(); return nil })
		})
		if p == nil || len(s.asked()) != 0 {
			t.Errorf("%s: %v came through", name, p)
		}
		wantEnded(t, g, interceptors.Client, rpctest.Unary, oneFailure)
	}
}
