package interceptors

import (
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/ratelimit"
	"google.golang.org/grpc"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/limiter"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/policy"
)

// maxStates bounds the (target, method) pairs of one side that get state of
// their own by being called. Names of methods can come from outside.
const maxStates = 4096

// idleSweep is the least time between two looks for idle client state. State is
// evicted when two looks in a row find it idle, so after one to two of these.
const idleSweep = time.Minute

// maxName bounds, in bytes, the names of methods that are kept because of a call.
const maxName = 1024

// overflow is shown in place of the methods, and of the targets, beyond
// maxStates.
const overflow = "_OTHER"

// gates is what the policy has for one method, on the client of one target and
// method. It does not change: a reload replaces it, and calls end with the gates that
// they began with. A nil gate is one the policy lacks.
type gates struct {
	*state
	policy        *policy.Effective
	breaker       breaker.Breaker
	rate          *limiter.Rate
	external      ratelimit.Limiter
	unary, stream *limiter.Semaphore // the same one with scope rule
}

// state is what stays of a method while its gates are replaced.
type state struct {
	side           Side
	target, method string                   // canonical target, "" on the server
	gates          atomic.Pointer[gates]    // replaced under side.mu
	recorder       atomic.Pointer[recorder] // nil: the Hystrix stream was not asked for
	seen           uint64                   // guarded by side.mu: counts.admitted at the last sweep
	counts         counts                   // begins a cache line: what calls write beside what they read cost 145 ns a call for 80, on two cores
}

// counts are totals since the state was made. In-flight calls are admitted less
// the four outcomes.
type counts struct {
	admitted    atomic.Uint64
	outcomes    [Dropped + 1]atomic.Uint64
	rejected    [len(reasons)]atomic.Uint64
	transitions transitions
}

// side holds the state of every method of the client or the server side.
type side struct {
	guard *Guard
	side  Side
	rules atomic.Pointer[policy.Table] // replaced under mu

	targets atomic.Pointer[targets] // copied on write

	mu        sync.Mutex // guards writes to targets and everything below
	states    int
	lastSweep time.Duration
	recording bool // new gates get a recorder
}

// targets are known by the name that they were dialled with; they do not change.
type targets struct {
	byName map[string]*target
	only   *target // if there is but one, as on a server and most clients
	name   string  // of only
}

func newTargets(byName map[string]*target) *targets {
	ts := &targets{byName: byName}
	if len(byName) == 1 {
		for ts.name, ts.only = range byName {
		}
	}
	return ts
}

// find returns nil if there is no such target. To compare with one name takes a fifth of
// the time of a look into a map, which is a tenth of what a guard adds to a call.
func (ts *targets) find(dialled string) *target {
	if ts.only != nil && ts.name == dialled {
		return ts.only
	}
	return ts.byName[dialled]
}

// target is one canonical target of client channels, or the server itself.
type target struct {
	name    string
	methods atomic.Pointer[map[string]*state] // copied on write

	// Guarded by side.mu.
	overflow map[string]*state // by the most specific pattern
	shared   map[int]*shared   // by the rule's number
}

// shared are the limiters of a rule with scope rule, and what rate is set to.
type shared struct {
	rate      *limiter.Rate
	rateLimit *policy.RateLimit
	places    *limiter.Semaphore
}

func newSide(g *Guard, s Side, rules *policy.Table) *side {
	sd := &side{guard: g, side: s}
	sd.rules.Store(rules)
	sd.targets.Store(newTargets(map[string]*target{}))
	return sd
}

// lookup returns the gates of a method, nil if no rule is for it.
func (s *side) lookup(cc *grpc.ClientConn, method string) *gates {
	dialled := ""
	if cc != nil {
		dialled = cc.Target()
	}
	if t := s.targets.Load().find(dialled); t != nil {
		if m := (*t.methods.Load())[method]; m != nil {
			return m.gates.Load()
		}
	}
	if s.rules.Load().Effective(method) == nil {
		return nil
	}
	return s.create(cc, dialled, method)
}

