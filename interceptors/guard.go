package interceptors

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/policy"
	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
)

// Guard enforces one policy on any number of gRPC clients and servers of a
// process. Make it with Load or New; all methods are safe for concurrent use.
//
// A nil *Guard (the error of Load was ignored) protects nothing and says so:
// calls through its options fail with FAILED_PRECONDITION, its other methods
// return an error or do nothing.
type Guard struct {
	opts   *options
	epoch  time.Time // the gates' time counts from here
	client *side
	server *side

	reloading sync.Mutex     // held by Reload, and by Serve while it checks the policy
	served    []*grpc.Server // by Serve; guarded by reloading
	reloads   reloads
	hystrix   atomic.Uint64 // a breaker.HystrixScope; 0: no policy has named engine hystrix
	balancing balancing

	recovers recovers
	inflight inflight
	drain    drain
	metrics  *metrics
	panics   atomic.Uint64

	closed    atomic.Bool
	done      chan struct{} // closed by Close: ends Hystrix streams
	closeOnce sync.Once
	closeErr  error
	contained sync.Map // names of callbacks whose panic has been logged
}

var (
	errNilGuard = errors.New("interceptors: nil *Guard (was the error of Load or New ignored?)")
	errClosed   = errors.New("interceptors: the guard is closed")
)

// Load reads the policy file at path and returns the guard that enforces it:
// Parse and New. Every mistake of the file is in the error.
func Load(path string, opts ...Option) (*Guard, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("interceptors: %w", err)
	}
	p, err := Parse(path, data)
	if err != nil {
		return nil, err
	}
	return New(p, opts...)
}

// Parse reads a policy from YAML that is embedded or generated; name stands for
// the file name in messages. The error has one line for each mistake,
// "name:line:col: path: what was found, what is allowed"; it unwraps to a list
// (Unwrap() []error).
func Parse(name string, yaml []byte) (*resiliencev1.Policy, error) {
	return policy.Parse(name, yaml)
}

// New returns the guard that enforces a policy built in Go, as it is now. The error lists every mistake of the policy and of the
// options; an empty policy is fine: it recovers panics and drains.
func New(p *resiliencev1.Policy, opts ...Option) (*Guard, error) {
	o, err := newOptions(opts)
	c, invalid := o.compile(p)
	if err := errors.Join(err, invalid); err != nil {
		return nil, err
	}
	g := &Guard{opts: o, epoch: time.Now(), done: make(chan struct{})}
	g.nameCircuits(c)
	g.initBalancing(c)
	g.client = newSide(g, Client, c.client)
	g.server = newSide(g, Server, c.server)
	g.recovers = newRecovers(g)
	g.drain.init(c.drain)
	if g.metrics, err = newMetrics(g); err != nil {
		return nil, fmt.Errorf("interceptors: metrics: %w", err)
	}
	return g, nil
}

// compiled is a policy that is valid together with a guard's options.
type compiled struct {
	client, server *policy.Table
	balancing      *policy.LoadBalancing // nil: gRPC's own
	throttling     policy.RetryThrottling
	drain          policy.Drain
	hystrix        bool // a rule names the engine
}

// compile's error lists every mistake.
func (o *options) compile(p *resiliencev1.Policy) (*compiled, error) {
	client, server := p.GetClient().GetRules(), p.GetServer().GetRules()
	limiters := errors.Join(o.checkLimiters(Client, client), o.checkLimiters(Server, server))
	if err := policy.Validate(p); err != nil {
		return nil, errors.Join(err, limiters)
	}
	c := &compiled{client: policy.NewTable(client), server: policy.NewTable(server), drain: policy.NewDrain(p.GetServer().GetDrain())}
	c.throttling = policy.NewRetryThrottling(p.GetClient().GetRetryThrottling())
	c.balancing = policy.NewLoadBalancing(p.GetClient().GetLoadBalancing())
	c.hystrix = slices.ContainsFunc(slices.Concat(client, server), policy.UsesHystrix)
	return c, errors.Join(o.fallbacks.check(c.client), limiters)
}

// nameCircuits gives the guard its own names in hystrix-go, if it needs them.
func (g *Guard) nameCircuits(c *compiled) {
	if c.hystrix && g.hystrix.Load() == 0 {
		g.hystrix.Store(uint64(breaker.NewHystrixScope()))
	}
}

