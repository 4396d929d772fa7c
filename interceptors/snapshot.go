package interceptors

import (
	"cmp"
	"slices"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
	"github.com/grpc-resilience/grpc-resilience/interceptors/supervise"
)

// Snapshot is the state of a guard at one time: each gate's values belong
// together, different gates are read one after the other. It marshals to JSON.
type Snapshot struct {
	Methods []MethodSnapshot `json:"methods"` // sorted by side, target, method; those that were called
	Drain   DrainSnapshot    `json:"drain"`
	Panics  uint64           `json:"panics"` // recovered since the guard was made, Goexit included

	// Endpoints are those of living channels with client.load_balancing, sorted by target
	// and address; two channels that have the same one are two entries.
	Endpoints []EndpointSnapshot `json:"endpoints,omitempty"`

	// Listeners are the workers of those that Serve was given, by network and address:
	// "listener tcp 127.0.0.1:8080"; they have stopped once grace has begun.
	Listeners []supervise.WorkerSnapshot `json:"listeners,omitempty"`
}

// EndpointSnapshot is what a channel knows of one of its endpoints.
type EndpointSnapshot struct {
	Target     string            `json:"target"` // canonical
	Address    string            `json:"address"`
	State      string            `json:"state"`               // "connecting" (no connection), "ready", "ejected", or "probing": ejected, with a probe under way
	Weight     float64           `json:"weight"`              // 1: a full share; less in slow start; 0 unless ready
	InFlight   int               `json:"in_flight"`           // attempts, streams included
	Latency    float64           `json:"latency_seconds"`     // EWMA of unary calls that succeeded; 0: not known
	Ejections  map[string]uint64 `json:"ejections"`           // by cause, without zeros: "consecutive_failures", "error_percent", "slow_calls", "probe_failure"
	RetryAfter float64           `json:"retry_after_seconds"` // until an ejected one is probed
}

// MethodSnapshot is the state of one method's gates. A gate that the method does
// not have is nil.
type MethodSnapshot struct {
	Side             Side                      `json:"side"`
	Target           string                    `json:"target"` // canonical; "" on the server
	Method           string                    `json:"method"` // "_OTHER": the methods beyond the cap, together
	Breaker          *BreakerSnapshot          `json:"breaker,omitempty"`
	RateLimit        *RateLimitSnapshot        `json:"rate_limit,omitempty"` // nil for an external limiter too
	ConcurrencyLimit *ConcurrencyLimitSnapshot `json:"concurrency_limit,omitempty"`
	Counts           CountsSnapshot            `json:"counts"`
}

// BreakerSnapshot is the state of a circuit breaker.
type BreakerSnapshot struct {
	Engine     string  `json:"engine"`              // "window" or "hystrix"
	State      string  `json:"state"`               // "closed", "open" or "half_open"
	Requests   uint64  `json:"requests"`            // in the window
	Failures   uint64  `json:"failures"`            // in the window
	RetryAfter float64 `json:"retry_after_seconds"` // until an open breaker lets a probe through
}

// RateLimitSnapshot is the state of a rate limit.
type RateLimitSnapshot struct {
	Rate      float64 `json:"requests_per_second"`
	Available float64 `json:"available"` // tokens
	Waiting   int     `json:"waiting"`   // calls in the queue
}

// ConcurrencyLimitSnapshot is the state of a concurrency limit. With scope rule
// the values are those of all methods that share it, and unary calls and streams
// are counted together, in InFlight.
type ConcurrencyLimitSnapshot struct {
	Limit    int `json:"limit"`     // max_in_flight; 0: unlimited
	InFlight int `json:"in_flight"` // unary calls
	Streams  int `json:"streams"`
	Queued   int `json:"queued"`
}

// CountsSnapshot are totals since the method was first called. Calls in flight
// are Admitted less the four outcomes. A call whose context had ended before it
// was admitted is in none.
type CountsSnapshot struct {
	Admitted    uint64            `json:"admitted"`
	Rejected    map[Reason]uint64 `json:"rejected"`     // without zeros
	WouldReject map[Reason]uint64 `json:"would_reject"` // without zeros
	Success     uint64            `json:"success"`
	Failure     uint64            `json:"failure"`
	Neutral     uint64            `json:"neutral"`
	Dropped     uint64            `json:"dropped"`
}

// DrainSnapshot is how far a drain has come.
type DrainSnapshot struct {
	Phase    string `json:"phase"`     // "serving", "announce", "grace", "cut" or "stopped"
	InFlight int    `json:"in_flight"` // calls being handled by the guard's servers
}

