package interceptors_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// fleet is a target with endpoints that come and go.
type fleet struct {
	t        *testing.T
	resolver *manual.Resolver
	conn     *grpc.ClientConn

	mu      sync.Mutex
	servers map[string]*replica
}

// replica is one endpoint.
type replica struct {
	*grpc.Server
	listener *bufconn.Listener
	served   chan error

	mu      sync.Mutex
	calls   int
	answers func(ctx context.Context) error // nil: at once, well
	stream  func(grpc.ServerStream) error   // nil: echoes
}

func (r *replica) answer(f func(ctx context.Context) error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.answers = f
}

// took is how many calls and streams came since it was asked last.
func (r *replica) took() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.calls
	r.calls = 0
	return n
}

func (r *replica) begin() (answers func(context.Context) error, stream func(grpc.ServerStream) error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls++
	return r.answers, r.stream
}

// takes answers after a time.
func takes(d time.Duration) func(context.Context) error {
	return func(ctx context.Context) error {
		select {
		case <-time.After(d):
			return nil
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// failsWith answers at once.
func failsWith(code codes.Code) func(context.Context) error {
	return func(context.Context) error { return status.Error(code, "test") }
}

func newFleet(t *testing.T, g *interceptors.Guard, names ...string) *fleet {
	t.Helper()
	f := &fleet{t: t, resolver: manual.NewBuilderWithScheme("fleet"), servers: map[string]*replica{}}
	for _, name := range names {
		f.start(name)
	}
	f.resolver.InitialState(resolver.State{Endpoints: endpoints(names...)})
	f.conn = f.dial(g)
	return f
}

func (f *fleet) dial(g *interceptors.Guard, more ...grpc.DialOption) *grpc.ClientConn {
	f.t.Helper()
	conn, err := grpc.NewClient("fleet:///shop", g.DialOptions(append([]grpc.DialOption{
		grpc.WithResolvers(f.resolver),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			f.mu.Lock()
			r := f.servers[address]
			f.mu.Unlock()
			if r == nil {
				return nil, fmt.Errorf("nobody listens at %s", address)
			}
			return r.listener.DialContext(ctx)
		}),
	}, more...)...)...)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { conn.Close() })
	return conn
}

func (f *fleet) start(name string) *replica {
	r := &replica{listener: rpctest.Listen(), served: make(chan error, 1)}
	r.Server = rpctest.NewServer(&rpctest.Service{
		Unary: func(ctx context.Context, req *rpctest.Message) (*rpctest.Message, error) {
			if answers, _ := r.begin(); answers != nil {
				if err := answers(ctx); err != nil {
					return nil, err
				}
			}
			return req, nil
		},
		Stream: func(ss grpc.ServerStream) error {
			if _, stream := r.begin(); stream != nil {
				return stream(ss)
			}
			for {
				m := new(rpctest.Message)
				if err := ss.RecvMsg(m); err != nil {
					return nil
				}
				if err := ss.SendMsg(m); err != nil {
					return err
				}
			}
		},
	})
	go func() { r.served <- r.Serve(r.listener) }()
	f.mu.Lock()
	f.servers[name] = r
	f.mu.Unlock()
	f.t.Cleanup(func() {
		r.Stop()
		<-r.served
	})
	return r
}

// drain ends an endpoint once its calls have ended.
func (f *fleet) drain(name string) {
	f.mu.Lock()
	r := f.servers[name]
	delete(f.servers, name)
	f.mu.Unlock()
	r.GracefulStop()
}

// list gives the resolver other addresses.
func (f *fleet) list(names ...string) {
	f.resolver.UpdateState(resolver.State{Endpoints: endpoints(names...)})
	synctest.Wait()
}

func endpoints(names ...string) []resolver.Endpoint {
	es := []resolver.Endpoint{}
	for _, name := range names {
		es = append(es, resolver.Endpoint{Addresses: []resolver.Address{{Addr: name}}})
	}
	return es
}

