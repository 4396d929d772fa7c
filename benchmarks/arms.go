package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/afex/hystrix-go/hystrix"
	"github.com/failsafe-go/failsafe-go"
	"github.com/failsafe-go/failsafe-go/bulkhead"
	"github.com/failsafe-go/failsafe-go/circuitbreaker"
	"github.com/failsafe-go/failsafe-go/failsafegrpc"
	"github.com/failsafe-go/failsafe-go/ratelimiter"
	"github.com/go-kratos/aegis/circuitbreaker/sre"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/ratelimit"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"github.com/sony/gobreaker/v2"
	uber "go.uber.org/ratelimit"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// An arm is a way to put gates around a call of nothing.
type arm struct {
	name  string
	what  string // it does, and does not, where the name does not say it
	gates []gate // TestArms drives the arm into each
	sheds bool   // an open breaker lets a share of the calls through
	paced bool   // runs hystrix-go, which applies results later
	make  maker
}

// A maker returns a call through gates with these limits; do is what is called if they
// admit it.
type maker func(l limits, do func() error) (call func() error)

// A gate is what an arm may refuse a call for.
type gate string

const (
	breakerOpen        gate = "BREAKER_OPEN"
	rateLimited        gate = "RATE_LIMITED"
	concurrencyLimited gate = "CONCURRENCY_LIMITED"
)

var (
	three   = []gate{breakerOpen, rateLimited, concurrencyLimited}
	breaks  = three[:1]
	limited = three[1:2]
)

// limits are the settings of gates, whoever enforces them. Breakers open when half of
// the calls in 10 s have failed, and then for an hour.
type limits struct {
	volume int // calls, before the breaker may open
	rate   float64
	burst  int
	places int
}

// wide admits all that is measured; narrow lets one gate refuse after one call.
var wide = limits{volume: 20, rate: 1e7, burst: 1e7, places: 1e6}

func (l limits) narrow(g gate) limits {
	switch g {
	case breakerOpen:
		l.volume = 1
	case rateLimited:
		l.rate, l.burst = 0.001, 1
	case concurrencyLimited:
		l.places = 1
	}
	return l
}

// Names of arms that budgets are about.
const (
	floorArm         = "the floor"
	clientArm        = "unary client, three gates"
	timeoutArm       = "unary client, three gates and a timeout to set"
	engineArm        = "unary client, breaker, engine hystrix"
	clientEngineArm  = "unary client, three gates, engine hystrix"
	serverArm        = "unary server, three gates"
	serverEngineArm  = "unary server, three gates, engine hystrix"
	clientStreamArm  = "client stream, three gates"
	serverStreamArm  = "server stream, three gates"
	deadlineArm      = "context.WithDeadline and its cancel"
	hystrixArm       = "hystrix-go AllowRequest + ReportEvent"
	hystrixDo        = "hystrix-go DoC"
	gobreakerArm     = "gobreaker Execute"
	byHandArm        = "gobreaker + x/time/rate + channel, by hand"
	failsafeClient   = "failsafe-go client interceptor, three policies"
	failsafeServer   = "failsafe-go server interceptor, three policies"
	xRateArm         = "x/time/rate Allow"
	middlewareServer = "go-grpc-middleware server, recovery + ratelimit with x/time/rate"
	middlewareStream = "server stream, go-grpc-middleware recovery + ratelimit with x/time/rate"
)

