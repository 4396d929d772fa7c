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

// gates is the state of one method, on the client of one target and method.
// The pointers are fixed when it is made; a nil gate is one the policy lacks.
type gates struct {
	side           Side
	target, method string // canonical target, "" on the server
	policy         *policy.Effective
	recorder       atomic.Pointer[recorder] // nil: the Hystrix stream was not asked for
	breaker        breaker.Breaker
	rate           *limiter.Rate
	external       ratelimit.Limiter
	unary, stream  *limiter.Semaphore // the same one with scope rule
	seen           uint64             // guarded by side.mu: counts.admitted at the last sweep
	_              [8]byte            // what calls write has cache lines of its own: 80 ns a call for 145 on two cores
	counts         counts
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
	rules *policy.Table

	targets atomic.Pointer[map[string]*target] // by the name it was dialled with; copied on write

	mu        sync.Mutex // guards writes to targets and everything below
	states    int
	lastSweep time.Duration
	recording bool // new gates get a recorder
}

// target is one canonical target of client channels, or the server itself.
type target struct {
	name    string
	methods atomic.Pointer[map[string]*gates] // copied on write

	// Guarded by side.mu.
	overflow map[*policy.Effective]*gates
	shared   map[int]*gates // the limiters of scope rule, by policy's number
}

func newSide(g *Guard, s Side, rules *policy.Table) *side {
	sd := &side{guard: g, side: s, rules: rules}
	sd.targets.Store(&map[string]*target{})
	return sd
}

// lookup returns the gates of a method, nil if no rule is for it.
func (s *side) lookup(cc *grpc.ClientConn, method string) *gates {
	dialled := ""
	if cc != nil {
		dialled = cc.Target()
	}
	if t := (*s.targets.Load())[dialled]; t != nil {
		if m := (*t.methods.Load())[method]; m != nil {
			return m
		}
	}
	eff := s.rules.Effective(method)
	if eff == nil {
		return nil
	}
	return s.create(cc, dialled, method, eff)
}

// create makes the gates of a method, unless another call just has. It logs when it
// holds no lock: a logger may ask for a Snapshot.
func (s *side) create(cc *grpc.ClientConn, dialled, method string, eff *policy.Effective) *gates {
	m, err := s.add(cc, dialled, method, eff)
	if err != nil {
		s.guard.log(slog.LevelWarn, "no hystrix circuit: the window engine takes its place",
			slog.String("circuit", s.guard.hystrixName(m)), slog.String("rule", eff.Breaker.Rule), slog.String("cause", err.Error()))
	}
	return m
}

// add's error says why the breaker is not of the engine that the policy asks for.
func (s *side) add(cc *grpc.ClientConn, dialled, method string, eff *policy.Effective) (m *gates, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sweepLocked(s.guard.now())
	t := s.targetLocked(cc, dialled)
	if m := (*t.methods.Load())[method]; m != nil {
		return m, nil
	}
	full := s.states >= maxStates || len(method) > maxName || !utf8.ValidString(method)
	if t.name == overflow || full && !s.rules.Names(method) {
		m := t.overflow[eff]
		if m == nil {
			bare := *eff
			bare.Breaker = nil
			m, err = s.newGates(t, overflow, &bare)
			t.overflow[eff] = m
		}
		return m, err
	}
	m, err = s.newGates(t, method, eff)
	t.methods.Store(with(*t.methods.Load(), method, m))
	s.states++
	return m, err
}

// targetLocked finds the target that the channel was dialled with. Channels
// that spell one target in different ways share it. Beyond the cap, targets
// share one.
func (s *side) targetLocked(cc *grpc.ClientConn, dialled string) *target {
	all := *s.targets.Load()
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
		t = &target{name: name, overflow: map[*policy.Effective]*gates{}, shared: map[int]*gates{}}
		t.methods.Store(&map[string]*gates{})
	}
	s.targets.Store(with(all, dialled, t))
	return t
}