// create makes the gates of a method, unless another call just has. It logs when it
// holds no lock: a logger may ask for a Snapshot.
func (s *side) create(cc *grpc.ClientConn, dialled, method string) *gates {
	m, err := s.add(cc, dialled, method)
	if err != nil {
		s.guard.warnNoCircuit(m, err)
	}
	return m
}

func (g *Guard) warnNoCircuit(m *gates, err error) {
	g.log(slog.LevelWarn, "no hystrix circuit: the window engine takes its place",
		slog.String("circuit", g.hystrixName(m)), slog.String("rule", m.policy.Breaker.Rule), slog.String("cause", err.Error()))
}

// add returns nil if a reload has just taken the method's rule away. Its error says
// why the breaker is not of the engine that the policy asks for.
func (s *side) add(cc *grpc.ClientConn, dialled, method string) (m *gates, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rules := s.rules.Load()
	eff := rules.Effective(method)
	if eff == nil {
		return nil, nil
	}
	s.sweepLocked(s.guard.now())
	t := s.targetLocked(cc, dialled)
	if m := (*t.methods.Load())[method]; m != nil {
		return m.gates.Load(), nil
	}
	full := s.states >= maxStates || len(method) > maxName || !utf8.ValidString(method)
	if t.name == overflow || full && !rules.Names(method) {
		if t.overflow[eff.Pattern] == nil {
			st := &state{side: s.side, target: t.name, method: overflow}
			err = s.applyLocked(t, st, eff)
			t.overflow[eff.Pattern] = st
		}
		return t.overflow[eff.Pattern].gates.Load(), err
	}
	st := &state{side: s.side, target: t.name, method: method}
	err = s.applyLocked(t, st, eff)
	t.methods.Store(with(*t.methods.Load(), method, st))
	s.states++
	return st.gates.Load(), err
}

// targetLocked finds the target that the channel was dialled with. Channels
// that spell one target in different ways share it. Beyond the cap, targets
// share one.
func (s *side) targetLocked(cc *grpc.ClientConn, dialled string) *target {
	all := s.targets.Load().byName
	if t := all[dialled]; t != nil {
		return t
	}
	name := ""
	if cc != nil {
		name = cc.CanonicalTarget()
	}
	if len(all) >= maxStates {
		dialled, name = overflow, overflow
		if t := all[dialled]; t != nil {
			return t
		}
	}
	var t *target
	for _, other := range all {
		if other.name == name {
			t = other
		}
	}
	if t == nil {
		t = &target{name: name, overflow: map[string]*state{}, shared: map[int]*shared{}}
		t.methods.Store(&map[string]*state{})
	}
	s.targets.Store(newTargets(*with(all, dialled, t)))
	return t
}

// with returns a copy of m that has one entry more.
func with[V any](m map[string]V, k string, v V) *map[string]V {
	grown := maps.Clone(m)
	grown[k] = v
	return &grown
}

// applyLocked gives a method the gates of a policy. What they share with those that it
// had goes on: a gate is set anew, not made anew, unless it becomes another kind of gate.
func (s *side) applyLocked(t *target, st *state, eff *policy.Effective) error {
	if st.method == overflow && eff.Breaker != nil {
		bare := *eff
		bare.Breaker = nil
		eff = &bare
	}
	old := st.gates.Load()
	if old == nil {
		old = &gates{policy: &policy.Effective{}}
	}
	m := &gates{state: st, policy: eff}
	err := m.addBreaker(s, old)
	m.addRateLimit(s, t, old)
	m.addConcurrencyLimit(t, old)
	if s.recording {
		m.startRecording()
	}
	st.gates.Store(m)
	return err
}

