package policy

import (
	"time"

	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
)

// LoadBalancing is how the calls of a channel are spread over its endpoints.
type LoadBalancing struct {
	Decay     time.Duration
	SlowStart time.Duration // 0: none
}

// NewLoadBalancing fills in the defaults. It returns nil for nil.
func NewLoadBalancing(b *resiliencev1.LoadBalancing) *LoadBalancing {
	if b == nil {
		return nil
	}
	return &LoadBalancing{
		Decay:     durationOr(b.Decay, 2*time.Second),
		SlowStart: durationOr(b.SlowStart, 10*time.Second),
	}
}

func (v *validator) loadBalancing(b *resiliencev1.LoadBalancing) {
	v.enum("policy", b.Policy)
	v.duration("decay", b.Decay, 10*time.Millisecond, time.Hour)
	v.duration("slow_start", b.SlowStart, 0, time.Hour)
}
