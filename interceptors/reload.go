package interceptors

import (
	"errors"
	"log/slog"
	"maps"
	"sync/atomic"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/limiter"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/policy"
	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
)

// reloads counts what became of the policies that Reload was given.
type reloads struct{ applied, rejected atomic.Uint64 }

// Reload enforces another policy from now on, on both sides, without a restart. It is
// all or nothing: an error lists every mistake, as that of New does, and changes
// nothing. Beyond what New checks, an exact pattern must be a method of every server
// that Serve serves. The options are those that New was given.
//
// Parameters change inside living gates, and what a block has not changed is not
// touched:
//
//   - A breaker keeps its state and the results in its window; a new length of the
//     window begins an empty one. With engine hystrix the circuit stays the same one.
//   - A rate limit keeps the tokens that it has, up to the new burst. Who waits keeps
//     its place and its max_wait; who would now wait longer than that is rejected.
//   - A concurrency limit keeps its calls: a lower one admits nobody until enough have
//     ended, a higher one lets who waits go at once.
//   - Limits of scope rule are those of the rule that has one of the old rule's patterns.
//   - Another engine, or another scope, begins anew.
//   - A limit that is gone lets who waits go at once.
//   - Counts go on; a method that no rule is for any more loses them with its state.
//   - server.drain is read when a drain comes to the phase.
//
// Calls that have begun keep their timeout, and end with the gates that they began
// with. Reload may be called at any time, by a handler, too, and while the server drains;
// several at once go one after the other. A closed or nil guard returns an error; so does
// a nil policy, where an empty one takes all rules away. Counted in
// resilience.config.reloads.
func (g *Guard) Reload(p *resiliencev1.Policy) error {
	if err := g.usable(); err != nil {
		return err
	}
	g.reloading.Lock()
	refused, err := g.reloadLocked(p)
	g.reloading.Unlock()
	if err != nil {
		g.reloads.rejected.Add(1)
		return err
	}
	g.reloads.applied.Add(1)
	// Without the lock: a logger may call back.
	for m, err := range refused {
		g.warnNoCircuit(m, err)
	}
	g.log(slog.LevelInfo, "policy reloaded",
		slog.Int("client_rules", len(p.GetClient().GetRules())), slog.Int("server_rules", len(p.GetServer().GetRules())))
	return nil
}

// reloadLocked returns why gates have a breaker of another engine than they are to
// have, if that is new.
func (g *Guard) reloadLocked(p *resiliencev1.Policy) (refused map[*gates]error, err error) {
	c, err := g.opts.compile(p)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, srv := range g.served {
		errs = append(errs, checkMethods(c.server, srv))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	g.nameCircuits(c)
	g.drain.policy.Store(&c.drain)
	refused = map[*gates]error{}
	g.client.reload(c.client, refused)
	g.server.reload(c.server, refused)
	return refused, nil
}

// reload gives every method of a side the gates of other rules.
func (s *side) reload(rules *policy.Table, refused map[*gates]error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	from := rules.Predecessors(s.rules.Load())
	s.rules.Store(rules)
	s.states = 0
	for _, t := range s.distinctLocked() {
		before := t.allLocked()
		t.renumberLocked(from)
		methods := maps.Clone(*t.methods.Load())
		maps.DeleteFunc(methods, func(method string, st *state) bool {
			return !s.reapplyLocked(t, st, rules.Effective(method), refused)
		})
		t.methods.Store(&methods)
		maps.DeleteFunc(t.overflow, func(pattern string, st *state) bool {
			return !s.reapplyLocked(t, st, rules.Of(pattern), refused)
		})
		s.states += len(methods)
		t.liftLocked(before, s.guard.now())
	}
}

// reapplyLocked reports whether there is anything to apply.
func (s *side) reapplyLocked(t *target, st *state, eff *policy.Effective, refused map[*gates]error) bool {
	if eff == nil {
		return false
	}
	was := st.gates.Load().policy.Breaker
	if err := s.applyLocked(t, st, eff); err != nil && (was == nil || !was.Hystrix) {
		refused[st.gates.Load()] = err
	}
	return true
}

// renumberLocked gives the limiters of scope rule the numbers of other rules.
func (t *target) renumberLocked(from map[int]int) {
	earlier := t.shared
	t.shared = map[int]*shared{}
	for number, before := range from {
		if sh := earlier[before]; sh != nil {
			t.shared[number] = sh
		}
	}
}

// liftLocked lets those go who wait at limits that no method has any more.
func (t *target) liftLocked(before []*gates, now time.Duration) {
	rates, places := map[*limiter.Rate]bool{nil: true}, map[*limiter.Semaphore]bool{nil: true}
	for _, m := range t.allLocked() {
		rates[m.rate], places[m.unary], places[m.stream] = true, true, true
	}
	for _, m := range before {
		if !rates[m.rate] {
			m.rate.Become(limiter.NewBucket(1e7, 1e7, 0), now) // the fastest that there is
		}
		for _, s := range []*limiter.Semaphore{m.unary, m.stream} {
			if !places[s] {
				s.Set(0, 0, 0)
			}
		}
	}
	for _, sh := range t.shared {
		if !rates[sh.rate] {
			sh.rate = nil
		}
		if !places[sh.places] {
			sh.places = nil
		}
	}
}
