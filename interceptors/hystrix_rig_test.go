package interceptors_test

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/afex/hystrix-go/hystrix"
	metriccollector "github.com/afex/hystrix-go/hystrix/metric_collector"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// hystrix-go has goroutines and a clock of its own, which a bubble of
// testing/synctest cannot hold: the tests of this engine run in real time. Nothing
// in them depends on how fast that is. A sleep window is an hour until the test
// says otherwise, through hystrix-go's own settings (see rig.wake), and what happens
// a little later is waited for.
//
// A process has 256 hystrix circuits and cannot free one, so guards are shared: one
// a policy and side, for all tests and all rounds of -count. Each test begins with
// a circuit that has just closed (see rig.fresh), so that a round proves no less than
// the one before. What needs a process without circuits has its own
// (TestHystrixProcess).

// A call that waits for what should come at once gives up after this.
const hystrixPatience = 30 * time.Second

// eventually waits until cond holds.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(hystrixPatience); !cond(); time.Sleep(200 * time.Microsecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// sharedGuard is the guard of a policy, for all tests. Its callbacks are those of
// the test that uses it.
type sharedGuard struct {
	*interceptors.Guard
	using    sync.Mutex // by one test at a time
	log      atomic.Pointer[func(msg string)]
	classify atomic.Pointer[func() interceptors.Outcome]
	limit    atomic.Pointer[func() error]
}

var sharedGuards sync.Map // by side and blocks, of func() *sharedGuard

// Enabled, Handle, WithAttrs and WithGroup make it a slog.Handler.
func (*sharedGuard) Enabled(context.Context, slog.Level) bool { return true }

// Handle is the callback of the log.
func (s *sharedGuard) Handle(_ context.Context, r slog.Record) error {
	if f := s.log.Load(); f != nil {
		(*f)(r.Message)
	}
	return nil
}

// WithAttrs is not used.
func (s *sharedGuard) WithAttrs([]slog.Attr) slog.Handler { return s }

// WithGroup is not used.
func (s *sharedGuard) WithGroup(string) slog.Handler { return s }

// Limit makes it a limiter.
func (s *sharedGuard) Limit(context.Context) error {
	if f := s.limit.Load(); f != nil {
		return (*f)()
	}
	return nil
}

func (s *sharedGuard) outcome(context.Context, interceptors.Side, string, error) interceptors.Outcome {
	if f := s.classify.Load(); f != nil {
		return (*f)()
	}
	return interceptors.Outcome(255) // none: the status decides
}

// newSharedGuard makes one that is never closed.
func newSharedGuard(side, blocks string) *sharedGuard {
	collectWords()
	p, err := interceptors.Parse("policy.yaml", fmt.Appendf(nil, "%s: {rules: [{name: the-rule, methods: ['*'], %s\n}]}", side, blocks))
	if err != nil {
		panic(err)
	}
	s := new(sharedGuard)
	s.Guard, err = interceptors.New(p, interceptors.WithLogger(slog.New(s)), interceptors.WithClassifier(s.outcome), interceptors.WithLimiter("mine", s))
	if err != nil {
		panic(err)
	}
	return s
}

// useGuard returns the guard of a policy to the test alone.
func useGuard(t testing.TB, side, blocks string) *sharedGuard {
	once := sync.OnceValue(func() *sharedGuard { return newSharedGuard(side, blocks) })
	found, _ := sharedGuards.LoadOrStore(side+" "+blocks, once)
	s := found.(func() *sharedGuard)()
	s.using.Lock()
	t.Cleanup(func() {
		s.log.Store(nil)
		s.classify.Store(nil)
		s.limit.Store(nil)
		s.using.Unlock()
	})
	return s
}

// words is what a collector was told of a circuit, by hystrix-go's words; none is
// an attempt without one.
type words struct{ success, failure, timeout, cancelled, expired, none int }

func (w words) sum() int {
	return w.success + w.failure + w.timeout + w.cancelled + w.expired + w.none
}

// plus adds other n times.
func (w words) plus(other words, n int) words {
	return words{w.success + n*other.success, w.failure + n*other.failure, w.timeout + n*other.timeout,
		w.cancelled + n*other.cancelled, w.expired + n*other.expired, w.none + n*other.none}
}