func (m *gates) addBreaker(s *side, old *gates) (err error) {
	b := m.policy.Breaker
	if b == nil {
		return nil
	}
	onTransition := func(tr breaker.Transition) {
		m.counts.transitions.add(tr)
		s.guard.logTransition(m.state, tr)
	}
	window, isWindow := old.breaker.(*breaker.Window)
	// A method that was refused a circuit keeps the engine, and with it its state.
	if was := old.policy.Breaker; b.Hystrix && (!isWindow || !was.Hystrix) {
		var h *breaker.Hystrix
		if h, err = s.guard.newHystrix(m, onTransition); err == nil {
			m.breaker = h
			return nil
		}
	}
	config := breaker.Config{
		ErrorPercent: b.ErrorPercent, RequestVolume: b.RequestVolume, Window: b.Window,
		SleepWindow: b.SleepWindow, MaxSleepWindow: b.MaxSleepWindow, Probes: b.Probes, Lease: b.Lease,
	}
	if b.SlowCall > 0 {
		config.SlowPercent = int32(b.SlowPercent)
	}
	if isWindow {
		window.Set(config, s.guard.now())
		m.breaker = window
	} else {
		m.breaker = breaker.New(config, onTransition)
	}
	return err
}

// newHystrix returns an error if there can be no more circuits: then the window
// engine protects the method.
func (g *Guard) newHystrix(m *gates, onTransition func(breaker.Transition)) (*breaker.Hystrix, error) {
	b, limit := m.policy.Breaker, 0
	if m.policy.Concurrency != nil {
		limit = m.policy.Concurrency.MaxInFlight
	}
	return breaker.NewHystrix(breaker.HystrixConfig{
		Name: g.hystrixName(m), Epoch: g.epoch,
		ErrorPercent: b.ErrorPercent, RequestVolume: b.RequestVolume, SleepWindow: b.SleepWindow,
		Timeout: m.policy.Timeout, MaxConcurrent: limit,
		OnPanic: func(p any) { g.contain("hystrix-go's logger or collector", func() { panic(p) }) },
	}, onTransition)
}

func (g *Guard) hystrixName(m *gates) string {
	return g.hystrixScope().Name(m.side.String(), m.target, m.method)
}

func (m *gates) addRateLimit(s *side, t *target, old *gates) {
	r, was, now := m.policy.RateLimit, old.policy.RateLimit, s.guard.now()
	switch {
	case r == nil:
	case r.External != "":
		m.external = s.guard.opts.limiters[r.External]
	case r.Shared != 0:
		sh := t.sharedLocked(r.Shared)
		sh.rate = setRate(sh.rate, sh.rateLimit, r, now)
		sh.rateLimit, m.rate = r, sh.rate
	case was != nil && was.Shared == 0:
		m.rate = setRate(old.rate, was, r, now)
	default:
		m.rate = newRate(r)
	}
}

// setRate sets a limit that was made from another policy; nil: there is none yet.
func setRate(l *limiter.Rate, was, r *policy.RateLimit, now time.Duration) *limiter.Rate {
	if l == nil {
		return newRate(r)
	}
	same := *was
	same.Rule, same.Shared = r.Rule, r.Shared
	if same != *r {
		l.Become(newRate(r), now)
	}
	return l
}

func newRate(r *policy.RateLimit) *limiter.Rate {
	if r.Pacing {
		return limiter.NewPacer(r.Rate, r.Burst, r.MaxWait)
	}
	return limiter.NewBucket(r.Rate, r.Burst, r.MaxWait)
}

func (m *gates) addConcurrencyLimit(t *target, old *gates) {
	l, was := m.policy.Concurrency, old.policy.Concurrency
	switch {
	case l == nil:
	case l.Shared != 0:
		sh := t.sharedLocked(l.Shared)
		sh.places = setPlaces(sh.places, l.MaxInFlight, l)
		m.unary, m.stream = sh.places, sh.places
	case was != nil && was.Shared == 0:
		m.unary, m.stream = setPlaces(old.unary, l.MaxInFlight, l), setPlaces(old.stream, l.MaxStreams, l)
	default:
		m.unary, m.stream = setPlaces(nil, l.MaxInFlight, l), setPlaces(nil, l.MaxStreams, l)
	}
}

// setPlaces sets a limit; nil: there is none yet.
func setPlaces(s *limiter.Semaphore, limit int, l *policy.Concurrency) *limiter.Semaphore {
	if s == nil {
		return limiter.NewSemaphore(limit, l.MaxQueue, l.MaxQueueWait)
	}
	s.Set(limit, l.MaxQueue, l.MaxQueueWait)
	return s
}

