package balance

import (
	"context"
	"testing"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/balancer/endpointsharding"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/resolver"
)

// channel is what a balancer tells its channel.
type channel struct {
	balancer.ClientConn // nil: nothing else is called
	state               balancer.State
}

func (c *channel) UpdateState(s balancer.State) { c.state = s }

// ready is the balancer of an endpoint, which is connected at once.
type ready struct {
	balancer.ClientConn
	name string
	last *string
}

func (r *ready) UpdateClientConnState(s balancer.ClientConnState) error {
	r.name = s.ResolverState.Endpoints[0].Addresses[0].Addr
	r.say(connectivity.Ready)
	return nil
}

func (r *ready) say(s connectivity.State) {
	r.UpdateState(balancer.State{ConnectivityState: s, Picker: child{name: r.name, last: r.last}})
}

func (r *ready) ResolverError(error)                                        {}
func (r *ready) UpdateSubConnState(balancer.SubConn, balancer.SubConnState) {}
func (r *ready) ExitIdle()                                                  {}
func (r *ready) Close()                                                     {}

// A connection may change after the resolver's list came, and before those who have the
// connections of the list before were told of it.
func TestOldConnectionsBesideANewList(t *testing.T) {
	m := newSim(t, settings(), 0, nil)
	var cc channel
	var children []*ready
	b := &p2c{ClientConn: &cc}
	b.child = endpointsharding.NewBalancer(b, balancer.BuildOptions{}, func(cc balancer.ClientConn, _ balancer.BuildOptions) balancer.Balancer {
		r := &ready{ClientConn: cc, last: &m.last}
		children = append(children, r)
		return r
	}, endpointsharding.Options{})
	list := func(names ...string) balancer.ClientConnState {
		s := balancer.ClientConnState{BalancerConfig: &config{group: m.group}}
		for _, name := range names {
			s.ResolverState.Endpoints = append(s.ResolverState.Endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: name}}})
		}
		return s
	}
	pick := func(want string, wantErr error) {
		t.Helper()
		m.last = ""
		if _, err := cc.state.Picker.Pick(balancer.PickInfo{Ctx: context.Background()}); err != wantErr || m.last != want {
			t.Errorf("picked %q, %v", m.last, err)
		}
	}
	update := func(s balancer.ClientConnState) {
		t.Helper()
		if err := b.UpdateClientConnState(s); err != nil {
			t.Fatal(err)
		}
	}
	update(list("a", "b"))
	b.pool.resolved(list("c").ResolverState.Endpoints)
	children[0].say(connectivity.TransientFailure)
	if cc.state.ConnectivityState != connectivity.Connecting {
		t.Errorf("the channel is %v", cc.state.ConnectivityState)
	}
	pick("", balancer.ErrNoSubConnAvailable)
	update(list("c"))
	pick("c", nil)
	b.Close()
}