func addresses(n int) []string {
	var all []string
	for i := range n {
		all = append(all, fmt.Sprintf("10.0.0.%d:1", i+1))
	}
	return all
}

// load makes calls for a time, at a rate and each on its own; it returns their errors.
func (f *fleet) load(every, during time.Duration) []error {
	var wg sync.WaitGroup
	errs := make([]error, during/every)
	for i := range errs {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(f.t.Context(), time.Second)
			defer cancel()
			_, errs[i] = rpctest.Call(ctx, f.conn, rpctest.Unary, "x")
		})
		time.Sleep(every)
	}
	wg.Wait()
	return errs
}

func failures(errs []error) (n int) {
	for _, err := range errs {
		if err != nil {
			n++
		}
	}
	return n
}

// shares are the parts that the endpoints had of the calls since they were asked last.
func (f *fleet) shares() map[string]float64 {
	total, took := 0, map[string]int{}
	for name, r := range f.servers {
		took[name] = r.took()
		total += took[name]
	}
	s := map[string]float64{}
	for name, n := range took {
		s[name] = float64(n) / float64(total)
	}
	return s
}

const balanced = "client: {load_balancing: {}}"

// all gives every endpoint the same behaviour.
func (f *fleet) all(answers func(context.Context) error) {
	for _, r := range f.servers {
		r.answer(answers)
	}
}

func TestBalanceSpreadsEvenly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, mustGuard(t, balanced), addresses(10)...)
		f.all(takes(10 * time.Millisecond))
		if n := failures(f.load(5*time.Millisecond, 10*time.Second)); n > 0 {
			t.Errorf("%d calls failed", n)
		}
		for name, share := range f.shares() {
			if share < 0.05 || share > 0.2 {
				t.Errorf("%s had %.3f of the calls, want about a tenth", name, share)
			}
		}
	})
}

// One of ten is ten times slower: it gets no more than a fifth of its fair share. More of
// this, at other rates and sizes, is in internal/balance.
func TestBalanceShunsTheSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, mustGuard(t, balanced), addresses(10)...)
		f.all(takes(10 * time.Millisecond))
		f.servers["10.0.0.1:1"].answer(takes(100 * time.Millisecond))
		f.load(5*time.Millisecond, time.Second)
		f.shares()
		f.load(5*time.Millisecond, 10*time.Second)
		if share := f.shares()["10.0.0.1:1"]; share > 0.02 {
			t.Errorf("the slow one had %.3f of the calls", share)
		}
	})
}

// Who fails or rejects at once is fast, and not attractive for it.
func TestBalanceShunsWhoFailsFast(t *testing.T) {
	for _, code := range []codes.Code{codes.Unavailable, codes.ResourceExhausted} {
		t.Run(code.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t, mustGuard(t, balanced), addresses(10)...)
				f.all(takes(10 * time.Millisecond))
				f.load(5*time.Millisecond, time.Second)
				f.servers["10.0.0.1:1"].answer(failsWith(code))
				f.load(5*time.Millisecond, 2*time.Second)
				if n := failures(f.load(5*time.Millisecond, 10*time.Second)); n > 20 {
					t.Errorf("%d of 2000 calls failed after 2s", n)
				}
			})
		})
	}
}

// One of two endpoints fails: it is ejected, probed, and brought back.
func TestBalanceEjects(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		f := newFleet(t, mustGuard(t, balanced, interceptors.WithLogger(slog.New(slog.NewTextHandler(&log, nil)))), "a:1", "b:1")
		f.all(takes(10 * time.Millisecond))
		f.load(5*time.Millisecond, time.Second)
		f.servers["a:1"].answer(func(context.Context) error {
			time.Sleep(10 * time.Millisecond)
			return status.Error(codes.Internal, "")
		})
		for f.shares(); !strings.Contains(log.String(), "ejected"); {
			f.load(5*time.Millisecond, time.Second) // it is tried now and then
		}
		if n := f.servers["a:1"].took(); n > 10 {
			t.Errorf("%d failures before it was ejected", n)
		}
		if got := log.String(); !strings.Contains(got, "target=fleet:///shop endpoint=a:1 cause=consecutive_failures for=5s") {
			t.Errorf("logged: %s", got)
		}
		f.servers["a:1"].answer(takes(10 * time.Millisecond))
		f.load(5*time.Millisecond, 6*time.Second)
		f.shares()
		f.load(5*time.Millisecond, 4*time.Second)
		if share := f.shares()["a:1"]; share < 0.4 || !strings.Contains(log.String(), "endpoint returned") {
			t.Errorf("healed, it had %.2f of the calls; logged: %s", share, log.String())
		}
	})
}

func TestBalanceSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, "client: {load_balancing: {slow_start: 20s, breaker: {consecutive_failures: 1}}}")
		if text, err := json.Marshal(g.Snapshot()); err != nil || strings.Contains(string(text), "endpoints") {
			t.Errorf("without channels: %s %v", text, err)
		}
		f := newFleet(t, g, "a:1", "b:1")
		f.conn.Connect()
		synctest.Wait()
		f.all(takes(10 * time.Millisecond))
		f.load(50*time.Millisecond, 4*time.Second)
		f.servers["a:1"].answer(failsWith(codes.Unavailable))
		f.load(5*time.Millisecond, 100*time.Millisecond)
		f.start("c:1")
		f.list("a:1", "b:1", "c:1", "d:1")
		time.Sleep(2 * time.Second)
		f.servers["b:1"].answer(takes(time.Hour))
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 2 { // the first may go to c, of which nothing is known
			wg.Go(func() { _, _ = rpctest.Call(ctx, f.conn, rpctest.Unary, "x") })
			synctest.Wait()
			f.servers["c:1"].answer(takes(time.Hour))
		}
		got := g.Snapshot().Endpoints
		cancel()
		wg.Wait()
		inFlight := 0
		for i := range got {
			inFlight += got[i].InFlight
			got[i].InFlight = 0
			if r := &got[i].RetryAfter; *r > 0 {
				*r = 1
			}
			got[i].Latency = math.Round(got[i].Latency*1000) / 1000
		}
		want := []interceptors.EndpointSnapshot{
			{Target: "fleet:///shop", Address: "a:1", State: "ejected", Latency: 0.01, Ejections: map[string]uint64{"consecutive_failures": 1}, RetryAfter: 1},
			{Target: "fleet:///shop", Address: "b:1", State: "ready", Weight: 1, Latency: 0.01, Ejections: map[string]uint64{}},
			{Target: "fleet:///shop", Address: "c:1", State: "ready", Weight: 0.1, Ejections: map[string]uint64{}},
			{Target: "fleet:///shop", Address: "d:1", State: "connecting", Ejections: map[string]uint64{}},
		}
		if got, want := fmt.Sprintf("%+v", got), fmt.Sprintf("%+v", want); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
		if inFlight < 1 {
			t.Error("nothing in flight")
		}
		if err := f.conn.Close(); err != nil {
			t.Error(err)
		}
		if got := g.Snapshot().Endpoints; len(got) > 0 {
			t.Errorf("after the channel: %+v", got)
		}
	})
}