// told is what a collector knows, since the circuit last closed.
type told struct {
	words                   words
	short, errors, attempts int
	longest                 time.Duration // of a call
	strange                 string        // what should not be
}

// tally is a metric collector.
type tally struct {
	mu sync.Mutex
	told
}

var (
	tallies      sync.Map // by circuit
	collectWords = sync.OnceFunc(func() {
		metriccollector.Registry.Register(func(name string) metriccollector.MetricCollector {
			c := new(tally) // one that hystrix.Flush leaves behind may be told a little more
			tallies.Store(name, c)
			return c
		})
	})
)

// Update is told of one call.
func (c *tally) Update(r metriccollector.MetricResult) {
	c.mu.Lock()
	defer c.mu.Unlock()
	none := r.Attempts - r.Successes - r.Failures - r.Timeouts - r.ContextCanceled - r.ContextDeadlineExceeded - r.ShortCircuits
	c.words.success += int(r.Successes)
	c.words.failure += int(r.Failures)
	c.words.timeout += int(r.Timeouts)
	c.words.cancelled += int(r.ContextCanceled)
	c.words.expired += int(r.ContextDeadlineExceeded)
	c.words.none += int(none)
	c.short += int(r.ShortCircuits)
	c.errors += int(r.Errors)
	c.attempts += int(r.Attempts)
	c.longest = max(c.longest, r.RunDuration)
	if r.Attempts != 1 || none < 0 || r.Rejects+r.FallbackSuccesses+r.FallbackFailures != 0 || r.RunDuration < 0 || r.TotalDuration < r.RunDuration {
		c.strange = fmt.Sprintf("%+v", r)
	}
}

// Reset is called when the circuit closes.
func (c *tally) Reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.told = told{strange: c.strange}
}

// rig is an arm whose method has the engine hystrix.
type rig struct {
	arm
	t     *testing.T
	guard *sharedGuard
	conn  *grpc.ClientConn // nil: by hand
	name  string           // of the circuit

	// What was so before.
	counts   interceptors.CountsSnapshot
	words    words
	rejected uint64 // at the closing
}

// newRig serves s and connects to it.
func newRig(t *testing.T, a arm, blocks string, s *rpctest.Service, extra ...grpc.DialOption) *rig {
	t.Helper()
	r := useRig(t, a, blocks)
	r.conn = rpctest.Start(t, s, r.serverOptions(), r.dialOptions(extra...))
	return r
}

// useRig is a rig that is not connected yet, to passthrough:///test.
func useRig(t *testing.T, a arm, blocks string) *rig {
	t.Helper()
	return (&rig{arm: a, t: t, guard: useGuard(t, a.side, blocks)}).init("passthrough:///test")
}

// handRig is for byHand.
func handRig(t *testing.T, a arm, blocks string) *rig {
	t.Helper()
	return (&rig{arm: a, t: t, guard: useGuard(t, a.side, blocks+" # by hand")}).init("")
}

func (r *rig) init(target string) *rig {
	r.name = r.guard.HystrixName(r.sideOf(), target, r.method)
	r.counts, r.words = r.snapshot().Counts, r.told().words
	r.rejected = r.counts.Rejected[interceptors.ReasonBreakerOpen]
	return r
}

func (r *rig) serverOptions() []grpc.ServerOption {
	if r.side == "client" {
		return nil
	}
	return r.guard.ServerOptions()
}

func (r *rig) dialOptions(extra ...grpc.DialOption) []grpc.DialOption {
	if r.side == "client" {
		return r.guard.DialOptions(extra...)
	}
	return extra
}

func (r *rig) snapshot() interceptors.MethodSnapshot {
	return gatesOf(r.t, r.guard.Guard, r.sideOf(), r.method)
}

func (r *rig) state() string { return r.snapshot().Breaker.State }

// told is what the collector knows; nothing before the first call.
func (r *rig) told() told {
	found, ok := tallies.Load(r.name)
	if !ok {
		return told{}
	}
	c := found.(*tally)
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.told
}

