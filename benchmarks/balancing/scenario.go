package main

import (
	"log"
	"maps"
	"regexp"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
)

// A scenario is what happens to the replicas of each arm from time 0 on.
type scenario struct {
	name  string
	about string
	fault behaviour // of the first replica, until the fault ends; the zero value: of none
	// Instead of a fault: what happens until the end.
	script  func(f *fleet, every time.Duration, end time.Time)
	victim  bool // the script is the first replica's
	control bool // there is one more arm, ours without the fault
}

const (
	even        = "all alike"
	slow        = "one is slow"
	unavailable = "one fails: UNAVAILABLE"
	exhausted   = "one rejects: RESOURCE_EXHAUSTED"
	silent      = "one is a black hole"
	rolling     = "rolling restart"
	flapping    = "one fails every other second"
	dying       = "one dies every other second"
)

// ourControl has the same minutes as the others: times of two runs may differ by what
// neighbours do.
const ourControl = ours + ", without the fault"

var scenarios = []scenario{
	{name: even, about: "nothing happens", script: func(*fleet, time.Duration, time.Time) {}},
	{name: slow, about: "one of ten takes ten times as long", fault: behaviour{slower: 10}, control: true},
	{name: unavailable, about: "one of ten answers `UNAVAILABLE` at once", fault: behaviour{code: codes.Unavailable}},
	{name: exhausted, about: "one of ten answers `RESOURCE_EXHAUSTED` at once", fault: behaviour{code: codes.ResourceExhausted}},
	{name: silent, about: "one of ten accepts calls and never answers", fault: behaviour{silent: true}},
	{name: rolling, about: "one replica after the other is stopped gracefully, is gone for half a second and comes back; then one and a half seconds nothing", script: restartAll},
	{name: flapping, about: "one of ten answers `UNAVAILABLE` for a second, is well for one, and so on", script: flap, victim: true},
	{name: dying, about: "one of ten is killed with its connections, is gone for a second, is back for one, and so on", script: die, victim: true},
}

func restartAll(f *fleet, every time.Duration, end time.Time) {
	for _, r := range f.replicas {
		if time.Now().After(end) {
			return
		}
		next := time.Now().Add(every)
		r.drain()
		time.Sleep(every / 4)
		r.listen(r.addr)
		time.Sleep(time.Until(next))
	}
}

func flap(f *fleet, every time.Duration, end time.Time) {
	for time.Now().Before(end) {
		f.replicas[0].behave(behaviour{code: codes.Unavailable})
		time.Sleep(every / 2)
		f.replicas[0].behave(behaviour{})
		time.Sleep(every / 2)
	}
}

func die(f *fleet, every time.Duration, end time.Time) {
	for time.Now().Before(end) {
		f.replicas[0].kill()
		time.Sleep(every / 2)
		f.replicas[0].listen(f.replicas[0].addr)
		time.Sleep(every / 2)
	}
}

// ends reports whether the fault does before the calls do.
func (s scenario) ends() bool { return s.script == nil }

// spans are how long the fault, or whatever happens, lasts and when the calls end.
func (s scenario) spans(set settings) (fault, end time.Duration) {
	if s.ends() {
		return set.fault, set.fault + set.after
	}
	return set.unfaulty, set.unfaulty
}

// play makes the calls of one arm.
func (s scenario) play(f *fleet, a arm, list []time.Duration, zero time.Time, set settings) []sample {
	conn := a.connect(f)
	defer conn.Close()
	fault, end := s.spans(set)
	var script sync.WaitGroup
	script.Go(func() {
		time.Sleep(time.Until(zero))
		if !s.ends() {
			s.script(f, set.every, zero.Add(end))
			return
		}
		f.replicas[0].behave(s.fault)
		time.Sleep(time.Until(zero.Add(fault)))
		f.replicas[0].behave(behaviour{})
	})
	defer script.Wait()
	return offer(conn, f, list, zero)
}

// outcome is what came of a scenario for one arm.
type outcome struct {
	p50, p99         float64 // ms
	failed, failedOn float64 // percent of all, and of those after the balancer had time to settle
	share            float64 // percent of a fair one; of the one that is bad
	back             time.Duration
	returned         bool // within the time that it was watched
}

func (s scenario) outcome(samples []sample, set settings) (o outcome) {
	fault, end := s.spans(set)
	bad := between(samples, 0, fault)
	o.p50, o.p99 = quantile(bad, 0.5), quantile(bad, 0.99)
	o.failed, o.failedOn = failed(bad), failed(between(samples, set.settled, fault))
	o.share = share(bad, 0)
	const span, step, enough = time.Second, 100 * time.Millisecond, 80
	for o.back = 0; fault+o.back+span <= end; o.back += step {
		from := fault + o.back
		if share(between(samples, from, from+span), 0) >= enough && share(between(samples, from, end), 0) >= enough {
			o.returned = true
			return o
		}
	}
	return o
}

// measured is everything that a run has found.
type measured struct {
	set   settings
	runs  []run
	picks []pickCost
}

// run is what the arms made of a scenario.
type run struct {
	scenario
	samples  map[string][]sample // by arm
	outcomes map[string]outcome
	late     float64 // ms, the calls of all arms
}

// undisturbed is the most that calls may begin late, in ms: as a replica takes to answer.
const undisturbed = 10

func (r run) disturbed() bool { return r.late > undisturbed }

func measure(set settings, pattern *regexp.Regexp) *measured {
	m := &measured{set: set}
	picks := new(pickRounds)
	if pattern.MatchString("pick") {
		picks = newPickRounds(set)
	}
	picks.turn(set.pickTurns)
	for _, s := range scenarios {
		if pattern.MatchString(s.name) {
			m.runs = append(m.runs, s.least(set))
			picks.turn(set.pickTurns)
		}
	}
	m.picks = picks.costs()
	return m
}

// least plays the scenario until nobody disturbs it, or as often as may be, and returns
// the run that was disturbed least.
func (s scenario) least(set settings) (best run) {
	for i := range set.attempts {
		r := s.run(set)
		log.Printf("%s: calls began %.1f ms late", s.name, r.late)
		if i == 0 || r.late < best.late {
			best = r
		}
		if !best.disturbed() {
			break
		}
	}
	return best
}

// run plays the scenario with all arms at the same time.
func (s scenario) run(set settings) run {
	r := run{scenario: s, samples: map[string][]sample{}, outcomes: map[string]outcome{}}
	_, end := s.spans(set)
	list := arrivals(set.rate, -set.warmUp, end)
	zero := time.Now().Add(set.warmUp + 100*time.Millisecond)
	here := arms
	if s.control {
		control := arms[0]
		control.name = ourControl
		here = append(slices.Clone(here), control)
	}
	var mu sync.Mutex
	var all sync.WaitGroup
	for i, a := range here {
		all.Go(func() {
			f := newFleet(i+1, a.orca)
			defer f.stop()
			played := s
			if a.name == ourControl {
				played.fault = behaviour{}
			}
			samples := played.play(f, a, list, zero, set)
			mu.Lock()
			defer mu.Unlock()
			r.samples[a.name], r.outcomes[a.name] = samples, s.outcome(samples, set)
		})
	}
	all.Wait()
	r.late = lateness(slices.Concat(slices.Collect(maps.Values(r.samples))...))
	return r
}