// A call that finds all endpoints at their limit is refused as one of this process.
func TestBalanceRatePerEndpoint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, "client: {load_balancing: {rate_limit_per_endpoint: {requests_per_second: 1, burst: 2}}, rules: [{methods: ['*'], breaker: {request_volume_threshold: 1}}]}")
		f := newFleet(t, g, "a:1", "b:1")
		f.conn.Connect()
		synctest.Wait()
		for range 4 {
			if _, err := rpctest.Call(t.Context(), f.conn, rpctest.Unary, "x"); err != nil {
				t.Fatal(err)
			}
		}
		for _, opts := range [][]grpc.CallOption{nil, {grpc.WaitForReady(true)}} {
			_, err := rpctest.Call(t.Context(), f.conn, rpctest.Unary, "x", opts...)
			var rejected *interceptors.RejectedError
			if !errors.As(err, &rejected) || !errors.Is(err, interceptors.ErrRateLimited) || status.Code(err) != codes.ResourceExhausted ||
				rejected.Method != rpctest.Unary || rejected.Rule != "load_balancing" || rejected.RetryAfter != time.Second {
				t.Errorf("got %v", err)
			}
		}
		wantEnded(t, g, interceptors.Client, rpctest.Unary, ended{success: 4, neutral: 2})
		wantState(t, g, interceptors.Client, rpctest.Unary, "closed")
		if a, b := f.servers["a:1"].took(), f.servers["b:1"].took(); a != 2 || b != 2 {
			t.Errorf("%d and %d calls", a, b)
		}
		time.Sleep(time.Second)
		if _, err := rpctest.Call(t.Context(), f.conn, rpctest.Unary, "x"); err != nil {
			t.Error(err)
		}
	})
}

// What says nothing about an endpoint is not held against it: its caller's cancel, a
// deadline that nobody could meet, an answer that is an error, a drain.
func TestBalanceNeutralEnds(t *testing.T) {
	call := func(ctx context.Context, f *fleet, want codes.Code) {
		if _, err := rpctest.Call(ctx, f.conn, rpctest.Unary, "x"); status.Code(err) != want {
			f.t.Errorf("got %v, want %v", err, want)
		}
	}
	for name, end := range map[string]func(t *testing.T, f *fleet){
		"cancelled": func(t *testing.T, f *fleet) {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(time.Millisecond, cancel)
			call(ctx, f, codes.Canceled)
		},
		"deadline of 1ms": func(t *testing.T, f *fleet) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			defer cancel()
			call(ctx, f, codes.DeadlineExceeded)
		},
		"NOT_FOUND": func(t *testing.T, f *fleet) {
			f.servers["a:1"].answer(func(ctx context.Context) error {
				time.Sleep(10 * time.Millisecond)
				return status.Error(codes.NotFound, "")
			})
			call(t.Context(), f, codes.NotFound)
			f.servers["a:1"].answer(takes(10 * time.Millisecond))
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t, mustGuard(t, balanced), "a:1", "b:1")
				f.all(takes(10 * time.Millisecond))
				f.load(5*time.Millisecond, time.Second)
				f.servers["b:1"].answer(takes(time.Hour)) // a gets all of these
				f.load(5*time.Millisecond, 100*time.Millisecond)
				time.Sleep(time.Second)
				for range 20 {
					end(t, f)
				}
				f.servers["b:1"].answer(takes(20 * time.Millisecond))
				time.Sleep(10 * time.Second)
				f.shares()
				f.load(5*time.Millisecond, time.Second)
				if share := f.shares()["a:1"]; share < 0.5 {
					t.Errorf("the faster one had %.2f of the calls", share)
				}
			})
		})
	}
}

// A drain loses no call, and an endpoint that comes back after it is as it was.
func TestBalanceDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, mustGuard(t, balanced), addresses(3)...)
		f.all(takes(10 * time.Millisecond))
		for _, name := range addresses(3) {
			var wg sync.WaitGroup
			wg.Go(func() {
				time.Sleep(100 * time.Millisecond)
				f.drain(name)
				f.start(name).answer(takes(10 * time.Millisecond))
			})
			if n := failures(f.load(time.Millisecond, time.Second)); n > 0 {
				t.Errorf("%d calls failed", n)
			}
			wg.Wait()
			time.Sleep(time.Second) // to connect again
			f.shares()
			f.load(5*time.Millisecond, time.Second)
			for name, share := range f.shares() {
				if share < 0.15 {
					t.Errorf("%s had %.2f of the calls after its drain", name, share)
				}
			}
		}
	})
}

