package balance

import (
	"context"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/balancer"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
)

// picker chooses among the endpoints that had a connection when it was made. It is
// immutable and holds no lock.
type picker struct {
	pool  *pool
	ready []choice // at least one
}

type choice struct {
	*endpoint
	picker balancer.Picker // of its pick_first
}

// Pick implements balancer.Picker: the power of two choices (M. Mitzenmacher, 2001).
func (p *picker) Pick(info balancer.PickInfo) (balancer.PickResult, error) {
	g := p.pool.group
	settings, now := g.settings.Load(), g.hooks.Now()
	p.survey(now)
	call := callOf(info.Ctx)
	var failed *endpoint
	if call != nil {
		failed = call.last.Load()
		call.retried(now)
	}
	c, ticket := p.choose(now, settings, failed)
	if c == nil {
		p.pool.refused.Add(1)
		return balancer.PickResult{}, g.hooks.Limited(info.FullMethodName, p.retryAfter(now))
	}
	result, err := c.picker.Pick(info)
	if err != nil {
		c.settle(ticket, now, breaker.Ignored, false)
		return result, err
	}
	a := newAttempt()
	a.ctx, a.method, a.pool, a.endpoint = info.Ctx, info.FullMethodName, p.pool, c.endpoint
	a.start, a.inner, a.ticket = now, result.Done, ticket
	if call != nil {
		call.last.Store(c.endpoint)
		a.call, a.stream = call, call.stream
	}
	c.inFlight.Add(1)
	result.Done = a.done
	return result, nil
}

// choose draws two endpoints and tries the better one first, then the other. If neither
// takes the call it draws again, and at last tries all. failed, where the call has been
// before, comes after all others. It returns nil if all are at their rate limit.
func (p *picker) choose(now time.Duration, s *Settings, failed *endpoint) (*choice, breaker.Ticket) {
	n, full := len(p.ready), false
	for range draws {
		i, j := draw(n)
		if i != j && p.prefers(p.ready[j].endpoint, p.ready[i].endpoint, now, s, failed) {
			i, j = j, i
		}
		for _, k := range [...]int{i, j} {
			c := &p.ready[k]
			if c.endpoint == failed {
				continue
			}
			t, v := p.pool.admit(c.endpoint, now)
			if v == admitted {
				return c, t
			}
			full = full || v == limited
		}
	}
	from := rand.IntN(n)
	for _, again := range [...]bool{false, true} {
		for k := range n {
			c := &p.ready[(from+k)%n]
			if (c.endpoint == failed) != again {
				continue
			}
			t, v := p.pool.admit(c.endpoint, now)
			if v == admitted {
				return c, t
			}
			full = full || v == limited
		}
	}
	if full {
		return nil, breaker.Ticket{}
	}
	return &p.ready[from], breaker.Ticket{} // all were ejected since the last review: then none is
}

// draws are several because an endpoint that is listed behind ejected ones would otherwise
// get their calls beside its own.
const draws = 4

// draw returns two different numbers below n, which are the same if n is 1. One random
// number does for both: a half of it, multiplied with n, overflows 32 bits into an index,
// and is off by less than n/2^32.
func draw(n int) (i, j int) {
	r := rand.Uint64()
	i = int(r & math.MaxUint32 * uint64(n) >> 32)
	if j = int(r >> 32 * uint64(n-1) >> 32); j >= i && n > 1 {
		j++
	}
	return i, j
}

// retryAfter is when the first of the endpoints that are not ejected is below its limit
// again.
func (p *picker) retryAfter(now time.Duration) time.Duration {
	least := time.Duration(math.MaxInt64)
	for i := range p.ready {
		heeded := p.ready[i].gate.Load().ejected && !p.pool.panics.Load()
		if r := p.ready[i].rate.Load(); r != nil && !heeded {
			least = min(least, r.RetryAfter(now))
		}
	}
	if least == math.MaxInt64 { // the limits are gone since the call met them
		return 0
	}
	return least
}

// prefers reports whether b is to be tried rather than a.
func (p *picker) prefers(b, a *endpoint, now time.Duration, s *Settings, failed *endpoint) bool {
	switch {
	case a == failed || b == failed:
		return a == failed
	case p.pool.ejects.Load() && (a.due(now) || b.due(now)):
		return !a.due(now)
	}
	return p.better(b, a, now, s)
}

// better reports whether a is better than b. An endpoint in slow start takes part with a
// chance of its weight. Then the rule of Prequal (Wydrowski et al., NSDI 2024): one that
// has far more calls in flight than others is hot and taken only beside another that is,
// then the one with fewer; of two others, the one with the lower cost. One whose last
// attempt failed is cold because nobody goes there: it is judged by its cost.
func (p *picker) better(a, b *endpoint, now time.Duration, s *Settings) bool {
	if x, y := a.takesPart(now, s), b.takesPart(now, s); x != y {
		return x
	}
	limit := p.pool.survey.hot.Load()
	x, y := a.inFlight.Load(), b.inFlight.Load()
	switch hotA, hotB := x > limit, y > limit; {
	case hotA && hotB:
		return x < y
	case hotA && !b.failing.Load():
		return false
	case hotB && !a.failing.Load():
		return true
	}
	others := time.Duration(p.pool.survey.latency.Load())
	return a.cost(now, s.Decay, others) < alike*b.cost(now, s.Decay, others)
}