// with returns a copy of m that has one entry more.
func with[V any](m map[string]V, k string, v V) *map[string]V {
	grown := maps.Clone(m)
	grown[k] = v
	return &grown
}

func (s *side) newGates(t *target, method string, eff *policy.Effective) (*gates, error) {
	m := &gates{side: s.side, target: t.name, method: method, policy: eff}
	err := m.addBreaker(s)
	m.addRateLimit(s, t)
	m.addConcurrencyLimit(t)
	if s.recording {
		m.startRecording()
	}
	return m, err
}

func (m *gates) addBreaker(s *side) (err error) {
	b := m.policy.Breaker
	if b == nil {
		return nil
	}
	onTransition := func(tr breaker.Transition) {
		m.counts.transitions.add(tr)
		s.guard.logTransition(m, tr)
	}
	if b.Hystrix {
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
		config.SlowPercent = b.SlowPercent
	}
	m.breaker = breaker.New(config, onTransition)
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
	return g.hystrix.Name(m.side.String(), m.target, m.method)
}

func (m *gates) addRateLimit(s *side, t *target) {
	r := m.policy.RateLimit
	switch {
	case r == nil:
	case r.External != "":
		m.external = s.guard.opts.limiters[r.External]
	case r.Shared == 0:
		m.rate = newRate(r)
	default:
		shared := t.sharedLocked(r.Shared)
		if shared.rate == nil {
			shared.rate = newRate(r)
		}
		m.rate = shared.rate
	}
}

func newRate(r *policy.RateLimit) *limiter.Rate {
	if r.Pacing {
		return limiter.NewPacer(r.Rate, r.Burst, r.MaxWait)
	}
	return limiter.NewBucket(r.Rate, r.Burst, r.MaxWait)
}

func (m *gates) addConcurrencyLimit(t *target) {
	l := m.policy.Concurrency
	switch {
	case l == nil:
	case l.Shared == 0:
		m.unary = limiter.NewSemaphore(l.MaxInFlight, l.MaxQueue, l.MaxQueueWait)
		m.stream = limiter.NewSemaphore(l.MaxStreams, l.MaxQueue, l.MaxQueueWait)
	default:
		shared := t.sharedLocked(l.Shared)
		if shared.unary == nil {
			shared.unary = limiter.NewSemaphore(l.MaxInFlight, l.MaxQueue, l.MaxQueueWait)
		}
		m.unary, m.stream = shared.unary, shared.unary
	}
}

// sharedLocked returns the holder of the limiters that a rule's methods share.
func (t *target) sharedLocked(number int) *gates {
	if t.shared[number] == nil {
		t.shared[number] = &gates{}
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
	all := *s.targets.Load()
	idle := map[*target]bool{}
	for _, t := range all {
		if _, done := idle[t]; !done {
			idle[t] = t.idleLocked(now)
		}
	}
	kept := make(map[string]*target, len(all))
	for dialled, t := range all {
		if !idle[t] {
			kept[dialled] = t
		}
	}
	s.states = 0
	for t, gone := range idle {
		if !gone {
			s.states += len(*t.methods.Load())
		}
	}
	s.targets.Store(&kept)
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
	return idle
}

// allLocked returns the target's gates, those of the overflow too. The caller holds
// side.mu.
func (t *target) allLocked() []*gates {
	var all []*gates
	for _, m := range *t.methods.Load() {
		all = append(all, m)
	}
	for _, m := range t.overflow {
		all = append(all, m)
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

func (g *Guard) logTransition(m *gates, tr breaker.Transition) {
	level := slog.LevelInfo
	if tr.To == breaker.Open {
		level = slog.LevelWarn
	}
	g.log(level, "circuit breaker "+tr.To.String(),
		slog.String("side", m.side.String()), slog.String("target", m.target), slog.String("method", m.method),
		slog.String("rule", m.policy.Breaker.Rule), slog.String("from", tr.From.String()), slog.String("cause", tr.Cause.String()))
}
