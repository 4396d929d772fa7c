package interceptors

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/limiter"
)

// noSlotRetry is the RetryInfo of a concurrency limit without max_queue_wait:
// when a place becomes free cannot be known.
const noSlotRetry = 100 * time.Millisecond

// call is a call that a rule is for. It lives on the stack of a unary call and
// inside the wrapper of a stream; once admit has let it pass, whoever holds it
// calls done exactly once.
type call struct {
	guard  *Guard
	gates  *gates
	method string // full name; that of the gates may be overflow
	stream bool
	// Set by admit.
	slot    *limiter.Semaphore // nil: no concurrency limit
	ticket  breaker.Ticket     // zero: no breaker, or its verdict is in already
	arrived time.Duration      // before any wait
	start   time.Duration

	recorded event // as what the call was recorded; zero: it was not, or as a success
}

// admit takes the call through its gates. It returns a *RejectedError when a
// gate said no, and the status of the context when that ended first; in both
// cases nothing is held.
func (c *call) admit(ctx context.Context, now time.Duration) error {
	g, m := c.guard, c.gates
	c.arrived = now
	if err := ctx.Err(); err != nil {
		return status.FromContextError(err).Err()
	}
	if err := c.checkBudget(ctx); err != nil {
		return err
	}
	// A look only: an open breaker spends no token and no place.
	if m.breaker != nil {
		if retry, ok := m.breaker.Ready(now); !ok {
			return c.reject(ReasonBreakerOpen, m.policy.Breaker.Rule, retry)
		}
	}
	waited := false
	if m.rate != nil && !m.rate.Take(now) {
		if err := c.waitForToken(ctx, now); err != nil {
			return err
		}
		waited = true
	}
	if m.external != nil {
		if err := c.askExternal(ctx); err != nil {
			return err
		}
		waited = true // it may have
	}
	if s := m.slot(c.stream); s != nil {
		if s.TryAcquire() {
			c.slot = s
		} else if err := c.waitForSlot(ctx, s); err != nil {
			return err
		} else {
			waited = true
		}
	}
	if waited {
		err := ctx.Err()
		if err != nil {
			err = status.FromContextError(err).Err()
		} else {
			err = c.checkBudget(ctx)
		}
		if err != nil {
			c.release()
			return err
		}
		now = g.now()
	}
	// Last, because a half-open probe must not wait for anything.
	if m.breaker != nil {
		if err := c.acquire(now); err != nil {
			return err
		}
	}
	m.counts.admitted.Add(1)
	c.start = now
	return nil
}

// acquire asks the breaker, when the other gates have said yes.
func (c *call) acquire(now time.Duration) error {
	acquired := false
	defer func() { // also when the logger calls runtime.Goexit
		if !acquired {
			c.release()
		}
	}()
	var retry time.Duration
	if c.ticket, retry, acquired = c.gates.breaker.Acquire(now); !acquired {
		return c.reject(ReasonBreakerOpen, c.gates.policy.Breaker.Rule, retry)
	}
	return nil
}

func (c *call) release() {
	if c.slot != nil {
		c.slot.Release()
	}
}

// end judges how the call ended and is done, even if a classifier calls
// runtime.Goexit.
func (c *call) end(ctx context.Context, e *ending) (out Outcome) {
	if e.err == nil && !e.unwound && ctx.Err() == nil { // the usual end: nobody need be asked
		c.done(Success, breaker.Success)
		return Success
	}
	out = Failure
	defer func() { c.done(out, e.result(ctx, out)) }()
	out = c.judge(ctx, e)
	return out
}

// done records how the call ended and gives its permits back.
func (c *call) done(out Outcome, r breaker.Result) {
	// Last: who waits for the place must find the breaker as this call leaves it.
	// Deferred: the verdict may log, and the logger is the user's.
	defer c.release()
	now := c.guard.now()
	if rec := c.gates.recorder.Load(); rec != nil {
		c.recordEnd(rec, r, now)
	}
	c.gates.counts.outcomes[out].Add(1)
	c.verdict(r, now)
}

