package policy

import (
	"time"

	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
	"google.golang.org/protobuf/types/known/durationpb"
)

// LoadBalancing is how the calls of a channel are spread over its endpoints.
type LoadBalancing struct {
	Decay     time.Duration
	SlowStart time.Duration // 0: none

	Breaker            *EndpointBreaker // nil: none
	MaxEjectionPercent int
	PanicThreshold     int

	RateLimit *RateLimit // of each endpoint; nil: none
}

// EndpointBreaker is the circuit breaker of each endpoint.
type EndpointBreaker struct {
	Consecutive    int
	ErrorPercent   int
	RequestVolume  int
	Window         time.Duration
	SleepWindow    time.Duration
	MaxSleepWindow time.Duration // at least SleepWindow
	LatencyFactor  int           // 0: latencies do not count
}

// NewLoadBalancing fills in the defaults. It returns nil for nil.
func NewLoadBalancing(b *resiliencev1.LoadBalancing) *LoadBalancing {
	if b == nil {
		return nil
	}
	l := &LoadBalancing{
		Decay:              durationOr(b.Decay, 2*time.Second),
		SlowStart:          durationOr(b.SlowStart, 10*time.Second),
		MaxEjectionPercent: numberOr(b.MaxEjectionPercent, 50),
		PanicThreshold:     numberOr(b.PanicThreshold, 30),
	}
	if e := b.GetBreaker(); !e.GetDisabled() {
		sleep := durationOr(e.GetSleepWindow(), defaultSleepWindow)
		if e == nil {
			e = &resiliencev1.EndpointBreaker{}
		}
		l.Breaker = &EndpointBreaker{
			Consecutive:    numberOr(e.ConsecutiveFailures, 5),
			ErrorPercent:   numberOr(e.ErrorPercentThreshold, 50),
			RequestVolume:  numberOr(e.RequestVolumeThreshold, 20),
			Window:         durationOr(e.Window, 10*time.Second),
			SleepWindow:    sleep,
			MaxSleepWindow: durationOr(e.MaxSleepWindow, max(time.Minute, sleep)),
			LatencyFactor:  numberOr(e.LatencyFactor, 5),
		}
	}
	if r := b.GetRateLimitPerEndpoint(); r != nil {
		l.RateLimit = newRateLimit(rateLimit(r), &entry{name: "load_balancing"})
	}
	return l
}

// rateLimit is the part of a RateLimit that an EndpointRateLimit has.
func rateLimit(r *resiliencev1.EndpointRateLimit) *resiliencev1.RateLimit {
	return &resiliencev1.RateLimit{Algorithm: r.Algorithm, RequestsPerSecond: r.RequestsPerSecond, Burst: r.Burst}
}

func (v *validator) loadBalancing(b *resiliencev1.LoadBalancing) {
	v.enum("policy", b.Policy)
	v.duration("decay", b.Decay, 10*time.Millisecond, time.Hour)
	v.duration("slow_start", b.SlowStart, 0, time.Hour)
	if e := b.GetBreaker(); e != nil {
		v.in("breaker", func() { v.endpointBreaker(e) })
	}
	v.number("max_ejection_percent", b.MaxEjectionPercent, 0, 100)
	v.number("panic_threshold", b.PanicThreshold, 0, 100)
	if r := b.GetRateLimitPerEndpoint(); r != nil {
		v.in("rate_limit_per_endpoint", func() { v.rate(rateLimit(r), "") })
	}
}

func (v *validator) endpointBreaker(b *resiliencev1.EndpointBreaker) {
	if b.Disabled {
		v.alone(b, "disabled")
		return
	}
	v.number("consecutive_failures", b.ConsecutiveFailures, 1, 1_000_000)
	v.number("error_percent_threshold", b.ErrorPercentThreshold, 1, 100)
	v.number("request_volume_threshold", b.RequestVolumeThreshold, 1, 1_000_000)
	v.duration("window", b.Window, 100*time.Millisecond, time.Hour)
	v.sleepWindows(b.SleepWindow, b.MaxSleepWindow)
	if n := b.GetLatencyFactor(); n == 1 || n > 1000 {
		v.fail("latency_factor", "found %d, allowed 0, or 2 to 1000", n)
	}
}

// sleepWindows checks how long a breaker may be open.
func (v *validator) sleepWindows(least, most *durationpb.Duration) {
	v.duration("sleep_window", least, time.Millisecond, time.Hour)
	v.duration("max_sleep_window", most, time.Millisecond, 24*time.Hour)
	sleep, longest := durationOr(least, defaultSleepWindow), durationOr(most, 24*time.Hour)
	if v.readWhole() && time.Millisecond <= longest && longest < sleep && sleep <= time.Hour {
		v.fail("max_sleep_window", "found %s, allowed %s (the sleep_window) to 24h", units(longest), units(sleep))
	}
}
