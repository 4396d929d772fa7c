package supervise

import (
	"fmt"
	"slices"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// Backoff is how long a worker waits before it is restarted: the exponential
// backoff of github.com/cenkalti/backoff/v5 with a multiplier of 2. The pause doubles
// with each restart, from Initial to Max, and is jittered by up to a half either
// way, so the longest is 1.5 × Max. A zero field means its default.
type Backoff struct {
	Initial time.Duration // before the first restart; 1ms to Max; default 500ms, or Max if that is shorter
	Max     time.Duration // up to 24h; default 30s, or Initial if that is longer
	Healthy time.Duration // a run that lasted so long makes the next pause Initial again; default 1m
}

// complete sets the defaults and checks the rest.
func (b Backoff) complete() (Backoff, error) {
	if b.Max == 0 {
		b.Max = max(30*time.Second, b.Initial)
	}
	if b.Initial == 0 {
		b.Initial = min(500*time.Millisecond, b.Max)
	}
	if b.Healthy == 0 {
		b.Healthy = time.Minute
	}
	if b.Initial < time.Millisecond || b.Initial > b.Max || b.Max > 24*time.Hour || b.Healthy < 0 {
		return b, fmt.Errorf("WithBackoff: found Initial %v, Max %v, Healthy %v, allowed 1ms <= Initial <= Max <= 24h, 0 < Healthy", b.Initial, b.Max, b.Healthy)
	}
	return b, nil
}

// pace says when a worker is restarted, and when it has been often enough. It is
// used by one run at a time.
type pace struct {
	backoff  *backoff.ExponentialBackOff
	healthy  time.Duration
	max      int
	window   time.Duration
	restarts []time.Time // within the window, the oldest first
}

func newPace(o *options) *pace {
	b := &backoff.ExponentialBackOff{
		InitialInterval:     o.backoff.Initial,
		MaxInterval:         o.backoff.Max,
		Multiplier:          2,
		RandomizationFactor: 0.5,
	}
	b.Reset()
	return &pace{backoff: b, healthy: o.backoff.Healthy, max: o.maxRestarts, window: o.window}
}

// next returns the pause before the next run, after one that lasted for ran and
// has ended now; ok is false if there must be none.
func (p *pace) next(now time.Time, ran time.Duration) (pause time.Duration, ok bool) {
	if ran >= p.healthy {
		p.backoff.Reset()
	}
	if p.window > 0 {
		p.restarts = slices.DeleteFunc(p.restarts, func(at time.Time) bool { return now.Sub(at) >= p.window })
		if len(p.restarts) >= p.max {
			return 0, false
		}
		p.restarts = append(p.restarts, now)
	}
	return p.backoff.NextBackOff(), true
}
