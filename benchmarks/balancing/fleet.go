package main

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/orca"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

const replicas = 10

var quietLogger = slog.New(slog.DiscardHandler)

// A replica answers after a time that costs no CPU: so the cores are not what is measured.
// Most of the time is the same, and a part has the exponential distribution.
const (
	leastDelay = 8 * time.Millisecond
	moreDelay  = 2 * time.Millisecond // on average
)

// behaviour is what a replica does with calls. The zero value serves them.
type behaviour struct {
	slower int        // times; 0: once
	code   codes.Code // fails at once with this one; OK: does not
	silent bool       // accepts calls and never answers
}

// fleet is the replicas of one arm, on addresses of their own.
type fleet struct {
	replicas []*replica
	resolver *manual.Resolver
	index    map[string]int // by address
}

// newFleet starts replicas on the addresses 127.0.number.1 and up.
func newFleet(number int, reports bool) *fleet {
	f := &fleet{resolver: manual.NewBuilderWithScheme(fmt.Sprintf("fleet%d", number)), index: map[string]int{}}
	var endpoints []resolver.Endpoint
	for i := range replicas {
		r := &replica{orca: reports, random: rand.New(rand.NewPCG(uint64(i), 2026))}
		r.behave(behaviour{})
		r.listen(fmt.Sprintf("127.0.%d.%d:0", number, i+1))
		f.replicas, f.index[r.addr] = append(f.replicas, r), i
		endpoints = append(endpoints, resolver.Endpoint{Addresses: []resolver.Address{{Addr: r.addr}}})
	}
	f.resolver.InitialState(resolver.State{Endpoints: endpoints})
	return f
}

func (f *fleet) target() string { return f.resolver.Scheme() + ":///shop" }

func (f *fleet) stop() {
	for _, r := range f.replicas {
		r.kill()
	}
}

// replica is one server.
type replica struct {
	addr string
	orca bool
	does atomic.Pointer[behaviour]
	load meter

	mu     sync.Mutex // guards random
	random *rand.Rand

	server *grpc.Server // of the one goroutine that starts and stops it
}

func (r *replica) behave(b behaviour) { r.does.Store(&b) }

// listen starts to serve, again on the same address.
func (r *replica) listen(addr string) {
	lis := must(net.Listen("tcp", addr))
	r.addr = lis.Addr().String()
	var options []grpc.ServerOption
	if r.orca {
		options = append(options, orca.CallMetricsServerOption(nil))
	}
	r.server = grpc.NewServer(options...)
	r.server.RegisterService(&service, r)
	go func(s *grpc.Server) { _ = s.Serve(lis) }(r.server)
}

// kill ends the server with its connections, drain lets calls end first.
func (r *replica) kill()  { r.server.Stop() }
func (r *replica) drain() { r.server.GracefulStop() }

const method = "/shop.v1.Orders/Get"

var service = grpc.ServiceDesc{
	ServiceName: "shop.v1.Orders",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{MethodName: "Get", Handler: func(srv any, ctx context.Context, decode func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
		request := new(emptypb.Empty)
		if err := decode(request); err != nil {
			return nil, err
		}
		handle := func(ctx context.Context, _ any) (any, error) { return srv.(*replica).serve(ctx) }
		if intercept == nil {
			return handle(ctx, request)
		}
		return intercept(ctx, request, &grpc.UnaryServerInfo{FullMethod: method}, handle)
	}}},
}

func (r *replica) serve(ctx context.Context) (*emptypb.Empty, error) {
	began := time.Now()
	err := r.answer(ctx)
	if r.orca && ctx.Err() == nil {
		r.load.ended(began, err)
		r.load.report(orca.CallMetricsRecorderFromContext(ctx))
	}
	return new(emptypb.Empty), err
}

func (r *replica) answer(ctx context.Context) error {
	does := *r.does.Load()
	switch {
	case does.silent:
		<-ctx.Done()
		return status.FromContextError(ctx.Err()).Err()
	case does.code != codes.OK:
		return status.Error(does.code, "as the scenario wants it")
	}
	r.mu.Lock()
	delay := leastDelay + time.Duration(r.random.ExpFloat64()*float64(moreDelay))
	r.mu.Unlock()
	select {
	case <-time.After(delay * time.Duration(max(1, does.slower))):
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

// meter is what a replica knows of its load: sums that fade in a second.
type meter struct {
	mu                  sync.Mutex
	at                  time.Time
	calls, errors, busy float64 // a second; busy: s
}

func (m *meter) ended(began time.Time, err error) {
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	keep := math.Exp(-now.Sub(m.at).Seconds())
	m.at = now
	m.calls, m.errors, m.busy = m.calls*keep+1, m.errors*keep, m.busy*keep+now.Sub(began).Seconds()
	if err != nil {
		m.errors++
	}
}

// report says how busy the replica is: with one call at any time it is fully.
func (m *meter) report(to orca.CallMetricsRecorder) {
	m.mu.Lock()
	defer m.mu.Unlock()
	to.SetQPS(m.calls)
	to.SetEPS(m.errors)
	to.SetApplicationUtilization(m.busy)
}