// MarshalText returns "client" or "server".
func (s Side) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Snapshot returns the state of every method that was called, and of the drain.
// It is for people and dashboards, not for the path of a call: it takes the
// gates' locks one after the other. On a nil guard it is empty.
func (g *Guard) Snapshot() Snapshot {
	if g == nil {
		return Snapshot{}
	}
	s := Snapshot{
		Methods: []MethodSnapshot{},
		Drain:   DrainSnapshot{Phase: g.drain.phase().String(), InFlight: g.inflight.count()},
		Panics:  g.panics.Load(),
	}
	now := g.now()
	for _, m := range g.states() {
		s.Methods = append(s.Methods, m.snapshot(now))
	}
	slices.SortStableFunc(s.Methods, func(a, b MethodSnapshot) int {
		return cmp.Or(cmp.Compare(a.Side, b.Side), cmp.Compare(a.Target, b.Target), cmp.Compare(a.Method, b.Method))
	})
	s.Endpoints = g.endpoints()
	for _, w := range g.drain.supervisors() {
		s.Listeners = append(s.Listeners, w.Snapshot()...)
	}
	return s
}

func (g *Guard) endpoints() []EndpointSnapshot {
	stats, _ := g.balancing.group.Stats()
	var all []EndpointSnapshot
	for _, e := range stats {
		s := EndpointSnapshot{
			Target: e.Target, Address: e.Address, State: e.State.String(), Weight: e.Weight, InFlight: e.InFlight,
			Latency: e.Latency.Seconds(), Ejections: map[string]uint64{}, RetryAfter: e.RetryAfter.Seconds(),
		}
		for cause, n := range e.Ejections {
			if n > 0 {
				s.Ejections[breaker.Cause(cause).String()] = n
			}
		}
		all = append(all, s)
	}
	slices.SortStableFunc(all, func(a, b EndpointSnapshot) int {
		return cmp.Or(cmp.Compare(a.Target, b.Target), cmp.Compare(a.Address, b.Address))
	})
	return all
}

// states returns the gates of both sides, in no order.
func (g *Guard) states() []*gates {
	var all []*gates
	for _, s := range []*side{g.client, g.server} {
		s.mu.Lock()
		s.sweepLocked(g.now())
		for _, t := range s.distinctLocked() {
			all = append(all, t.allLocked()...)
		}
		s.mu.Unlock()
	}
	return all
}

func (m *gates) snapshot(now time.Duration) MethodSnapshot {
	s := MethodSnapshot{Side: m.side, Target: m.target, Method: m.method, Counts: m.counts.snapshot()}
	if m.breaker != nil {
		st := m.breaker.Stats(now)
		s.Breaker = &BreakerSnapshot{
			Engine: st.Engine, State: st.State.String(),
			Requests: uint64(st.Requests), Failures: uint64(st.Failures), RetryAfter: st.RetryAfter.Seconds(),
		}
	}
	if m.rate != nil {
		available, waiting := m.rate.Stats(now)
		s.RateLimit = &RateLimitSnapshot{Rate: m.policy.RateLimit.Rate, Available: available, Waiting: waiting}
	}
	if m.unary != nil {
		l := &ConcurrencyLimitSnapshot{Limit: m.policy.Concurrency.MaxInFlight}
		l.InFlight, l.Streams, l.Queued = m.occupied()
		s.ConcurrencyLimit = l
	}
	return s
}

// occupied returns what the concurrency limit, which the method must have, counts.
func (m *gates) occupied() (inFlight, streams, queued int) {
	inFlight, queued = m.unary.Stats()
	if m.stream != m.unary {
		ofStreams := 0
		streams, ofStreams = m.stream.Stats()
		queued += ofStreams
	}
	return inFlight, streams, queued
}

// snapshot reads outcomes before admissions, so that no call has ended that was
// not admitted.
func (c *counts) snapshot() CountsSnapshot {
	s := CountsSnapshot{Rejected: map[Reason]uint64{}, WouldReject: map[Reason]uint64{}}
	s.Success, s.Failure = c.outcomes[Success].Load(), c.outcomes[Failure].Load()
	s.Neutral, s.Dropped = c.outcomes[Neutral].Load(), c.outcomes[Dropped].Load()
	s.Admitted = c.admitted.Load()
	for i := range c.rejected {
		if n := c.rejected[i].Load(); n > 0 {
			s.Rejected[reasons[i].reason] = n
		}
	}
	return s
}