// sharedLocked returns the limiters that a rule's methods share.
func (t *target) sharedLocked(number int) *shared {
	if t.shared[number] == nil {
		t.shared[number] = &shared{}
	}
	return t.shared[number]
}

// sweepLocked forgets client targets all of whose state is as good as new, so
// that targets which come and go cost nothing. A call that found the state just
// before it was dropped runs on it to its end; at worst it is one that the new
// state does not count.
func (s *side) sweepLocked(now time.Duration) {
	if s.side != Client || now-s.lastSweep < idleSweep {
		return
	}
	s.lastSweep = now
	idle := map[*target]bool{}
	s.states = 0
	for _, t := range s.distinctLocked() {
		if idle[t] = t.idleLocked(now); !idle[t] {
			s.states += len(*t.methods.Load())
		}
	}
	kept := maps.Clone(s.targets.Load().byName)
	maps.DeleteFunc(kept, func(_ string, t *target) bool { return idle[t] })
	s.targets.Store(newTargets(kept))
}

// distinctLocked returns the side's targets: one may be known under several names.
func (s *side) distinctLocked() []*target {
	var all []*target
	seen := map[*target]bool{}
	for _, t := range s.targets.Load().byName {
		if !seen[t] {
			seen[t] = true
			all = append(all, t)
		}
	}
	return all
}

func (t *target) idleLocked(now time.Duration) bool {
	idle := true
	for _, m := range t.allLocked() {
		if !m.idle(now) {
			idle = false
		}
		if calls := m.counts.calls(); m.seen != calls {
			m.seen, idle = calls, false
		}
	}
	// Those of scope rule may be in use by calls of methods that are gone.
	for _, sh := range t.shared {
		if sh.rate != nil && !sh.rate.Idle(now) || sh.places != nil && sh.places.InFlight() > 0 {
			idle = false
		}
	}
	return idle
}

// allLocked returns the target's gates, those of the overflow too. The caller holds
// side.mu.
func (t *target) allLocked() []*gates {
	var all []*gates
	for _, st := range *t.methods.Load() {
		all = append(all, st.gates.Load())
	}
	for _, st := range t.overflow {
		all = append(all, st.gates.Load())
	}
	return all
}

// idle reports whether the gates are no different from new ones.
func (m *gates) idle(now time.Duration) bool {
	if m.breaker != nil && !m.breaker.Idle(now) || m.rate != nil && !m.rate.Idle(now) {
		return false
	}
	return m.counts.inFlight() == 0
}

// calls is the number of calls that came, those rejected included.
func (c *counts) calls() uint64 {
	n := c.admitted.Load()
	for i := range c.rejected {
		n += c.rejected[i].Load()
	}
	return n
}

// inFlight never counts a call that has ended: outcomes are read first.
func (c *counts) inFlight() uint64 {
	ended := c.ended()
	return c.admitted.Load() - ended
}

func (c *counts) ended() uint64 {
	var n uint64
	for i := range c.outcomes {
		n += c.outcomes[i].Load()
	}
	return n
}

// slot returns the semaphore for the kind of call, nil without a limit.
func (m *gates) slot(stream bool) *limiter.Semaphore {
	if stream {
		return m.stream
	}
	return m.unary
}

func (m *gates) timeout(stream bool) time.Duration {
	if stream {
		return m.policy.StreamTimeout
	}
	return m.policy.Timeout
}

func (g *Guard) logTransition(m *state, tr breaker.Transition) {
	level, rule := slog.LevelInfo, ""
	if tr.To == breaker.Open {
		level = slog.LevelWarn
	}
	if b := m.gates.Load().policy.Breaker; b != nil { // or a reload has taken it away from under this call
		rule = b.Rule
	}
	g.log(level, "circuit breaker "+tr.To.String(),
		slog.String("side", m.side.String()), slog.String("target", m.target), slog.String("method", m.method),
		slog.String("rule", rule), slog.String("from", tr.From.String()), slog.String("cause", tr.Cause.String()))
}