// A stream that fails before its client has sent fails for gRPC's balancers with a success.
func TestBalanceStreamsThatFailEarly(t *testing.T) {
	for _, policy := range []string{
		"client: {load_balancing: {}}",
		"client: {load_balancing: {}, rules: [{methods: ['*'], breaker: {}}]}",
		"client: {load_balancing: {}, rules: [{methods: ['*'], retry: {}}]}",
	} {
		for _, method := range []string{rpctest.Bidi, rpctest.ClientStream} {
			synctest.Test(t, func(t *testing.T) {
				g := mustGuard(t, policy)
				f := newFleet(t, g, "a:1", "b:1")
				f.conn.Connect()
				synctest.Wait()
				open := func() {
					s, err := rpctest.Open(t.Context(), f.conn, method)
					if err != nil {
						t.Fatal(err)
					}
					synctest.Wait() // the end, if there is one, has come
					_ = rpctest.Send(s, "x")
					_ = s.CloseSend()
					for err == nil {
						_, err = rpctest.Recv(s)
						if method == rpctest.ClientStream {
							break
						}
					}
					time.Sleep(10 * time.Second)
				}
				for range 20 {
					open()
				}
				for _, e := range g.Snapshot().Endpoints {
					if e.InFlight != 0 || len(e.Ejections) > 0 {
						t.Errorf("%s: %s: %+v", policy, method, e)
					}
				}
				f.servers["a:1"].stream = func(grpc.ServerStream) error { return status.Error(codes.Unavailable, "") }
				for range 100 {
					open()
				}
				if e := g.Snapshot().Endpoints[0]; e.Ejections["consecutive_failures"] == 0 || e.InFlight != 0 {
					t.Errorf("%s: %s: %+v", policy, method, e)
				}
			})
		}
	}
}

// A stream's life is no latency.
func TestBalanceStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, mustGuard(t, balanced), "a:1", "b:1")
		f.all(takes(10 * time.Millisecond))
		f.load(5*time.Millisecond, time.Second)
		var open []grpc.ClientStream
		for range 40 {
			s, err := rpctest.Open(t.Context(), f.conn, rpctest.Bidi)
			if err != nil {
				t.Fatal(err)
			}
			open = append(open, s)
		}
		synctest.Wait()
		for name, share := range f.shares() {
			if share == 0 {
				t.Errorf("%s had no stream", name)
			}
		}
		time.Sleep(time.Minute)
		for _, s := range open[1:] { // one is left, at one of them
			if err := s.CloseSend(); err != nil {
				t.Fatal(err)
			}
			if _, err := rpctest.Recv(s); err == nil {
				t.Fatal("no end")
			}
		}
		f.shares()
		f.load(5*time.Millisecond, time.Second)
		for name, share := range f.shares() {
			if share < 0.2 {
				t.Errorf("after streams of a minute %s had %.2f of the calls", name, share)
			}
		}
	})
}