// verdict tells the breaker how the call went; it is no news if the first
// response of a stream has told that already (see answered).
func (c *call) verdict(r breaker.Result, now time.Duration) {
	if c.gates.breaker == nil {
		return
	}
	slow := false
	if limit := c.gates.policy.Breaker.SlowCall; limit > 0 && !c.stream {
		slow = now-c.start >= limit
	}
	c.gates.breaker.Done(c.ticket, now, r, slow)
}

func (c *call) checkBudget(ctx context.Context) error {
	budget := c.gates.policy.MinimumBudget
	if budget == 0 {
		return nil
	}
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < budget {
		return c.reject(ReasonBudgetTooSmall, c.gates.policy.BudgetRule, 0)
	}
	return nil
}

func (c *call) waitForToken(ctx context.Context, now time.Duration) error {
	g, m := c.guard, c.gates
	verdict := m.rate.Wait(ctx, g.now)
	if verdict == limiter.Refused {
		return c.reject(ReasonRateLimited, m.policy.RateLimit.Rule, m.rate.RetryAfter(now))
	}
	later := g.now()
	g.contain("meter", func() { g.metrics.waited(m, "rate_limit", later-now) })
	switch verdict {
	case limiter.Admitted:
		return nil
	case limiter.Ended:
		return status.FromContextError(ctx.Err()).Err()
	}
	return c.reject(ReasonRateLimited, m.policy.RateLimit.Rule, m.rate.RetryAfter(later))
}

func (c *call) waitForSlot(ctx context.Context, s *limiter.Semaphore) error {
	g, limit := c.guard, c.gates.policy.Concurrency
	began := g.now()
	wait := ctx
	if timeout := c.gates.timeout(c.stream); timeout > 0 { // no longer than it may run
		var cancel context.CancelFunc
		wait, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	verdict := s.Acquire(wait)
	if verdict == limiter.Admitted {
		c.slot = s
	}
	if verdict != limiter.Refused {
		metered := false
		defer func() { // also when the meter calls runtime.Goexit
			if !metered {
				c.release()
			}
		}()
		g.contain("meter", func() { g.metrics.waited(c.gates, "concurrency_limit", g.now()-began) })
		metered = true
	}
	reason, retry := ReasonConcurrencyLimited, noSlotRetry
	switch verdict {
	case limiter.Admitted:
		return nil
	case limiter.Ended, limiter.TimedOut:
		if err := ctx.Err(); err != nil {
			return status.FromContextError(err).Err()
		}
		reason = ReasonQueueTimeout
	}
	if limit.MaxQueueWait > 0 {
		retry = limit.MaxQueueWait // by then the queue has turned over
	}
	return c.reject(reason, limit.Rule, retry)
}

// askExternal lets the limiter given in Go decide. One that panics admits.
func (c *call) askExternal(ctx context.Context) error {
	m := c.gates
	var err error
	c.guard.contain("limiter "+m.policy.RateLimit.External, func() { err = m.external.Limit(ctx) })
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return status.FromContextError(ctx.Err()).Err()
	}
	return c.reject(ReasonRateLimited, m.policy.RateLimit.Rule, 0)
}

func (c *call) reject(reason Reason, rule string, retryAfter time.Duration) error {
	c.gates.counts.rejected[reason.index()].Add(1)
	c.recorded = c.gates.recordRejection(reason, c.guard)
	return &RejectedError{Side: c.gates.side, Method: c.method, Rule: rule, Reason: reason, RetryAfter: retryAfter}
}

// streamCall is the call of a stream, whose first response and whose end may be
// seen on two goroutines.
type streamCall struct {
	mu    sync.Mutex // guards ended, and call until that is set
	ended bool
	call  call
}

// answered makes the first response of a half-open probe its verdict. The verdict
// logs, so it is not told under the lock.
func (s *streamCall) answered() {
	var early breaker.Ticket // zero: Done does nothing
	s.mu.Lock()
	if !s.ended {
		early, s.call.ticket = s.call.ticket, early
	}
	s.mu.Unlock()
	s.call.gates.breaker.Done(early, s.call.guard.now(), breaker.Success, false)
}

// over marks the end and reports whether it is news.
func (s *streamCall) over() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	first := !s.ended
	s.ended = true
	return first
}
