package balance

import (
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
)

// State is what a channel does with an endpoint.
type State uint8

const (
	// Connecting has no connection.
	Connecting State = iota
	// Ready takes calls.
	Ready
	// Ejected is passed over.
	Ejected
	// Probing was ejected, and waits for the end of the call that finds out how it is.
	Probing
)

// String is the state's name in metrics.
func (s State) String() string {
	return [...]string{"connecting", "ready", "ejected", "probing"}[s]
}

// Stats describes an endpoint of a channel.
type Stats struct {
	Target, Address string
	State           State
	Weight          float64 // 0 to 1: of the share of others
	InFlight        int
	Latency         time.Duration // of unary calls that succeeded; 0: not known
	RetryAfter      time.Duration // of an ejected one: until it is probed
	Ejections       [breaker.ConsecutiveFailures + 1]uint64
}

// Stats describes the endpoints of all channels, in no order, and counts the calls that
// found all endpoints of their channel at their rate limit, by target.
func (g *Group) Stats() (endpoints []Stats, refused map[string]uint64) {
	now, settings := g.hooks.Now(), g.settings.Load()
	refused = map[string]uint64{}
	for _, p := range g.all() {
		refused[p.target] += p.refused.Load()
		p.mu.Lock()
		for _, e := range p.endpoints.All() {
			endpoints = append(endpoints, e.statsLocked(p.target, now, settings))
		}
		p.mu.Unlock()
	}
	return endpoints, refused
}

func (e *endpoint) statsLocked(target string, now time.Duration, s *Settings) Stats {
	st := Stats{
		Target: target, Address: e.address, InFlight: int(e.inFlight.Load()),
		Latency: time.Duration(load(&e.mean)), Ejections: e.ejection.causes,
	}
	switch {
	case !e.ready:
	case e.ejection.ejected:
		st.State = Ejected
		b := e.ejection.breaker.Stats(now)
		if st.RetryAfter = b.RetryAfter; b.State == breaker.HalfOpen {
			st.State = Probing
		}
	default:
		st.State, st.Weight = Ready, e.weight(now, s.SlowStart)
	}
	return st
}
