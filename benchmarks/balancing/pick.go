package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	estats "google.golang.org/grpc/experimental/stats"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/serviceconfig"
)

// pickCost is what a pick and the end of a call take.
type pickCost struct {
	arm       string
	endpoints int
	ns        float64 // of the best round
	allocs    float64
}

// configs notes what the service configs of channels say, by the balancer: so the picks
// are those of the very channel options that the arms have.
type configs struct {
	balancer.Builder
	mu   sync.Mutex
	last serviceconfig.LoadBalancingConfig
}

// gRPC takes balancers in init functions alone; the last of a name counts.
func init() {
	for _, a := range arms {
		c := &configs{Builder: balancer.Get(a.name)}
		noted[a.name] = c
		balancer.Register(c)
	}
}

var noted = map[string]*configs{}

// ParseConfig implements balancer.ConfigParser, when a channel is made.
func (c *configs) ParseConfig(text json.RawMessage) (serviceconfig.LoadBalancingConfig, error) {
	parser, ok := c.Builder.(balancer.ConfigParser)
	if !ok {
		return nil, nil // round_robin has nothing to configure
	}
	parsed, err := parser.ParseConfig(text)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last = parsed
	return parsed, err
}

// picker is that of a channel with so many endpoints, all of which are connected. The
// channel is made, for its options, and connects to nothing.
func (a arm) picker(endpoints int) (p balancer.Picker, end func()) {
	conn := must(grpc.NewClient("passthrough:///nobody", append(a.dial(), grpc.WithTransportCredentials(insecure.NewCredentials()))...))
	c := noted[a.name]
	cc := &fakeConn{all: endpoints, ready: make(chan struct{})}
	b := c.Build(cc, balancer.BuildOptions{Target: resolver.Target{}})
	var list []resolver.Endpoint
	for i := range endpoints {
		list = append(list, resolver.Endpoint{Addresses: []resolver.Address{{Addr: fmt.Sprintf("127.1.%d.%d:1", i/250, i%250+1)}}})
	}
	must(0, b.UpdateClientConnState(balancer.ClientConnState{ResolverState: resolver.State{Endpoints: list}, BalancerConfig: c.last}))
	<-cc.ready
	cc.mu.Lock()
	defer cc.mu.Unlock()
	return cc.picker, func() {
		b.Close()
		conn.Close()
	}
}

// fakeConn is a channel whose connections are made at once, and are none.
type fakeConn struct {
	balancer.ClientConn // nil: what is not below is not called
	all                 int
	ready               chan struct{} // closed when all are

	mu        sync.Mutex
	connected int
	picker    balancer.Picker
}

func (c *fakeConn) NewSubConn(_ []resolver.Address, opts balancer.NewSubConnOptions) (balancer.SubConn, error) {
	return &fakeSubConn{conn: c, listener: opts.StateListener}, nil
}

func (c *fakeConn) UpdateState(s balancer.State) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.picker = s.Picker
}

func (c *fakeConn) ResolveNow(resolver.ResolveNowOptions)   {}
func (c *fakeConn) Target() string                          { return "passthrough:///nobody" }
func (c *fakeConn) MetricsRecorder() estats.MetricsRecorder { return noMetrics{} }

type noMetrics struct {
	estats.UnimplementedMetricsRecorder
}

type fakeSubConn struct {
	balancer.SubConn
	conn     *fakeConn
	listener func(balancer.SubConnState)
}

func (s *fakeSubConn) Shutdown() {}

// Connect is called under a lock that the listener takes.
func (s *fakeSubConn) Connect() {
	go func() {
		s.listener(balancer.SubConnState{ConnectivityState: connectivity.Connecting})
		s.listener(balancer.SubConnState{ConnectivityState: connectivity.Ready})
	}()
}

// RegisterHealthListener has what it is given called after it returns, as gRPC does.
func (s *fakeSubConn) RegisterHealthListener(listener func(balancer.SubConnState)) {
	go func() {
		listener(balancer.SubConnState{ConnectivityState: connectivity.Ready})
		s.conn.mu.Lock()
		defer s.conn.mu.Unlock()
		if s.conn.connected++; s.conn.connected == s.conn.all {
			close(s.conn.ready)
		}
	}()
}

// inFlight is how many calls are, while picks are measured.
const inFlight = 100

// picks returns a function that picks an endpoint and ends the oldest call with success.
func picks(ctx context.Context, p balancer.Picker) (pick func()) {
	info := balancer.PickInfo{FullMethodName: method, Ctx: ctx}
	success := balancer.DoneInfo{BytesSent: true, BytesReceived: true}
	var calls [inFlight]func(balancer.DoneInfo)
	next := 0
	pick = func() {
		if done := calls[next]; done != nil {
			done(success)
		}
		calls[next] = must(p.Pick(info)).Done
		next = (next + 1) % inFlight
	}
	for range inFlight {
		pick()
	}
	return pick
}

// callContext is as a call has it: with a deadline and metadata.
func callContext() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	return metadata.AppendToOutgoingContext(ctx, "key", "value"), cancel
}

// pickRounds measures the picks of all arms in turns, some now and some later: what others
// do with the core may last for seconds, and a scenario lies between.
type pickRounds struct {
	subjects []*pickSubject
	end      []func()
}

type pickSubject struct {
	arm       string
	endpoints int
	pick      func()
	ns        []float64
}

func newPickRounds(set settings) *pickRounds {
	ctx, cancel := callContext()
	r := &pickRounds{end: []func(){cancel}}
	for _, n := range set.pickSizes {
		for _, a := range arms {
			p, end := a.picker(n)
			r.end = append(r.end, end)
			r.subjects = append(r.subjects, &pickSubject{arm: a.name, endpoints: n, pick: picks(ctx, p)})
		}
	}
	return r
}

// turn measures so many rounds, each in a new order.
func (r *pickRounds) turn(rounds int) {
	const batch = 20_000
	for range rounds {
		for _, i := range rand.Perm(len(r.subjects)) {
			s := r.subjects[i]
			for range batch / 10 {
				s.pick() // into the cache
			}
			began := time.Now()
			for range batch {
				s.pick()
			}
			s.ns = append(s.ns, float64(time.Since(began))/batch)
		}
	}
}

// costs ends the measurement.
func (r *pickRounds) costs() (costs []pickCost) {
	for _, s := range r.subjects {
		costs = append(costs, pickCost{s.arm, s.endpoints, slices.Min(s.ns), allocations(s.pick)})
	}
	for _, end := range r.end {
		end()
	}
	return costs
}

// allocations are those of one run, on average, to the whole one below: the runtime makes
// some too.
func allocations(f func()) float64 {
	const n = 1000
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range n {
		f()
	}
	runtime.ReadMemStats(&after)
	return float64((after.Mallocs - before.Mallocs) / n)
}