// circuit is what others find.
func (r *rig) circuit() *hystrix.CircuitBreaker {
	c, created, err := hystrix.GetCircuit(r.name)
	if created || err != nil {
		r.t.Fatalf("%s: created %v, %v; want the circuit of the guard", r.name, created, err)
	}
	return c
}

// sleep changes the circuit's sleep window.
func (r *rig) sleep(d time.Duration) {
	s := hystrix.GetCircuitSettings()[r.name]
	hystrix.ConfigureCommand(r.name, hystrix.CommandConfig{
		Timeout: int(s.Timeout.Milliseconds()), MaxConcurrentRequests: s.MaxConcurrentRequests,
		RequestVolumeThreshold: int(s.RequestVolumeThreshold), ErrorPercentThreshold: s.ErrorPercentThreshold,
		SleepWindow: int(d.Milliseconds()),
	})
}

// wake makes an open circuit let a probe through, in a millisecond at most.
func (r *rig) wake() { r.sleep(time.Millisecond) }

// doze makes it refuse again.
func (r *rig) doze() { r.sleep(time.Hour) }

// do makes a call.
func (r *rig) do(ctx context.Context, text string) error {
	if r.conn == nil {
		return r.byHand(ctx, r.guard.Guard, func(ctx context.Context) error { return obey(ctx, text) })
	}
	return r.call(ctx, r.conn, text)
}

// fresh makes the circuit one that has just closed: its window holds the success
// that closed it, and nothing else.
func (r *rig) fresh() {
	r.t.Helper()
	_ = r.do(r.t.Context(), "") // there is one
	r.doze()
	if r.state() == "closed" {
		r.trip()
	}
	r.heal()
	r.counts = r.snapshot().Counts
	eventually(r.t, "one success in the window", func() bool {
		return r.snapshot().Breaker.Requests == 1 && r.told().words == words{success: 1}
	})
	r.words = words{success: 1}
}

// trip fails calls, one after the other is counted, until the circuit is open: 3 of
// a fresh one with touchyHystrix.
func (r *rig) trip() {
	r.t.Helper()
	for range 100 {
		// hystrix-go may be told of a failure later than the guard, which waits for it.
		for began := time.Now(); time.Since(began) < 5*time.Millisecond; time.Sleep(200 * time.Microsecond) {
			if r.state() == "open" {
				return
			}
		}
		r.fail(1)
	}
	r.t.Fatalf("100 failures do not open: %+v", *r.snapshot().Breaker)
}

// fail makes calls that fail, and waits until they are counted.
func (r *rig) fail(n int) {
	r.t.Helper()
	for range n {
		before := r.snapshot().Breaker.Failures
		if err := r.do(r.t.Context(), "UNAVAILABLE"); err == nil {
			r.t.Fatal("no error")
		}
		eventually(r.t, "a failure is counted", func() bool {
			b := r.snapshot().Breaker
			return b.State != "closed" || b.Failures > before
		})
	}
}

// heal closes the circuit with one success.
func (r *rig) heal() {
	r.t.Helper()
	r.wake()
	eventually(r.t, "a probe is let through and closes", func() bool {
		if err := r.do(r.t.Context(), ""); err != nil && reasonOf(err) != interceptors.ReasonBreakerOpen {
			r.t.Fatal(err)
		}
		return r.state() == "closed"
	})
	r.closed()
	r.doze()
}

// closed waits until hystrix-go has closed too.
func (r *rig) closed() {
	r.t.Helper()
	eventually(r.t, "the circuit closes", func() bool {
		return r.state() == "closed" && !r.circuit().IsOpen()
	})
	r.words, r.rejected = words{}, r.snapshot().Counts.Rejected[interceptors.ReasonBreakerOpen]
}

// must makes a call that succeeds.
func (r *rig) must(text string) {
	r.t.Helper()
	if err := r.do(r.t.Context(), text); err != nil {
		r.t.Fatalf("call %q: %v", text, err)
	}
}

// mustNot makes a call that the breaker rejects.
func (r *rig) mustNot() {
	r.t.Helper()
	if err := r.do(r.t.Context(), ""); reasonOf(err) != interceptors.ReasonBreakerOpen {
		r.t.Fatalf("%v, want a rejection by the breaker", err)
	}
}

