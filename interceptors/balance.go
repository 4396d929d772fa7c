package interceptors

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/balance"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/policy"
)

// balancing is what a guard has of its channels' load balancing.
type balancing struct {
	group *balance.Group

	on       atomic.Bool                     // DialOptions has given a service config
	balanced atomic.Bool                     // with load balancing
	looked   atomic.Pointer[grpc.ClientConn] // the channel whose service config was looked at last
	mu       sync.Mutex
	ignored  map[string]bool // targets of which it was logged that another config is in force; guarded by mu

	// Guarded by Guard.reloading.
	config string // the channels' service config; "": none
	wanted bool   // it has load balancing
	given  bool   // DialOptions has given it
}

// maxIgnored bounds what is kept, and logged, of targets with a service config of their own.
const maxIgnored = 1000

func (g *Guard) initBalancing(c *compiled) {
	b := &g.balancing
	b.ignored = map[string]bool{}
	b.group = balance.NewGroup(balanceSettings(c.balancing), balance.Hooks{
		Now:     g.now,
		Judge:   g.judgeAttempt,
		Ejected: g.logEjection,
		Limited: endpointsLimited,
		Closed:  func() { b.looked.Store(nil) },
	})
	b.config, b.wanted = b.serviceConfig(c), c.balancing != nil
	g.warnRetries(c.client)
}

// balanceSettings are those of a policy; nil: it has none, and no balancer will ask.
func balanceSettings(p *policy.LoadBalancing) balance.Settings {
	if p == nil {
		return balance.Settings{}
	}
	s := balance.Settings{
		Decay: p.Decay, SlowStart: p.SlowStart,
		MaxEjectionPercent: p.MaxEjectionPercent, PanicThreshold: p.PanicThreshold,
	}
	if b := p.Breaker; b != nil {
		s.LatencyFactor = b.LatencyFactor
		s.Breaker = &breaker.Config{
			Consecutive: int32(b.Consecutive), ErrorPercent: b.ErrorPercent, RequestVolume: b.RequestVolume, Probes: 1, Window: b.Window,
			SleepWindow: b.SleepWindow, MaxSleepWindow: b.MaxSleepWindow, Lease: b.SleepWindow,
		}
		if b.LatencyFactor > 0 {
			s.Breaker.SlowPercent = 50
		}
	}
	if r := p.RateLimit; r != nil {
		s.Rate = &balance.Rate{PerSecond: r.Rate, Burst: r.Burst, Pacing: r.Pacing}
	}
	return s
}

// endpointsLimited is the error of a call that finds all endpoints at their rate limit.
// gRPC ends the call with it, wait-for-ready or not, and does not retry it.
func endpointsLimited(method string, retryAfter time.Duration) error {
	return &RejectedError{Side: Client, Method: method, Rule: "load_balancing", Reason: ReasonRateLimited, RetryAfter: retryAfter}
}

func (g *Guard) logEjection(e balance.Ejection) {
	endpoint := []slog.Attr{slog.String("target", e.Target), slog.String("endpoint", e.Address)}
	if !e.Ejected {
		g.log(slog.LevelInfo, "endpoint returned", endpoint...)
		return
	}
	g.log(slog.LevelWarn, "endpoint ejected", append(endpoint, slog.String("cause", e.Cause.String()), slog.Duration("for", e.For))...)
}

// serviceConfig is the default service config of the guard's channels; "": they need none.
// The first item of methodConfig is a mark, for a service that nobody has: see lookAtConfig.
func (b *balancing) serviceConfig(c *compiled) string {
	retries := c.client.Retries()
	if c.balancing == nil && len(retries) == 0 {
		return ""
	}
	var s strings.Builder
	fmt.Fprintf(&s, `{"methodConfig":[{"name":[{"service":%q}],"maxRequestMessageBytes":%d}`, b.mark(), b.group.Number())
	named := map[string]bool{}
	for _, r := range retries {
		service, method := splitMethod(r.Pattern)
		named[service] = named[service] || method == ""
		fmt.Fprintf(&s, `,{"name":[{"service":%q,"method":%q}]%s}`, service, method, retryPolicy(r.Retry))
	}
	if named[""] {
		for _, service := range grpcServices {
			if !named[service] {
				fmt.Fprintf(&s, `,{"name":[{"service":%q}]}`, service)
			}
		}
	}
	s.WriteByte(']')
	if len(retries) > 0 {
		fmt.Fprintf(&s, `,"retryThrottling":{"maxTokens":%d,"tokenRatio":%v}`, c.throttling.MaxTokens, c.throttling.TokenRatio)
	}
	if c.balancing != nil {
		fmt.Fprintf(&s, `,"loadBalancingConfig":[%s]`, b.group.Config())
	}
	s.WriteByte('}')
	return s.String()
}

// grpcServices are those of package grpc that clients call. No "*" is for them.
var grpcServices = [...]string{"grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection", "grpc.channelz.v1.Channelz"}

// splitMethod is a pattern in a service config's words: an empty method, or service, is
// for all.
func splitMethod(pattern string) (service, method string) {
	service, method, _ = strings.Cut(strings.TrimPrefix(pattern, "/"), "/")
	return strings.TrimSuffix(service, "*"), strings.TrimSuffix(method, "*")
}

func retryPolicy(r *policy.Retry) string {
	if r == nil {
		return ""
	}
	return fmt.Sprintf(`,"retryPolicy":{"maxAttempts":%d,"initialBackoff":"%.9fs","maxBackoff":"%.9fs","backoffMultiplier":%v,"retryableStatusCodes":["%s"]}`,
		r.MaxAttempts, r.InitialBackoff.Seconds(), r.MaxBackoff.Seconds(), r.BackoffMultiplier, strings.Join(r.Codes, `","`))
}

