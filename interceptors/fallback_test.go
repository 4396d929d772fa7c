package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
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
	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
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

func TestFallbackDecidesTheResult(t *testing.T) {
	cause, other := status.Error(codes.Unavailable, "down"), errors.New("other")
	for name, want := range map[string]error{"answer": nil, "error": other, "cause": cause} {
		g := mustGuard(t, clientRules("breaker: {}"), interceptors.WithFallback("*",
			func(_ context.Context, method string, _, _ any, got error) error {
				if got != cause || method != rpctest.Unary {
					t.Errorf("%s: asked for %v of %s", name, got, method)
				}
				return want
			}))
		if err := clientUnary.byHand(t.Context(), g, func(context.Context) error { return cause }); err != want {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
		wantEnded(t, g, interceptors.Client, rpctest.Unary, oneFailure)
	}
}

type callersKey struct{}

// The fallback is given what the caller gave: not the context with the policy's
// timeout, and the very messages.
func TestFallbackIsGivenWhatTheCallerGave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		request, answer := new(rpctest.Message), new(rpctest.Message)
		caller := context.WithValue(t.Context(), callersKey{}, "the caller")
		asked := false
		g := mustGuard(t, clientRules("timeout: 1s"), interceptors.WithFallback("*", func(ctx context.Context, _ string, req, reply any, _ error) error {
			asked = true
			if ctx != caller || req != any(request) || reply != any(answer) {
				t.Errorf("got %v, %v, %v", ctx, req, reply)
			}
			if _, ok := ctx.Deadline(); ok || ctx.Err() != nil {
				t.Error("it has the deadline of the policy")
			}
			return nil
		}))
		err := g.UnaryClientInterceptor()(caller, rpctest.Unary, request, answer, nil,
			func(ctx context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
				<-ctx.Done()
				return status.FromContextError(ctx.Err()).Err()
			})
		if err != nil || !asked {
			t.Errorf("asked %v, returned %v", asked, err)
		}
	})
}

// While a fallback hangs, its call is over: the only place is free, the breaker
// has the verdict, and the counts are complete.
func TestFallbackHoldsNoPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		g := mustGuard(t, clientRules(placeForOne), interceptors.WithFallback("*", func(context.Context, string, any, any, error) error {
			<-release
			return nil
		}))
		hanging := make(chan error, 1)
		go func() { hanging <- clientUnary.byHand(t.Context(), g, func(context.Context) error { return errDown }) }()
		synctest.Wait()
		wantEnded(t, g, interceptors.Client, rpctest.Unary, oneFailure)
		wantState(t, g, interceptors.Client, rpctest.Unary, "open")
		time.Sleep(5 * time.Second)
		if err := clientUnary.byHand(t.Context(), g, func(context.Context) error { return nil }); err != nil {
			t.Errorf("the next call: %v", err)
		}
		wantState(t, g, interceptors.Client, rpctest.Unary, "closed")
		close(release)
		if err := <-hanging; err != nil {
			t.Error(err)
		}
		wantEnded(t, g, interceptors.Client, rpctest.Unary, ended{success: 1, failure: 1}) // and the answer is none
	})
}

// A fallback may call through the guard that asks it, the same method even.
func TestFallbackCallsThroughTheGuard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var conn *grpc.ClientConn
		depth := 0
		g := mustGuard(t, clientRules("concurrency_limit: {max_in_flight: 1}"),
			interceptors.WithFallback("/test.v1.Test/*", func(ctx context.Context, method string, _, reply any, cause error) error {
				if depth++; depth > 3 {
					return cause
				}
				if method == rpctest.Unary {
					return conn.Invoke(ctx, rpctest.Other, &rpctest.Message{Value: "UNAVAILABLE"}, reply)
				}
				return conn.Invoke(ctx, rpctest.Other, &rpctest.Message{Value: fmt.Sprint("second hand ", depth)}, reply)
			}))
		conn = rpctest.Start(t, script(), nil, g.DialOptions())
		if got, err := rpctest.Call(t.Context(), conn, rpctest.Unary, "UNAVAILABLE"); got != "second hand 2" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		wantEnded(t, g, interceptors.Client, rpctest.Unary, oneFailure)
		wantEnded(t, g, interceptors.Client, rpctest.Other, ended{success: 1, failure: 1})
	})
}

