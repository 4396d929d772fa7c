package limiter

import (
	"math"
	"sync"
	"time"

	"go.uber.org/ratelimit"
)

// pacer spaces calls evenly. The schedule is that of go.uber.org/ratelimit (a leaky
// bucket as a meter, with slack), whose Take sleeps, without a context, and cannot
// say no. Its clock here shows the time that it is given and its Sleep returns at
// once: then Take makes a reservation and says for when. One reservation is always
// in hand, so that the time of the next call is known before anybody takes it, and
// a call that is refused or leaves takes nothing.
type pacer struct {
	interval time.Duration // whole nanoseconds: rates are exact to 0.05 %
	slack    int

	mu      sync.Mutex
	limiter ratelimit.Limiter
	clock   pacerClock
	next    time.Duration // of the reservation in hand
}

// pacerClock shows the time that it was set to. Its times are far from 0, which is
// the limiter's word for "never".
type pacerClock struct{ now time.Duration }

var pacerEpoch = time.Unix(1e9, 0)

func (c *pacerClock) Now() time.Time    { return pacerEpoch.Add(c.now) }
func (*pacerClock) Sleep(time.Duration) {}

func newPacer(rate float64, slack int) *pacer {
	interval := time.Duration(math.Round(float64(time.Second) / rate))
	p := &pacer{interval: interval, slack: slack}
	p.limiter, p.next = p.newLimiter(), -p.memory()-1
	return p
}

func (p *pacer) newLimiter() ratelimit.Limiter {
	return ratelimit.New(1, ratelimit.Per(p.interval), ratelimit.WithSlack(p.slack), ratelimit.WithClock(&p.clock))
}

func (p *pacer) take(now time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch late := now - p.next; {
	case late > 0 && p.slack == 0: // no early call makes up for it
		p.limiter = p.newLimiter()
		p.reserveLocked(now)
	case late > p.memory(): // nor for more than the slack
		p.reserveLocked(now)
	}
	if p.next > now {
		return false
	}
	p.reserveLocked(now)
	return true
}

// memory is how long the limiter remembers a permission that nobody took.
func (p *pacer) memory() time.Duration { return time.Duration(p.slack+1) * p.interval }

func (p *pacer) reserveLocked(now time.Duration) {
	p.clock.now = now
	p.next = p.limiter.Take().Sub(pacerEpoch)
}

func (p *pacer) delay(now time.Duration, ahead int) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return max(0, p.next+time.Duration(ahead)*p.interval-now)
}

// available is 1 or 0: how much of the slack is left, the limiter does not say.
func (p *pacer) available(now time.Duration) float64 {
	if p.delay(now, 0) > 0 {
		return 0
	}
	return 1
}

func (p *pacer) idle(now time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return now-p.next > p.memory()
}