// unaryArms begin with what uses hystrix-go directly: a guard that has used it adds a
// collector to each circuit that is made from then on, in the whole process.
var unaryArms = []arm{
	{name: "calling nothing", what: "the loop that measures; it is in all figures.", make: func(_ limits, do func() error) func() error { return do }},
	{name: floorArm, what: "2 reads of the monotonic clock, 1 map read and 4 atomic additions to one set of counters: what breaker, limits and counts of a method need at least.", make: floor},
	{name: deadlineArm, what: "what a timeout costs whoever sets it.", make: func(_ limits, do func() error) func() error {
		return func() error {
			_, cancel := context.WithDeadline(context.Background(), time.Now().Add(time.Hour))
			defer cancel()
			return do()
		}
	}},
	{name: hystrixArm, what: "one circuit, which is found once; no timeout, no concurrency limit. All that run hystrix-go are paced: after 500 calls it catches up, off the clock, so that it drops no result. Its own circuits here are without the collector that a guard adds.", gates: breaks, paced: true, make: allowAndReport},
	{name: hystrixDo, what: "a timeout and a concurrency limit too.", gates: []gate{breakerOpen, concurrencyLimited}, paced: true, make: func(l limits, do func() error) func() error {
		name, ctx := newCircuit(l), context.Background()
		return func() error { return hystrix.DoC(ctx, name, func(context.Context) error { return do() }, nil) }
	}},
	{name: "unary client, no rule for the method", make: ours(onClient)},
	{name: "unary client, breaker", gates: breaks, make: ours(onClient, breakerBlock)},
	{name: clientArm, gates: three, make: ours(onClient, breakerBlock, limitBlocks),
		what: "breaker, token bucket and concurrency limit with state of their own for each target and method, counted for the metrics."},
	{name: timeoutArm, gates: three, make: ours(onClient, breakerBlock, limitBlocks, "timeout: 1h")},
	{name: engineArm, gates: breaks, paced: true, make: ours(onClient, hystrixBlock),
		what: "hystrix-go decides."},
	{name: clientEngineArm, gates: three, paced: true, make: ours(onClient, hystrixBlock, limitBlocks)},
	{name: "unary server, no rule for the method", what: "recovery of panics and the record of calls in flight that a drain needs; so in each unary server.", make: ours(onServer)},
	{name: "unary server, breaker", gates: breaks, make: ours(onServer, breakerBlock)},
	{name: serverArm, gates: three, make: ours(onServer, breakerBlock, limitBlocks)},
	{name: serverEngineArm, gates: three, paced: true, make: ours(onServer, hystrixBlock, limitBlocks)},
	{name: gobreakerArm, what: "one breaker for all methods, no gRPC.", gates: breaks, make: func(l limits, do func() error) func() error {
		cb := newGobreaker(l)
		return func() error {
			_, err := cb.Execute(func() (any, error) { return nil, do() })
			return err
		}
	}},
	{name: byHandArm, what: "a client interceptor that finds a method's breaker, limiter and places in a sync.Map.", gates: three, make: onClient(byHand)},
	{name: "failsafe-go client interceptor, breaker", gates: breaks, make: onClient(func(l limits) grpc.UnaryClientInterceptor {
		return failsafegrpc.NewUnaryClientInterceptor(failsafePolicies(l)[2])
	})},
	{name: failsafeClient, what: "bursty rate limiter, bulkhead and circuit breaker (failure rate in 10 s), one set for all methods, which saves it the search.", gates: three,
		make: onClient(failsafeOnClient)},
	{name: failsafeServer, what: "the same; no recovery.", gates: three, make: onServer(failsafeOnServer)},
	{name: "aegis SRE breaker", what: "throttles by degrees, after Google's SRE book; one for all methods.", gates: breaks, sheds: true, make: aegis},
	{name: "go-grpc-middleware server, recovery", make: onServer(func(limits) grpc.UnaryServerInterceptor { return recovery.UnaryServerInterceptor() })},
	{name: middlewareServer, what: "one limiter for all methods; no breaker, no concurrency limit.", gates: limited, make: onServer(middlewareOnServer)},
	{name: xRateArm, gates: limited, make: func(l limits, do func() error) func() error {
		limiter := newXRate(l)
		return func() error {
			if !limiter.Allow() {
				return errLimited
			}
			return do()
		}
	}},
	{name: "uber ratelimit Take", what: "at 1e9/s, so that it never sleeps; it cannot refuse.", make: func(_ limits, do func() error) func() error {
		limiter := uber.New(1e9)
		return func() error {
			limiter.Take()
			return do()
		}
	}},
}

func armNamed(name string) arm {
	for _, a := range unaryArms {
		if a.name == name {
			return a
		}
	}
	panic("no arm " + name)
}

// subject is the success path.
func (a arm) subject() subject {
	call := a.make(wide, nothing)
	return subject{name: a.name, paced: a.paced, calls: func() func() error { return call }}
}

// refusing returns a call that gate g refuses from now on, and how many it has let
// through; free lets go of what that takes.
func (a arm) refusing(g gate) (call func() error, through *atomic.Int64, free func()) {
	through = new(atomic.Int64)
	entered, end := make(chan struct{}), make(chan struct{})
	call = a.make(wide.narrow(g), func() error {
		n := through.Add(1)
		if g == concurrencyLimited && n == 1 {
			close(entered)
			<-end
		}
		if g == breakerOpen {
			return errDown
		}
		return nil
	})
	if g == concurrencyLimited {
		go func() { _ = call() }()
		<-entered
	}
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		before := through.Load()
		if _ = call(); through.Load() == before {
			return call, through, func() { close(end) }
		}
		if a.paced {
			time.Sleep(100 * time.Microsecond)
		}
	}
	panic(fmt.Sprintf("%s never says %s", a.name, g))
}