// The most specific pattern has the say; the others are not asked after it.
func TestFallbackPatterns(t *testing.T) {
	var asked []string
	named := func(pattern string) interceptors.Option {
		return interceptors.WithFallback(pattern, func(_ context.Context, _ string, _, _ any, cause error) error {
			asked = append(asked, pattern)
			return cause
		})
	}
	g := mustGuard(t, `client: {rules: [{methods: ["*", "/grpc.health.v1.Health/*", "/grpc.a.B/C"], breaker: {}}, {methods: ["/off.v1.S/*"], breaker: {disabled: true}}]}`,
		named("*"), named("/a.B/*"), named("/a.B/C"), named("/grpc.a.B/C"))
	for method, want := range map[string]string{
		"/a.B/C": "/a.B/C", "/a.B/D": "/a.B/*", "/a.B/": "/a.B/*", "/a.BB/C": "*", "/x.Y/Z": "*", "": "*", "no slash": "*",
		"/grpc.a.B/C": "/grpc.a.B/C", "/grpc.health.v1.Health/Check": "", "/grpc.x.Y/Z": "",
		"/off.v1.S/M": "", // no rule: not judged
	} {
		asked = nil
		if err := callOn(g, nil, method, errDown); err != errDown {
			t.Errorf("%s: %v", method, err)
		}
		if got := strings.Join(asked, " "); got != want {
			t.Errorf("%q asked %q, want %q", method, got, want)
		}
	}
}

// Methods beyond the cap share a state, not a fallback.
func TestFallbackBeyondTheCap(t *testing.T) {
	s := new(standIn)
	g := mustGuard(t, "client: "+capped, interceptors.WithFallback("/c.C/Later", func(ctx context.Context, method string, req, reply any, cause error) error {
		if method != "/c.C/Later" {
			t.Errorf("it was told %q", method)
		}
		return s.answer(ctx, method, req, reply, cause)
	}))
	cc := channel(t, "example.com")
	for i := range maxStates {
		_ = callOn(g, cc, fmt.Sprintf("/b.B/M%d", i), nil)
	}
	if err := callOn(g, cc, "/c.C/Later", errDown); err != nil || len(s.asked()) != 1 {
		t.Errorf("its own fallback: %v", err)
	}
	if err := callOn(g, cc, "/c.C/Other", errDown); err != errDown && reasonOf(err) != interceptors.ReasonRateLimited || len(s.asked()) != 0 {
		t.Errorf("another method: %v", err)
	}
	if len(others(g)) == 0 {
		t.Error("they have state of their own: the test proves nothing")
	}
}

