package balance

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/balancer/base"
	"google.golang.org/grpc/balancer/endpointsharding"
	"google.golang.org/grpc/balancer/pickfirst"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/resolver"
)

// Build implements balancer.Builder.
func (builder) Build(cc balancer.ClientConn, opts balancer.BuildOptions) balancer.Balancer {
	b := &p2c{ClientConn: cc, target: opts.Target.String()}
	b.child = endpointsharding.NewBalancer(b, opts, balancer.Get(pickfirst.Name).Build, endpointsharding.Options{})
	return b
}

// p2c is the balancer of one channel, until the channel idles. As gRPC's own round_robin
// it has a pick_first for each endpoint, which connects and reconnects; it makes pickers
// of those that are READY.
type p2c struct {
	balancer.ClientConn // of the channel; UpdateState is ours
	child               balancer.Balancer
	target              string

	mu   sync.Mutex
	pool *pool // nil before the first update
}

// UpdateClientConnState takes what the resolver found. Addresses that are there twice are
// one endpoint; those that are gone take their state with them.
func (b *p2c) UpdateClientConnState(s balancer.ClientConnState) error {
	c, ok := s.BalancerConfig.(*config)
	if !ok {
		return balancer.ErrBadResolverState
	}
	b.mu.Lock()
	if b.pool == nil || b.pool.group != c.group {
		b.closeLocked()
		b.pool = newPool(c.group, b.target)
	}
	b.pool.resolved(s.ResolverState.Endpoints)
	b.mu.Unlock()
	return b.child.UpdateClientConnState(balancer.ClientConnState{
		// For client side health checks, as in round_robin.
		ResolverState: pickfirst.EnableHealthListener(s.ResolverState),
	})
}

// UpdateState makes a picker of what the child says of its endpoints.
func (b *p2c) UpdateState(s balancer.State) {
	b.mu.Lock()
	defer b.mu.Unlock()
	children := endpointsharding.ChildStatesFromPicker(s.Picker)
	switch {
	case b.pool == nil: // a resolver error before the first addresses
	case s.ConnectivityState == connectivity.Ready:
		if made := b.pool.connected(children); len(made.ready) > 0 {
			s.Picker = made
			break
		}
		// The child still speaks of the list before, and is about to be told of the one that
		// came: calls wait.
		s = balancer.State{ConnectivityState: connectivity.Connecting, Picker: base.NewErrPicker(balancer.ErrNoSubConnAvailable)}
	default:
		b.pool.connected(nil)
		if len(children) == 0 {
			s.Picker = base.NewErrPicker(errNoAddress)
		}
	}
	b.ClientConn.UpdateState(s)
}

var errNoAddress = errors.New(Name + ": the resolver found no address")

// ResolverError implements balancer.Balancer. After a good update it changes nothing.
func (b *p2c) ResolverError(err error) { b.child.ResolverError(err) }

// UpdateSubConnState implements balancer.Balancer; gRPC tells the children themselves.
func (b *p2c) UpdateSubConnState(balancer.SubConn, balancer.SubConnState) {}

// ExitIdle implements balancer.Balancer.
func (b *p2c) ExitIdle() { b.child.ExitIdle() }

// Close implements balancer.Balancer.
func (b *p2c) Close() {
	b.child.Close()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closeLocked()
}

func (b *p2c) closeLocked() {
	if b.pool != nil {
		b.pool.group.forget(b.pool)
	}
	b.pool = nil
}

// pool is the endpoints of a channel.
type pool struct {
	group   *Group
	target  string
	survey  survey
	ejects  atomic.Bool   // some are ejected
	panics  atomic.Bool   // so few are usable that ejections are not heeded
	refused atomic.Uint64 // picks that found all endpoints at their limit

	mu        sync.Mutex
	endpoints *resolver.EndpointMap[*endpoint]
}

func newPool(g *Group, target string) *pool {
	p := &pool{group: g, target: target, endpoints: resolver.NewEndpointMap[*endpoint]()}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.pools[p] = struct{}{}
	return p
}

func (g *Group) forget(p *pool) {
	g.mu.Lock()
	delete(g.pools, p)
	g.mu.Unlock()
	g.hooks.Closed()
}

// resolved takes the addresses that there are now. Those of the first list are not new:
// it is the client that starts.
func (p *pool) resolved(found []resolver.Endpoint) {
	p.mu.Lock()
	defer p.mu.Unlock()
	first, settings := p.endpoints.Len() == 0, p.group.settings.Load()
	next := resolver.NewEndpointMap[*endpoint]()
	for _, r := range found {
		e, known := p.endpoints.Get(r)
		if !known {
			e, known = next.Get(r)
		}
		if !known {
			e = newEndpoint(r, first)
			p.armLocked(e, settings)
		}
		next.Set(r, e)
	}
	p.endpoints = next
	p.reviewLocked(settings, nil)
}

// connected makes a picker of the endpoints that have a connection.
func (p *pool) connected(children []endpointsharding.ChildState) *picker {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.group.hooks.Now()
	for _, e := range p.endpoints.All() {
		e.ready = false
	}
	made := &picker{pool: p}
	for _, c := range children {
		e, ok := p.endpoints.Get(c.Endpoint)
		if !ok || c.State.ConnectivityState != connectivity.Ready {
			continue
		}
		e.ready = true
		e.begun.CompareAndSwap(0, int64(max(now, 1)))
		made.ready = append(made.ready, choice{endpoint: e, picker: c.State.Picker})
	}
	p.reviewLocked(p.group.settings.Load(), nil)
	p.survey.due.Store(0)
	return made
}

// between two surveys.
const surveyEvery = 100 * time.Millisecond