// alike costs are equal, or the slightly slower of two would never be taken.
const alike = 0.9

func (e *endpoint) takesPart(now time.Duration, s *Settings) bool {
	w := e.weight(now, s.SlowStart)
	return w == 1 || rand.Float64() < w
}

// survey is what is known of the endpoints together, a moment ago.
type survey struct {
	due     atomic.Int64  // time of the next one
	latency atomic.Int64  // the median of the endpoints' latencies in ns; 0: none is known
	cost    atomic.Uint64 // that of their costs: bits of a float64
	hot     atomic.Int64  // who has more in flight is hot
}

// sampled bounds what a survey costs.
const sampled = 64

// survey looks at the endpoints, or at a random part of them, if it is time to. The
// medians are lower ones: of two endpoints the better one is the measure. Who fails is
// none.
func (p *picker) survey(now time.Duration) {
	s := &p.pool.survey
	due := s.due.Load()
	if int64(now) < due || !s.due.CompareAndSwap(due, int64(now+surveyEvery)) {
		return
	}
	var inFlight, latencies [sampled]int64
	var costs [sampled]float64
	n, known := min(len(p.ready), sampled), 0
	from := rand.IntN(len(p.ready))
	for i := range n {
		e := p.ready[(from+i)%len(p.ready)].endpoint
		inFlight[i] = e.inFlight.Load()
		if mean := load(&e.mean); mean > 0 && !e.failing.Load() {
			latencies[known], costs[known] = int64(mean), mean*float64(inFlight[i]+1)
			known++
		}
	}
	slices.Sort(inFlight[:n])
	hot := int64(math.MaxInt64)
	if n > 2 { // of two, how few the other one has says nothing
		hot = 2*inFlight[(n-1)/2] + calm
	}
	s.hot.Store(hot)
	if known > 0 {
		slices.Sort(latencies[:known])
		slices.Sort(costs[:known])
		s.latency.Store(latencies[(known-1)/2])
		store(&s.cost, costs[(known-1)/2])
	}
}

// calm is how many in flight never make an endpoint hot. Prequal's limit is a quantile of
// what all have: with it, who has a few more by chance sends calls to a slow endpoint.
const calm = 16

// attempt is one try of a call at an endpoint. It is reused when it is done, with the
// function that gRPC calls then: a pick allocates nothing.
type attempt struct {
	ctx      context.Context
	method   string
	pool     *pool
	endpoint *endpoint
	start    time.Duration
	ticket   breaker.Ticket
	stream   bool
	call     *Call                   // nil: the context has none
	inner    func(balancer.DoneInfo) // of the endpoint's own picker; nil: none
	done     func(balancer.DoneInfo) // a.end
}

var attempts sync.Pool

func newAttempt() *attempt {
	a, _ := attempts.Get().(*attempt)
	if a == nil {
		a = new(attempt)
		a.done = a.end
	}
	return a
}

// end is called once, when gRPC is done with the attempt.
func (a *attempt) end(info balancer.DoneInfo) {
	if a.inner != nil {
		a.inner(info)
	}
	if open := info.Err == nil && info.BytesReceived; open && a.call != nil && a.call.sends {
		copied := *a
		copied.ctx = a.call.Context // gRPC cancels its own
		a.call.open.Store(&copied)
	} else {
		a.judge(info, a.pool.group.hooks.Now())
	}
	a.endpoint.inFlight.Add(-1)
	*a = attempt{done: a.done}
	attempts.Put(a)
}

// judge learns from the end. What was never sent, or had no answer at all and yet no
// error, says nothing: the connection was closing, or had just gone.
func (a *attempt) judge(info balancer.DoneInfo, now time.Duration) {
	verdict := Neutral
	switch {
	case !info.BytesSent:
	case info.Err != nil:
		verdict = a.pool.group.hooks.Judge(a.ctx, a.method, info.Err, a.had(now))
	case info.BytesReceived:
		verdict = Success
	}
	a.settle(now, verdict)
}

// settle tells the endpoint.
func (a *attempt) settle(now time.Duration, v Verdict) {
	e, settings := a.endpoint, a.pool.group.settings.Load()
	took, result, slow := now-a.start, breaker.Ignored, false
	switch v {
	case Success:
		if result = breaker.Success; a.stream {
			e.succeed()
			break
		}
		e.observe(now, took, settings.Decay)
		median := a.pool.survey.latency.Load()
		slow = settings.LatencyFactor > 0 && median > 0 && int64(took) >= int64(settings.LatencyFactor)*median
	case Expired:
		if !a.stream {
			e.exceed(now, took, settings.Decay)
		}
	case Failure, Shed:
		e.penalize(now, load(&a.pool.survey.cost))
		if v == Failure {
			result = breaker.Failure
		}
	}
	e.settle(a.ticket, now, result, slow)
}

// had is the time that the caller gave the attempt.
func (a *attempt) had(now time.Duration) time.Duration {
	if deadline, ok := a.ctx.Deadline(); ok {
		return time.Until(deadline) + now - a.start
	}
	return math.MaxInt64
}