const method, streamMethod = "/bench.v1.Bench/Unary", "/bench.v1.Bench/Stream"

var (
	errDown    = status.Error(codes.Unavailable, "down")
	errLimited = errors.New("limited")
)

// onClient calls a client interceptor as gRPC does, with an invoker that sends nothing.
func onClient(intercept func(limits) grpc.UnaryClientInterceptor) maker {
	return func(l limits, do func() error) func() error {
		i, ctx := intercept(l), context.Background()
		invoke := func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return do() }
		return func() error { return i(ctx, method, nil, nil, nil, invoke) }
	}
}

// onServer calls a server interceptor as gRPC does, in a context that takes trailers.
func onServer(intercept func(limits) grpc.UnaryServerInterceptor) maker {
	return func(l limits, do func() error) func() error {
		i, info := intercept(l), &grpc.UnaryServerInfo{FullMethod: method}
		handle := func(_ context.Context, req any) (any, error) { return req, do() }
		return func() error {
			_, err := i(served, nil, info, handle)
			return err
		}
	}
}

// served is the context of a call that comes from nowhere.
var served = grpc.NewContextWithServerTransportStream(context.Background(), nowhere{})

type nowhere struct{}

func (nowhere) Method() string               { return method }
func (nowhere) SetHeader(metadata.MD) error  { return nil }
func (nowhere) SendHeader(metadata.MD) error { return nil }
func (nowhere) SetTrailer(metadata.MD) error { return nil }

// The blocks of a rule of ours; what begins with $ are limits.
const (
	breakerBlock = "breaker: {request_volume_threshold: $volume, sleep_window: 1h}"
	hystrixBlock = "breaker: {engine: hystrix, request_volume_threshold: $volume, sleep_window: 1h}"
	rateBlock    = "rate_limit: {requests_per_second: $rate, burst: $burst}"
	limitBlocks  = rateBlock + ", concurrency_limit: {max_in_flight: $places, max_streams: $places}"
)

// guard makes a guard with one rule for all methods of both sides; without blocks the
// rule is for another method.
func guard(l limits, blocks ...string) *interceptors.Guard {
	methods := "'*'"
	if len(blocks) == 0 {
		methods, blocks = "/other.v1.Service/Method", []string{breakerBlock}
	}
	rules := strings.NewReplacer("$volume", fmt.Sprint(l.volume), "$rate", fmt.Sprintf("%f", l.rate), "$burst", fmt.Sprint(l.burst), "$places", fmt.Sprint(l.places)).
		Replace(fmt.Sprintf("rules: [{methods: [%s], %s}]", methods, strings.Join(blocks, ", ")))
	return parsed("{client: {" + rules + "}, server: {drain: {announce: 0s, reject_new: true}, " + rules + "}}")
}

func parsed(policy string, opts ...interceptors.Option) *interceptors.Guard {
	return must(interceptors.New(must(interceptors.Parse("policy", []byte(policy))), append(opts, quiet)...))
}

var quiet = interceptors.WithLogger(slog.New(slog.DiscardHandler))

// ours is one of a guard's unary interceptors, by the side that side calls.
func ours[I any](side func(func(limits) I) maker, blocks ...string) maker {
	return side(func(l limits) I {
		g := guard(l, blocks...)
		for _, i := range []any{g.UnaryClientInterceptor(), g.UnaryServerInterceptor(), g.StreamClientInterceptor(), g.StreamServerInterceptor()} {
			if found, ok := i.(I); ok {
				return found
			}
		}
		panic("no such interceptor")
	})
}

func floor(_ limits, do func() error) func() error {
	epoch, methods := time.Now(), map[string]*[4]atomic.Uint64{method: {}, streamMethod: {}}
	return func() error { return counted(epoch, methods, method, do) }
}

// counted is the floor: what surrounds a call at least.
func counted(epoch time.Time, methods map[string]*[4]atomic.Uint64, method string, do func() error) error {
	began := time.Since(epoch)
	n := methods[method]
	for i := range n {
		n[i].Add(1)
	}
	err := do()
	if time.Since(epoch) < began {
		return errDown // never: the compiler must keep the clock
	}
	return err
}

var circuits atomic.Int64