func TestFallbackMistakes(t *testing.T) {
	f := func(context.Context, string, any, any, error) error { return nil }
	good := interceptors.LastGoodConfig{MaxAge: time.Second}
	rules := []*resiliencev1.MethodPolicy{
		{Methods: []string{"/a.B/C", "/s.S/*", "/grpc.a.B/C"}, Breaker: &resiliencev1.Breaker{}},
		{Methods: []string{"/s.S/Off"}, Breaker: &resiliencev1.Breaker{Disabled: true}},
	}
	policy := &resiliencev1.Policy{
		Client: &resiliencev1.ClientPolicy{Rules: rules},
		Server: &resiliencev1.ServerPolicy{Rules: []*resiliencev1.MethodPolicy{{Methods: []string{"*"}, Breaker: &resiliencev1.Breaker{}}}},
	}
	_, err := interceptors.New(policy,
		interceptors.WithFallback("nonsense", f), interceptors.WithFallback("", f), interceptors.WithFallback("/a.B/C", nil),
		interceptors.WithFallback("/a.B/C", f), interceptors.WithFallback("/a.B/C", f), interceptors.LastGood("/a.B/C", good),
		interceptors.WithFallback("/x.Y/Z", f), interceptors.LastGood("/x.Y/*", good), interceptors.WithFallback("/s.S/Off", f),
		interceptors.WithFallback("/grpc.health.v1.Health/*", f),
		interceptors.LastGood("/s.S/M", interceptors.LastGoodConfig{MaxEntries: -1, MaxBytes: -2, MaxAge: -3}),
		interceptors.LastGood("/s.S/N", interceptors.LastGoodConfig{}), interceptors.LastGood("/s.S", good),
		// These are fine.
		interceptors.WithFallback("/a.B/*", f), interceptors.WithFallback("*", f), interceptors.WithFallback("/s.S/*", f), interceptors.WithFallback("/grpc.a.B/*", f),
	)
	const add = `so nothing would be rejected or judged: add a rule, such as client.rules: [{methods: [%q], breaker: {}}]`
	want := []string{
		`WithFallback: found "nonsense", allowed "*", "/pkg.Service/*" or "/pkg.Service/Method"`,
		`WithFallback: found "", allowed "*", "/pkg.Service/*" or "/pkg.Service/Method"`,
		`WithFallback: the fallback of "/a.B/C" is nil`,
		`WithFallback: "/a.B/C" has a fallback already, by WithFallback`,
		`LastGood: "/a.B/C" has a fallback already, by WithFallback`,
		`LastGood: MaxAge of "/s.S/M": found -3ns, allowed more than 0s`,
		`LastGood: MaxEntries of "/s.S/M": found -1, allowed 0 (1000) or more`,
		`LastGood: MaxBytes of "/s.S/M": found -2, allowed 0 (16777216) or more`,
		`LastGood: MaxAge of "/s.S/N": found 0s, allowed more than 0s`,
		`LastGood: found "/s.S", allowed "*", "/pkg.Service/*" or "/pkg.Service/Method"`,
		`WithFallback: no client rule is for "/grpc.health.v1.Health/*", ` + fmt.Sprintf(add, "/grpc.health.v1.Health/*"),
		`WithFallback: no client rule is for "/s.S/Off", ` + fmt.Sprintf(add, "/s.S/Off"),
		`LastGood: no client rule is for "/x.Y/*", ` + fmt.Sprintf(add, "/x.Y/*"),
		`WithFallback: no client rule is for "/x.Y/Z", ` + fmt.Sprintf(add, "/x.Y/Z"),
	}
	if err == nil {
		t.Fatal("no error")
	}
	if got := strings.Split(err.Error(), "\n"); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	// Without a client rule, or with one for package grpc alone, "*" matches nothing.
	for _, rules := range [][]*resiliencev1.MethodPolicy{nil, {{Methods: []string{"/grpc.a.B/*", "/grpc.a.B/C"}, Breaker: &resiliencev1.Breaker{}}}} {
		p := &resiliencev1.Policy{Client: &resiliencev1.ClientPolicy{Rules: rules}}
		if _, err := interceptors.New(p, interceptors.WithFallback("*", f)); err == nil || !strings.Contains(err.Error(), `no client rule is for "*"`) {
			t.Errorf("%v: %v", rules, err)
		}
	}
	// What a policy with a mistake covers cannot be known.
	p := &resiliencev1.Policy{Client: &resiliencev1.ClientPolicy{Rules: []*resiliencev1.MethodPolicy{{Methods: []string{"a.B/C"}, Breaker: &resiliencev1.Breaker{}}}}}
	if _, err := interceptors.New(p, interceptors.WithFallback("/a.B/C", f)); err == nil || strings.Contains(err.Error(), "no client rule") {
		t.Errorf("got %v", err)
	}
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

func TestCase17_FallbackBlowsUp(t *testing.T) {
	for name, blowUp := range blowUps {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log strings.Builder
				mined := true
				g := mustGuard(t, clientRules(placeForOne), interceptors.WithLogger(slog.New(slog.NewTextHandler(&log, nil))),
					interceptors.WithFallback("*", func(context.Context, string, any, any, error) error {
						if mined {
							blowUp()
						}
						return nil
					}))
				fail := func() error {
					return clientUnary.byHand(t.Context(), g, func(context.Context) error { return errDown })
				}
				// Of a failure, of a rejection, and of a half-open probe.
				for i, want := range []interceptors.Reason{"", interceptors.ReasonBreakerOpen, ""} {
					if i == 2 {
						time.Sleep(5 * time.Second)
					}
					var err error
					p := survive(func() { err = fail() })
					if wanted := map[string]any{"panic": nil, "Goexit": "Goexit"}[name]; p != wanted {
						t.Errorf("call %d: %v came through, want %v", i, p, wanted)
					}
					if name == "panic" && (reasonOf(err) != want || want == "" && err != errDown) {
						t.Errorf("call %d: %v, want the cause", i, err)
					}
					wantState(t, g, interceptors.Client, rpctest.Unary, "open")
				}
				wantEnded(t, g, interceptors.Client, rpctest.Unary, ended{failure: 2})
				if n := strings.Count(log.String(), `callback="fallback of *"`); n != map[string]int{"panic": 1}[name] {
					t.Errorf("logged %d times:\n%s", n, log.String())
				}
				// Nothing is wedged.
				mined = false
				if err := fail(); err != nil {
					t.Errorf("%v, want the fallback's answer", err)
				}
				time.Sleep(5 * time.Second)
				if err := clientUnary.byHand(t.Context(), g, func(context.Context) error { return nil }); err != nil {
					t.Error(err)
				}
				wantState(t, g, interceptors.Client, rpctest.Unary, "closed")
				wantEnded(t, g, interceptors.Client, rpctest.Unary, ended{success: 1, failure: 2})
			})
		})
	}
}

// A call that needs no fallback does not pay for one.
func TestFallbackAllocatesNothingUntilItIsAsked(t *testing.T) {
	f := func(context.Context, string, any, any, error) error { return nil }
	g := mustGuard(t, hotPolicy, interceptors.WithFallback("*", f))
	call := unaryClient(g)
	if got := testing.AllocsPerRun(1000, func() {
		if err := call(); err != nil {
			t.Fatal(err)
		}
	}); got != 0 {
		t.Errorf("a call that succeeds: %v allocations, want 0", got)
	}
	call = rejected(unaryClient(mustGuard(t, "client: {"+oneToken+"}", interceptors.WithFallback("/a.B/C", f))))
	if got := testing.AllocsPerRun(1000, func() {
		if err := call(); err != nil {
			t.Fatal(err)
		}
	}); got != 1 {
		t.Errorf("a rejection of a method without one: %v allocations, want its error", got)
	}
}
