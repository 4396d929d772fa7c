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
//   - Limits of scope rule are those of the rule that has such a limit and one of the old
//     rule's patterns.
//   - Another engine, another scope, or a block that was not there, begins anew: it does
//     not know the calls that are under way.
//   - A limit that is gone lets who waits go at once.
//   - Counts go on; a method that is given nothing any more, because no rule is for it or
//     all of its blocks are disabled, loses them with its state.
//   - client.load_balancing sets its parameters in living channels. Once DialOptions was
//     called, it cannot be switched on or off, and retry cannot change: an error says so.
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
	refused, err := g.reload(p)
	if err != nil {
		g.reloads.rejected.Add(1)
		return err
	}
	g.reloads.applied.Add(1)
	// Without the lock: a logger may call back.
	for m, err := range refused {
		g.warnNoCircuit(m, err)
	}
	g.warnRetries(g.client.rules.Load())
	g.log(slog.LevelInfo, "policy reloaded",
		slog.Int("client_rules", len(p.GetClient().GetRules())), slog.Int("server_rules", len(p.GetServer().GetRules())))
	return nil
}

// reload returns why gates have a breaker of another engine than they are to have, if
// that is new.
func (g *Guard) reload(p *resiliencev1.Policy) (refused map[*gates]error, err error) {
	g.reloading.Lock()
	defer g.reloading.Unlock() // also when a collector of hystrix-go's calls runtime.Goexit
	c, err := g.opts.compile(p)
	if err != nil {
		return nil, err
	}
	errs := []error{g.balancing.reloadable(c)}
	for _, srv := range g.served {
		errs = append(errs, checkMethods(c.server, srv))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	g.nameCircuits(c)
	g.drain.policy.Store(&c.drain)
	g.balancing.reload(c)
	refused = map[*gates]error{}
	g.client.reload(c.client, refused)
	g.server.reload(c.server, refused)
	return refused, nil
}

// reload gives every method of a side the gates of other rules.
func (s *side) reload(rules *policy.Table, refused map[*gates]error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	earlier := s.rules.Load()
	rates, places := rules.Predecessors(earlier, policy.SharesRate), rules.Predecessors(earlier, policy.SharesPlaces)
	s.rules.Store(rules)
	s.states = 0
	for _, t := range s.distinctLocked() {
		before := t.limitsLocked()
		t.shareLocked(rules, rates, places, s.guard.now())
		methods := maps.Clone(*t.methods.Load())
		maps.DeleteFunc(methods, func(method string, st *state) bool {
			return !s.reapplyLocked(t, st, rules.Effective(method), refused)
		})
		t.methods.Store(&methods)
		maps.DeleteFunc(t.overflow, func(pattern string, st *state) bool {
			return !s.reapplyLocked(t, st, rules.Of(pattern), refused)
		})
		s.states += len(methods)
		before.lift(t.limitsLocked(), s.guard.now())
	}
}

// reapplyLocked reports whether there is anything to apply.
func (s *side) reapplyLocked(t *target, st *state, eff *policy.Effective, refused map[*gates]error) bool {
	if eff == nil {
		return false
	}
	if err := s.applyLocked(t, st, eff); err != nil {
		refused[st.gates.Load()] = err
	}
	return true
}

// shareLocked gives the limiters of scope rule to the rules that go on with them, by
// their numbers: those of the new rules, and what they were. It sets them, for no method
// of such a rule need have been called.
func (t *target) shareLocked(rules *policy.Table, rates, places map[int]int, now time.Duration) {
	earlier := t.shared
	t.shared = map[int]*shared{}
	for number, before := range rates {
		if was := earlier[before]; was != nil && was.rate != nil {
			r, _ := rules.Shared(number)
			sh := t.sharedLocked(number)
			sh.rate, sh.rateLimit = setRate(was.rate, was.rateLimit, r, now), r
		}
	}
	for number, before := range places {
		if was := earlier[before]; was != nil && was.places != nil {
			_, l := rules.Shared(number)
			t.sharedLocked(number).places = setPlaces(was.places, l.MaxInFlight, l)
		}
	}
}

// limits are those that calls may wait at.
type limits struct {
	rates  map[*limiter.Rate]bool
	places map[*limiter.Semaphore]bool
}

func (t *target) limitsLocked() limits {
	all := limits{map[*limiter.Rate]bool{}, map[*limiter.Semaphore]bool{}}
	for _, m := range t.allLocked() {
		all.rates[m.rate], all.places[m.unary], all.places[m.stream] = true, true, true
	}
	for _, sh := range t.shared {
		all.rates[sh.rate], all.places[sh.places] = true, true
	}
	delete(all.rates, nil)
	delete(all.places, nil)
	return all
}

// lift lets those go who wait at limits that are not among those that stay.
func (l limits) lift(stay limits, now time.Duration) {
	for r := range l.rates {
		if !stay.rates[r] {
			r.Become(limiter.NewBucket(1e7, 1e7, time.Hour), now) // the fastest that there is
		}
	}
	for s := range l.places {
		if !stay.places[s] {
			s.Set(0, 0, 0)
		}
	}
}
