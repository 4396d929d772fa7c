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
//
// With slack, Take says now for a reservation that is due, whenever it was due. So
// the limiter has none, and a clock that is slow by the slack instead: the same
// schedule, and it says when.
type pacer struct {
	interval time.Duration // whole nanoseconds, rounded up: rates are exact to 0.1 %, and never exceeded
	slack    time.Duration

	mu      sync.Mutex
	limiter ratelimit.Limiter
	clock   pacerClock
	begun   bool
	closed  bool
	next    time.Duration // of the reservation in hand, once begun
	skipped time.Duration // is added to the times of the limiter
}

// pacerClock shows the time that it was set to. Its times are far from 0, which is
// the limiter's word for "never".
type pacerClock struct{ now time.Duration }

var pacerEpoch = time.Unix(1e9, 0)

func (c *pacerClock) Now() time.Time    { return pacerEpoch.Add(c.now) }
func (*pacerClock) Sleep(time.Duration) {}

func newPacer(rate float64, slack int) *pacer {
	interval := time.Duration(math.Ceil(float64(time.Second) / rate))
	p := &pacer{interval: interval, slack: time.Duration(slack) * interval}
	p.limiter = ratelimit.New(1, ratelimit.Per(interval), ratelimit.WithoutSlack, ratelimit.WithClock(&p.clock))
	return p
}

func (p *pacer) take(now time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		return false
	case !p.begun: // the first call is alone
		p.begun = true
		p.reserveLocked(now)
	case now-p.next > p.slack: // no more early calls make up for a pause
		p.skipped += p.interval // or else the limiter would reckon from the last call
		p.reserveLocked(now - p.slack)
	}
	if p.next > now {
		return false
	}
	p.reserveLocked(now - p.slack)
	return true
}

// reserveLocked reserves the time that is an interval after the last one, or
// earliest if a skip has made that later.
func (p *pacer) reserveLocked(earliest time.Duration) {
	p.clock.now = earliest + p.skipped
	p.next = p.limiter.Take().Sub(pacerEpoch) - p.skipped
}

func (p *pacer) delay(now time.Duration, ahead int) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	next := p.next
	if !p.begun {
		next = now
	}
	return max(0, next+time.Duration(ahead)*p.interval-now)
}

// available is 1 or 0: whether a call would be admitted.
func (p *pacer) available(now time.Duration) float64 {
	if p.delay(now, 0) > 0 {
		return 0
	}
	return 1
}

// close's permissions are the call that is due and the early ones, or the part of an
// interval that has passed since the last one was due.
func (p *pacer) close(now time.Duration) (at time.Duration, permissions float64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	if !p.begun {
		return now, 1
	}
	at = max(now, p.next-p.interval)
	return at, 1 + float64(min(at-p.next, p.slack))/float64(p.interval)
}

// open begins the schedule with a reservation.
func (p *pacer) open(at time.Duration, permissions float64) {
	early := min(math.Round((permissions-1)*float64(p.interval)), float64(p.slack))
	p.begun = true
	p.reserveLocked(at - time.Duration(early))
}

// idle: what a pause can give is all there. A new pacer gives less, its first call
// is alone.
func (p *pacer) idle(now time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.begun || now-p.next >= p.slack
}
