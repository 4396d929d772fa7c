// Package balance is gRPC's load balancing policy resilience_p2c: of two endpoints drawn
// at random, the one that is expected to answer sooner. A Group is what the balancers of
// one guard have in common; the service config of the guard's channels names it. Times
// are durations since the guard's epoch.
package balance

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/serviceconfig"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/limiter"
)

// Name is the policy's name in gRPC's registry and in service configs.
const Name = "resilience_p2c"

// gRPC takes balancers in init functions alone.
func init() { balancer.Register(builder{}) }

// Verdict is what the end of an attempt says about its endpoint.
type Verdict uint8

const (
	// Neutral says nothing.
	Neutral Verdict = iota
	// Success counts for the endpoint, and its time is a latency.
	Success
	// Failure counts against it.
	Failure
	// Expired is a deadline that was too short to be held against the endpoint. It would have
	// taken longer, that is all.
	Expired
	// Shed is a rejection: no failure, but nothing to come back to soon.
	Shed
)

// Hooks are what a Group asks its guard. They are called on the path of calls and must be
// safe for concurrent use.
type Hooks struct {
	// Now is the time.
	Now func() time.Duration
	// Judge judges the error of an attempt, never nil. had is the time that the caller
	// gave it.
	Judge func(ctx context.Context, method string, err error, had time.Duration) Verdict
	// Ejected is told of ejections and returns. It may do what it likes.
	Ejected func(Ejection)
	// Limited makes the error of a call that finds all endpoints at their limit.
	Limited func(method string, retryAfter time.Duration) error
	// Closed is told when a balancer is closed: its channel is, or idles, or has another
	// service config.
	Closed func()
}

// Settings are the parameters of a policy. They are not validated here.
type Settings struct {
	// Decay is the time constant in which latencies fade. Positive.
	Decay time.Duration
	// SlowStart is how long a new endpoint takes to a full share; 0: none.
	SlowStart time.Duration

	// Breaker is what the breaker of each endpoint is made from; nil: there are none.
	Breaker *breaker.Config
	// LatencyFactor makes an attempt slow for its breaker: it took this many times the
	// median latency of the endpoints. 0: none is slow.
	LatencyFactor int
	// MaxEjectionPercent of the endpoints, rounded down, may be ejected.
	MaxEjectionPercent int
	// PanicThreshold is the percentage of endpoints that are connected and not ejected
	// below which ejections are not heeded.
	PanicThreshold int

	// Rate is the limit of each endpoint; nil: none.
	Rate *Rate
}

// Rate is what a limit of attempts per second is made from, see limiter.NewBucket and,
// with Pacing, limiter.NewPacer.
type Rate struct {
	PerSecond float64
	Burst     int
	Pacing    bool
}

func (r *Rate) limit() *limiter.Rate {
	if r.Pacing {
		return limiter.NewPacer(r.PerSecond, r.Burst, 0)
	}
	return limiter.NewBucket(r.PerSecond, r.Burst, 0)
}

// Ejection is news of an endpoint.
type Ejection struct {
	Target, Address string
	Ejected         bool          // or brought back
	Cause           breaker.Cause // of Ejected
	For             time.Duration // if Ejected
}

// Group makes the balancers of one guard. It is safe for concurrent use.
type Group struct {
	hooks    Hooks
	number   uint64 // in service configs
	settings atomic.Pointer[Settings]

	mu    sync.Mutex
	pools map[*pool]struct{}
}

// NewGroup returns a group that a service config can name as long as it is referred to.
func NewGroup(s Settings, hooks Hooks) *Group {
	g := &Group{hooks: hooks, number: lastGroup.Add(1), pools: map[*pool]struct{}{}}
	g.settings.Store(&s)
	groups.Store(g.number, weak.Make(g))
	runtime.AddCleanup(g, func(number uint64) { groups.Delete(number) }, g.number)
	return g
}

// Service configs are text, so a group is found by its number. A weak pointer: channels
// refer to their group by themselves, and a guard that is gone leaves nothing behind.
var (
	lastGroup atomic.Uint64
	groups    sync.Map // of weak.Pointer[Group], by number
)

// Set changes the parameters of all balancers.
func (g *Group) Set(s Settings) {
	g.settings.Store(&s)
	for _, p := range g.all() {
		p.set(&s)
	}
}

// all returns the pools that there are.
func (g *Group) all() []*pool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Collect(maps.Keys(g.pools))
}

// Number is the group's in service configs.
func (g *Group) Number() uint64 { return g.number }

// Config is the item of a service config's loadBalancingConfig that names the group.
func (g *Group) Config() string { return fmt.Sprintf(`{%q:{"guard":%d}}`, Name, g.number) }

// config is what the item is parsed to.
type config struct {
	serviceconfig.LoadBalancingConfig
	group *Group
}

// builder implements balancer.Builder and balancer.ConfigParser.
type builder struct{}

// Name implements balancer.Builder.
func (builder) Name() string { return Name }

// ParseConfig finds the group. The default service config is parsed when a channel is
// made, from options that refer to the guard.
func (builder) ParseConfig(text json.RawMessage) (serviceconfig.LoadBalancingConfig, error) {
	var c struct{ Guard uint64 }
	if err := json.Unmarshal(text, &c); err != nil {
		return nil, fmt.Errorf("%s: %w", Name, err)
	}
	if p, ok := groups.Load(c.Guard); ok {
		if g := p.(weak.Pointer[Group]).Value(); g != nil {
			return &config{group: g}, nil
		}
	}
	return nil, fmt.Errorf("%s: found guard %d, allowed only in what a guard's DialOptions make of client.load_balancing", Name, c.Guard)
}