func TestBalanceBadInput(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		call := func(f *fleet) error {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := rpctest.Call(ctx, f.conn, rpctest.Unary, "x")
			return err
		}
		f := newFleet(t, mustGuard(t, balanced))
		if err := call(f); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "no address") {
			t.Errorf("no address: %v", err)
		}
		f.start("a:1")
		f.list("a:1", "a:1", "a:1")
		if err := call(f); err != nil {
			t.Errorf("an address three times: %v", err)
		}
		f.resolver.CC().ReportError(fmt.Errorf("no such host"))
		synctest.Wait()
		if err := call(f); err != nil {
			t.Errorf("a resolver error after a good update: %v", err)
		}
		f.list()
		if err := call(f); status.Code(err) != codes.Unavailable {
			t.Errorf("all addresses gone: %v", err)
		}
		f.list("a:1")
		if err := call(f); err != nil {
			t.Errorf("an address again: %v", err)
		}
		if _, err := grpc.NewClient("fleet:///shop", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"resilience_p2c": {}}]}`)); err == nil || !strings.Contains(err.Error(), "DialOptions") {
			t.Errorf("the balancer without a guard: %v", err)
		}
	})
}

func TestBalanceResolverErrorBeforeAddresses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fleet{t: t, resolver: manual.NewBuilderWithScheme("fleet"), servers: map[string]*replica{}}
		f.resolver.BuildCallback = func(_ resolver.Target, cc resolver.ClientConn, _ resolver.BuildOptions) {
			go cc.ReportError(fmt.Errorf("no such host"))
		}
		f.conn = f.dial(mustGuard(t, balanced))
		_, err := rpctest.Call(t.Context(), f.conn, rpctest.Unary, "x")
		if status.Code(err) != codes.Unavailable {
			t.Errorf("got %v", err)
		}
	})
}

// Endpoints that come and go leave no goroutine and no state.
func TestBalanceAddressesComeAndGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, balanced)
		f := newFleet(t, g, "0:1")
		goroutines := 0
		for i := range 100 {
			old, name := fmt.Sprintf("%d:1", i), fmt.Sprintf("%d:1", i+1)
			f.start(name)
			f.list(old, name)
			if _, err := rpctest.Call(t.Context(), f.conn, rpctest.Unary, "x"); err != nil {
				t.Fatal(err)
			}
			f.list(name)
			f.drain(old)
			time.Sleep(15 * time.Minute) // and the channel stays busy enough not to idle
			if e := g.Snapshot().Endpoints; len(e) != 1 || e[0].Address != name {
				t.Fatalf("endpoints: %+v", e)
			}
			if n := runtime.NumGoroutine(); i == 5 {
				goroutines = n
			} else if i > 5 && n > goroutines+3 {
				t.Fatalf("%d goroutines after %d endpoints, %d after 5", n, i, goroutines)
			}
		}
	})
}

// A service config of the resolver wins, and a warning says so, once.
func TestBalanceServiceConfigOfTheResolver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		g := mustGuard(t, balanced, interceptors.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
		f := newFleet(t, g, "a:1", "b:1")
		call := func(conn *grpc.ClientConn) {
			t.Helper()
			if _, err := rpctest.Call(t.Context(), conn, rpctest.Unary, "x"); err != nil {
				t.Fatal(err)
			}
		}
		call(f.conn)
		if log.Len() > 0 {
			t.Errorf("logged: %s", log.String())
		}
		theirs := f.resolver.CC().ParseServiceConfig(`{"loadBalancingConfig": [{"round_robin": {}}]}`)
		f.resolver.UpdateState(resolver.State{Endpoints: endpoints("a:1", "b:1"), ServiceConfig: theirs})
		time.Sleep(time.Second)
		for range 3 {
			call(f.conn)
		}
		if got := log.String(); strings.Count(got, "another service config") != 1 || !strings.Contains(got, "target=fleet:///shop") {
			t.Errorf("logged: %s", got)
		}
		// Ignored if asked for.
		log.Reset()
		g = mustGuard(t, balanced, interceptors.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
		call(f.dial(g, grpc.WithDisableServiceConfig()))
		if log.Len() > 0 {
			t.Errorf("logged: %s", log.String())
		}
		call(f.dial(g, grpc.WithDefaultServiceConfig(`{}`), grpc.WithDisableServiceConfig()))
		if got := log.String(); strings.Count(got, "another service config") != 1 {
			t.Errorf("another default one: logged: %s", got)
		}
	})
}

func TestBalanceReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, "server: {}")
		mustReload(t, g, balanced) // nobody has dialled yet
		f := newFleet(t, g, addresses(4)...)
		f.all(takes(10 * time.Millisecond))
		f.load(5*time.Millisecond, time.Second)
		f.start("new:1").answer(takes(10 * time.Millisecond))
		f.list(append(addresses(4), "new:1")...)
		mustReload(t, g, "client: {load_balancing: {slow_start: 0s}}")
		f.shares()
		f.load(5*time.Millisecond, time.Second)
		if share := f.shares()["new:1"]; share < 0.1 {
			t.Errorf("without slow start a new endpoint had %.2f of the calls", share)
		}
		if err := reload(g, "client: {}"); err == nil || !strings.Contains(err.Error(), "load_balancing is switched") {
			t.Errorf("switched off under a channel: %v", err)
		}
	})
}