func (g *Guard) hystrixScope() breaker.HystrixScope { return breaker.HystrixScope(g.hystrix.Load()) }

// DialOptions returns what grpc.NewClient needs to put the guard around a
// channel's calls, followed by extra. Ours come first, so the guard is outside
// of interceptors in extra; to put something outside of the guard, put it
// before. With client.load_balancing or a rule's retry there is a default service config among them
// (grpc.WithDefaultServiceConfig): one that the resolver gives, or one in extra, takes
// its place, and a warning is logged; grpc.WithDisableServiceConfig in extra ignores the
// resolver's.
func (g *Guard) DialOptions(extra ...grpc.DialOption) []grpc.DialOption {
	ours := []grpc.DialOption{
		grpc.WithChainUnaryInterceptor(g.UnaryClientInterceptor()),
		grpc.WithChainStreamInterceptor(g.StreamClientInterceptor()),
	}
	if g != nil {
		if config := g.balancing.dialOption(&g.reloading); config != nil {
			ours = append(ours, config)
		}
	}
	return append(ours, extra...)
}

// ServerOptions returns what grpc.NewServer needs to put the guard around a
// server's calls, followed by extra. Ours come first, so the guard is outside
// of interceptors in extra; to put something outside of the guard, put it
// before. It also bounds the handshake of a connection to 5s
// (grpc.ConnectionTimeout; its default of 120s lets one silent peer hold up a
// drain for as long); extra may set another.
func (g *Guard) ServerOptions(extra ...grpc.ServerOption) []grpc.ServerOption {
	return append([]grpc.ServerOption{
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.ChainUnaryInterceptor(g.UnaryServerInterceptor()),
		grpc.ChainStreamInterceptor(g.StreamServerInterceptor()),
	}, extra...)
}

// HystrixName returns the name that the breaker of a method has in hystrix-go's
// registry, for hystrix.GetCircuit, metric collectors and dashboards:
// "grpc.client/TARGET/pkg.Service/Method" or "grpc.server/pkg.Service/Method". The
// second guard of a process that uses the engine has grpc2 in place of grpc, and
// so on, in the order in which their policies first named it. target is the canonical target of
// the channel (grpc.ClientConn.CanonicalTarget), and ignored for Server; method is
// the full name, "/pkg.Service/Method". The circuit itself is made when the method
// is first called, or by the Reload that gives it the engine. "" if the policy gives the method no breaker with engine hystrix.
func (g *Guard) HystrixName(s Side, target, method string) string {
	if g == nil {
		return ""
	}
	of := g.client
	if s == Server {
		of, target = g.server, ""
	}
	if eff := of.rules.Load().Effective(method); eff == nil || eff.Breaker == nil || !eff.Breaker.Hystrix {
		return ""
	}
	return g.hystrixScope().Name(s.String(), target, method)
}

// Close ends what the guard started: its metrics are no longer collected (what
// histograms and resilience.drain.aborted have recorded stays with the provider; what is
// said of Serve's listeners ends with Serve), and its Hystrix streams end. Calls
// through the guard go on and are still guarded; Serve and Shutdown refuse to
// start. Closing again does nothing and returns the first result.
func (g *Guard) Close() error {
	if g == nil {
		return errNilGuard
	}
	g.closeOnce.Do(func() {
		g.closed.Store(true)
		close(g.done)
		g.closeErr = g.metrics.close()
	})
	return g.closeErr
}

// usable returns why the guard cannot serve, nil if it can.
func (g *Guard) usable() error {
	switch {
	case g == nil:
		return errNilGuard
	case g.closed.Load():
		return errClosed
	}
	return nil
}

// now is the time that the gates see: monotonic, since the guard was made.
func (g *Guard) now() time.Duration { return time.Since(g.epoch) }

// contain runs a user's callback and keeps its panic from the call. The first
// panic of each callback is logged with its stack; the logger may be the one.
func (g *Guard) contain(name string, f func()) {
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		if _, again := g.contained.LoadOrStore(name, true); !again {
			defer func() { _ = recover() }()
			g.opts.logger.Error("callback panicked (logged once)", "callback", name, "panic", p, "stack", string(debug.Stack()))
		}
	}()
	f()
}

// log writes to the user's logger, whose handler may panic.
func (g *Guard) log(level slog.Level, msg string, attrs ...slog.Attr) {
	g.contain("logger", func() { g.opts.logger.LogAttrs(context.Background(), level, msg, attrs...) })
}
