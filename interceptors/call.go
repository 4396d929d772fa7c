package interceptors

import (
	"context"
	"time"

	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/limiter"
)

// noSlotRetry is the RetryInfo of a concurrency limit without a queue: when a
// place becomes free cannot be known.
const noSlotRetry = 100 * time.Millisecond

// call is an admitted call. It lives on the stack of a unary call and inside the
// wrapper of a stream; whoever holds it calls done exactly once.
type call struct {
	guard   *Guard
	gates   *gates
	slot    *limiter.Semaphore // nil: no concurrency limit
	ticket  breaker.Ticket     // zero: no breaker, or its verdict is in already
	start   time.Duration
	timeout time.Duration // the policy's, for this kind of call; 0: none
	stream  bool
}

// admit takes a call through the gates. It returns a *RejectedError when a gate
// said no, and the status of the context when that ended first; in both cases
// nothing is held.
func (g *Guard) admit(ctx context.Context, m *gates, stream bool, now time.Duration) (call, error) {
	if err := ctx.Err(); err != nil {
		return call{}, status.FromContextError(err).Err()
	}
	c := call{guard: g, gates: m, timeout: m.timeout(stream), stream: stream}
	if err := m.checkBudget(ctx); err != nil {
		return call{}, err
	}
	// A look only: an open breaker spends no token and no place.
	if m.breaker != nil {
		if retry, ok := m.breaker.Ready(now); !ok {
			return call{}, m.reject(ReasonBreakerOpen, m.policy.Breaker.Rule, retry)
		}
	}
	waited := false
	if m.rate != nil && !m.rate.Take(now) {
		if err := g.waitForToken(ctx, m, now); err != nil {
			return call{}, err
		}
		waited = true
	}
	if m.external != nil {
		if err := g.askExternal(ctx, m); err != nil {
			return call{}, err
		}
		waited = true // it may have
	}
	if s := m.slot(stream); s != nil {
		if !s.TryAcquire() {
			if err := g.waitForSlot(ctx, m, s); err != nil {
				return call{}, err
			}
			waited = true
		}
		c.slot = s
	}
	if waited {
		err := ctx.Err()
		if err != nil {
			err = status.FromContextError(err).Err()
		} else {
			err = m.checkBudget(ctx)
		}
		if err != nil {
			c.release()
			return call{}, err
		}
		now = g.now()
	}
	// Last, because a half-open probe must not wait for anything.
	if m.breaker != nil {
		ticket, retry, ok := m.breaker.Acquire(now)
		if !ok {
			c.release()
			return call{}, m.reject(ReasonBreakerOpen, m.policy.Breaker.Rule, retry)
		}
		c.ticket = ticket
	}
	m.counts.admitted.Add(1)
	c.start = now
	return c, nil
}

func (c *call) release() {
	if c.slot != nil {
		c.slot.Release()
	}
}

// end judges how the call ended and is done, even if a classifier calls
// runtime.Goexit.
func (c *call) end(ctx context.Context, e ending) {
	out := Failure
	defer func() { c.done(out) }()
	out = c.judge(ctx, e)
}

// done records how the call ended and gives its permits back.
func (c *call) done(out Outcome) {
	now := c.guard.now()
	c.release()
	c.gates.counts.outcomes[out].Add(1)
	c.verdict(out, now) // last: it logs, and the logger is the user's
}

// verdict tells the breaker how the call went, once: a stream that is a probe
// does so at its first response message, and is then no news at its end.
func (c *call) verdict(out Outcome, now time.Duration) {
	if c.gates.breaker == nil {
		return
	}
	slow := false
	if limit := c.gates.policy.Breaker.SlowCall; limit > 0 && !c.stream {
		slow = now-c.start >= limit
	}
	c.gates.breaker.Done(c.ticket, now, results[out], slow)
	c.ticket = breaker.Ticket{}
}

var results = [...]breaker.Result{
	Success: breaker.Success,
	Failure: breaker.Failure,
	Neutral: breaker.Ignored,
	Dropped: breaker.Ignored,
}

func (m *gates) checkBudget(ctx context.Context) error {
	budget := m.policy.MinimumBudget
	if budget == 0 {
		return nil
	}
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < budget {
		return m.reject(ReasonBudgetTooSmall, m.policy.Rule, 0)
	}
	return nil
}

func (g *Guard) waitForToken(ctx context.Context, m *gates, now time.Duration) error {
	verdict := m.rate.Wait(ctx, g.now)
	if verdict == limiter.Refused {
		return m.reject(ReasonRateLimited, m.policy.RateLimit.Rule, m.rate.RetryAfter(now))
	}
	later := g.now()
	g.metrics.waited(m, "rate_limit", later-now)
	switch verdict {
	case limiter.Admitted:
		return nil
	case limiter.Ended:
		return status.FromContextError(ctx.Err()).Err()
	}
	return m.reject(ReasonRateLimited, m.policy.RateLimit.Rule, m.rate.RetryAfter(later))
}

func (g *Guard) waitForSlot(ctx context.Context, m *gates, s *limiter.Semaphore) error {
	limit := m.policy.Concurrency
	began := g.now()
	verdict := s.Acquire(ctx)
	if verdict != limiter.Refused {
		g.metrics.waited(m, "concurrency_limit", g.now()-began)
	}
	reason, retry := ReasonConcurrencyLimited, noSlotRetry
	switch verdict {
	case limiter.Admitted:
		return nil
	case limiter.Ended:
		return status.FromContextError(ctx.Err()).Err()
	case limiter.TimedOut:
		reason = ReasonQueueTimeout
	}
	if limit.MaxQueueWait > 0 {
		retry = limit.MaxQueueWait // by then the queue has turned over
	}
	return m.reject(reason, limit.Rule, retry)
}

// askExternal lets the limiter given in Go decide. One that panics admits.
func (g *Guard) askExternal(ctx context.Context, m *gates) error {
	var err error
	g.contain("limiter "+m.policy.RateLimit.External, func() { err = m.external.Limit(ctx) })
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return status.FromContextError(ctx.Err()).Err()
	}
	return m.reject(ReasonRateLimited, m.policy.RateLimit.Rule, 0)
}

func (m *gates) reject(reason Reason, rule string, retryAfter time.Duration) error {
	m.counts.rejected[reason.index()].Add(1)
	return &RejectedError{Side: m.side, Method: m.method, Rule: rule, Reason: reason, RetryAfter: retryAfter}
}