// warnRetries says so when a policy retries what may have been done.
func (g *Guard) warnRetries(rules *policy.Table) {
	for _, r := range rules.Retries() {
		if r.Retry != nil && len(r.Retry.Unsafe()) > 0 {
			g.log(slog.LevelWarn, "the policy retries calls that may have been carried out: only methods that may run twice (idempotent ones) are safe",
				slog.String("rule", r.Retry.Rule), slog.String("pattern", r.Pattern), slog.String("codes", strings.Join(r.Retry.Unsafe(), " ")))
		}
	}
}

func (b *balancing) mark() string { return fmt.Sprintf("grpc.resilience.guard%d", b.group.Number()) }

// reloadable returns an error if the policy would need another service config than the
// channels were given. The caller holds Guard.reloading.
func (b *balancing) reloadable(c *compiled) error {
	if b.given && b.serviceConfig(c) != b.config {
		return errors.New("client: found that load_balancing is switched on or off, or that retry or retry_throttling are others, " +
			"allowed only before DialOptions: a channel keeps the service config that it was made with")
	}
	return nil
}

// reload sets the parameters of living balancers. The caller holds Guard.reloading.
func (b *balancing) reload(c *compiled) {
	b.config, b.wanted = b.serviceConfig(c), c.balancing != nil
	b.group.Set(balanceSettings(c.balancing))
}

// dialOption returns nil if the policy needs no service config.
func (b *balancing) dialOption(reloading *sync.Mutex) grpc.DialOption {
	reloading.Lock()
	defer reloading.Unlock()
	b.given = true
	if b.config == "" {
		return nil
	}
	b.on.Store(true)
	b.balanced.Store(b.wanted)
	return grpc.WithDefaultServiceConfig(b.config)
}

// lookAtConfig warns, once a target, when a channel has another service config than the
// guard's: the resolver's wins over a default one, and the last default one over those
// before. It is called after calls; a channel that has been looked at costs a load.
func (g *Guard) lookAtConfig(cc *grpc.ClientConn) {
	b := &g.balancing
	if cc == nil || b.looked.Load() == cc || cc.GetState() != connectivity.Ready {
		return
	}
	b.looked.Store(cc)
	if c := cc.GetMethodConfig("/" + b.mark() + "/"); c.MaxReqSize != nil && uint64(*c.MaxReqSize) == b.group.Number() {
		return
	}
	target := cc.CanonicalTarget()
	b.mu.Lock()
	again := b.ignored[target] || len(b.ignored) >= maxIgnored
	b.ignored[target] = true
	b.mu.Unlock()
	if !again {
		g.log(slog.LevelWarn, "the channel has another service config than the guard's: load_balancing and retry of the policy are not in force",
			slog.String("target", target), slog.String("cause", "its resolver gives one (grpc.WithDisableServiceConfig ignores that), or a later dial option does"))
	}
}

// balancedStream tells the balancer how the stream ended.
type balancedStream struct {
	grpc.ClientStream
	call   *balance.Call
	single bool // one response message ends the stream
}

func balancedStreamer(streamer grpc.Streamer, call *balance.Call) grpc.Streamer {
	return func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		s, err := streamer(ctx, desc, cc, method, opts...)
		if err != nil {
			return nil, err
		}
		return &balancedStream{ClientStream: s, call: call, single: !desc.ServerStreams}, nil
	}
}

// RecvMsg is the only one that is given the status.
func (s *balancedStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	switch {
	case err == io.EOF || err == nil && s.single:
		s.call.Ended(nil)
	case err != nil:
		s.call.Ended(err)
	}
	return err
}

// minAttemptDeadline is the breaker's default of min_deadline.
const minAttemptDeadline = 50 * time.Millisecond

// judgeAttempt applies the rules of Outcome, as far as they hold for one attempt of a
// call, to the endpoint that it was made at. Every RESOURCE_EXHAUSTED but that of a
// message's size is a rejection here.
func (g *Guard) judgeAttempt(ctx context.Context, method string, err error, had time.Duration) balance.Verdict {
	st, _ := status.FromError(err)
	code := st.Code()
	switch {
	case code == codes.Canceled, cancelled(ctx), tooLarge(code, st.Message()), unmarshalled(code, st.Message()),
		code == codes.Unavailable && drained(st.Message()):
		return balance.Neutral
	case code == codes.DeadlineExceeded && had < minAttemptDeadline:
		return balance.Expired
	}
	if info, _ := ownDetails(st); info != nil {
		switch Reason(info.GetReason()) {
		case ReasonRateLimited, ReasonConcurrencyLimited, ReasonQueueTimeout:
			return balance.Shed
		case ReasonDraining, ReasonBudgetTooSmall:
			return balance.Neutral
		case ReasonBreakerOpen:
			return balance.Failure
		}
	}
	switch {
	case policy.DefaultFailureCodes&(1<<code) != 0:
		return balance.Failure
	case code == codes.ResourceExhausted:
		return balance.Shed
	}
	return balance.Success
}

// drained reports whether gRPC said it of a stream that a GOAWAY came before, or our server
// of one that its drain ended. A handler may say "draining" in words of its own, and mean
// that it fails.
func drained(message string) bool {
	return message == "the connection is draining" || message == "the stream is rejected because server is draining the connection" ||
		strings.HasPrefix(message, "the server is draining")
}