// newCircuit configures a circuit of hystrix-go that nobody else uses.
func newCircuit(l limits) (name string) {
	name = fmt.Sprint("circuit ", circuits.Add(1))
	const hour = 3_600_000 // ms
	hystrix.ConfigureCommand(name, hystrix.CommandConfig{
		Timeout: hour, SleepWindow: hour, RequestVolumeThreshold: l.volume, ErrorPercentThreshold: 50,
		MaxConcurrentRequests: min(l.places, 10_000), // it makes a ticket for each at once
	})
	return name
}

func allowAndReport(l limits, do func() error) func() error {
	circuit, _, err := hystrix.GetCircuit(newCircuit(l))
	must(circuit, err)
	return func() error {
		start := time.Now()
		if !circuit.AllowRequest() {
			return hystrix.ErrCircuitOpen
		}
		event, err := "success", do()
		if err != nil {
			event = "failure"
		}
		must(0, circuit.ReportEvent([]string{event}, start, time.Since(start)))
		return err
	}
}

func newGobreaker(l limits) *gobreaker.CircuitBreaker[any] {
	return gobreaker.NewCircuitBreaker[any](gobreaker.Settings{
		Interval: 10 * time.Second, BucketPeriod: time.Second, Timeout: time.Hour,
		ReadyToTrip: func(c gobreaker.Counts) bool { return int(c.Requests) >= l.volume && 2*c.TotalFailures >= c.Requests },
	})
}

// xRate is x/time/rate, also as a limiter for go-grpc-middleware.
type xRate struct{ *rate.Limiter }

func newXRate(l limits) xRate { return xRate{rate.NewLimiter(rate.Limit(l.rate), l.burst)} }

func (r xRate) Limit(context.Context) error {
	if !r.Allow() {
		return errLimited
	}
	return nil
}

func middlewareOnServer(l limits) grpc.UnaryServerInterceptor {
	recovers, limit := recovery.UnaryServerInterceptor(), ratelimit.UnaryServerInterceptor(newXRate(l))
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		return recovers(ctx, req, info, func(ctx context.Context, req any) (any, error) { return limit(ctx, req, info, handler) })
	}
}

// byHand is what one would write.
func byHand(l limits) grpc.UnaryClientInterceptor {
	type gates struct {
		breaker *gobreaker.CircuitBreaker[any]
		limiter *rate.Limiter
		places  chan struct{}
	}
	var methods sync.Map
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		found, ok := methods.Load(method)
		if !ok {
			found, _ = methods.LoadOrStore(method, &gates{newGobreaker(l), newXRate(l).Limiter, make(chan struct{}, l.places)})
		}
		m := found.(*gates)
		if !m.limiter.Allow() {
			return status.Error(codes.ResourceExhausted, "rate limit")
		}
		select {
		case m.places <- struct{}{}:
			defer func() { <-m.places }()
		default:
			return status.Error(codes.ResourceExhausted, "concurrency limit")
		}
		_, err := m.breaker.Execute(func() (any, error) { return nil, invoker(ctx, method, req, reply, cc, opts...) })
		return err
	}
}

// failsafePolicies have the breaker innermost, as we do: what a limit refuses is no
// failure.
func failsafePolicies(l limits) []failsafe.Policy[any] {
	return []failsafe.Policy[any]{
		ratelimiter.NewBursty[any](uint(l.burst), time.Duration(float64(l.burst)/l.rate*float64(time.Second))),
		bulkhead.New[any](uint(l.places)),
		circuitbreaker.NewBuilder[any]().WithFailureRateThreshold(0.5, uint(l.volume), 10*time.Second).WithDelay(time.Hour).Build(),
	}
}

func failsafeOnClient(l limits) grpc.UnaryClientInterceptor {
	return failsafegrpc.NewUnaryClientInterceptor(failsafePolicies(l)...)
}

func failsafeOnServer(l limits) grpc.UnaryServerInterceptor {
	return failsafegrpc.NewUnaryServerInterceptor(failsafePolicies(l)...)
}

func aegis(l limits, do func() error) func() error {
	b := sre.NewBreaker(sre.WithWindow(10*time.Second), sre.WithRequest(int64(l.volume)), sre.WithSuccess(0.5))
	return func() error {
		if err := b.Allow(); err != nil {
			b.MarkFailed()
			return err
		}
		err := do()
		if err != nil {
			b.MarkFailed()
		} else {
			b.MarkSuccess()
		}
		return err
	}
}