// begin makes a call in the background and waits until it is admitted.
func (r *rig) begin(ctx context.Context, text string) *pending {
	r.t.Helper()
	before, p := r.snapshot().Counts.Admitted, new(pending)
	go func() { p.end.Store(&callEnd{err: r.do(ctx, text)}) }()
	eventually(r.t, "the call is admitted", func() bool { return r.snapshot().Counts.Admitted > before })
	return p
}

// probe wakes the circuit, makes the call that is its probe in the background, and
// has it doze again.
func (r *rig) probe(ctx context.Context, text string) *pending {
	r.t.Helper()
	r.wake()
	before := r.snapshot().Counts.Admitted
	p := new(pending)
	again := func() {
		p.end.Store(nil)
		go func() { p.end.Store(&callEnd{err: r.do(ctx, text)}) }()
	}
	again()
	eventually(r.t, "a probe is let through", func() bool {
		if p.ended() && reasonOf(p.result().err) == interceptors.ReasonBreakerOpen {
			again()
		}
		return r.snapshot().Counts.Admitted > before
	})
	r.doze()
	return p
}

// ends waits for a call and checks how it ended.
func (r *rig) ends(p *pending, want codes.Code) {
	r.t.Helper()
	eventually(r.t, "the call ends", p.ended)
	if err := p.result().err; status.Code(err) != want {
		r.t.Fatalf("%v, want %v", err, want)
	}
}

// is checks the state of the breaker, which no time changes without a call. Of a
// result, hystrix-go may be told a little later than the guard.
func (r *rig) is(want string) {
	r.t.Helper()
	eventually(r.t, "the breaker of "+r.name+" is "+want, func() bool { return r.state() == want })
}

// ended waits until no call is left and checks the outcomes, since the rig was made
// or fresh, and that no permit is out.
func (r *rig) ended(want ended) {
	r.t.Helper()
	var got ended
	idle := func() bool {
		c, b := r.snapshot().Counts, r.counts
		got = ended{c.Success - b.Success, c.Failure - b.Failure, c.Neutral - b.Neutral, c.Dropped - b.Dropped}
		return c.Success+c.Failure+c.Neutral+c.Dropped == c.Admitted && r.guard.Snapshot().Drain.InFlight == 0
	}
	eventually(r.t, "every call has ended", idle)
	if got != want {
		r.t.Errorf("%v %s ended %+v, want %+v", r.side, r.method, got, want)
	}
	l := r.snapshot().ConcurrencyLimit
	eventually(r.t, "every permit is back", func() bool { // an outcome comes first
		l = r.snapshot().ConcurrencyLimit
		return l == nil || l.InFlight == 0 && l.Streams == 0
	})
	checkIdle(r.t, r.guard.Guard)
}

// heard checks what the collector was told since the circuit closed, or the rig was
// made: each of these, every short circuit, and nothing else.
func (r *rig) heard(want words) {
	r.t.Helper()
	var got words
	var all told
	complete := func() bool {
		all = r.told()
		got = all.words.plus(r.words, -1)
		short := int(r.snapshot().Counts.Rejected[interceptors.ReasonBreakerOpen] - r.rejected)
		return got == want && all.short == short && all.attempts == all.words.sum()+short && all.errors == all.words.failure+all.words.timeout+short
	}
	for deadline := time.Now().Add(5 * time.Second); !complete(); time.Sleep(200 * time.Microsecond) {
		if time.Now().After(deadline) {
			r.t.Fatalf("%s: told %+v and in all %+v, want %+v and %d short circuits", r.name, got, all, want,
				r.snapshot().Counts.Rejected[interceptors.ReasonBreakerOpen]-r.rejected)
		}
	}
	if all.strange != "" {
		r.t.Errorf("%s: %s", r.name, all.strange)
	}
}

// onHystrixArms runs a test on arms.
func onHystrixArms(t *testing.T, arms []arm, f func(t *testing.T, a arm)) {
	t.Helper()
	for _, a := range arms {
		t.Run(a.name, func(t *testing.T) { f(t, a) })
	}
}
