package policy

import (
	"slices"
	"strings"
	"time"

	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
)

// Retry is gRPC's retryPolicy for the methods of one pattern.
type Retry struct {
	Rule              string // as in Breaker
	MaxAttempts       int
	InitialBackoff    time.Duration
	MaxBackoff        time.Duration
	BackoffMultiplier float64
	Codes             []string // gRPC's names, in capitals
}

func newRetry(r *resiliencev1.Retry, from *entry) *Retry {
	initial := durationOr(r.InitialBackoff, defaultBackoff)
	e := &Retry{
		Rule:              from.name,
		MaxAttempts:       numberOr(r.MaxAttempts, 3),
		InitialBackoff:    initial,
		MaxBackoff:        durationOr(r.MaxBackoff, max(time.Second, initial)),
		BackoffMultiplier: r.BackoffMultiplier,
		Codes:             []string{"UNAVAILABLE"},
	}
	if e.BackoffMultiplier == 0 {
		e.BackoffMultiplier = 2
	}
	if len(r.RetryableCodes) > 0 {
		e.Codes = nil
		for _, name := range r.RetryableCodes {
			e.Codes = append(e.Codes, strings.ToUpper(name))
		}
	}
	return e
}

// defaultBackoff is also the lower bound of max_backoff.
const defaultBackoff = 50 * time.Millisecond

// Unsafe are the codes that may come of work that was done.
func (r *Retry) Unsafe() (codes []string) {
	for _, c := range r.Codes {
		if c != "UNAVAILABLE" && c != "RESOURCE_EXHAUSTED" {
			codes = append(codes, c)
		}
	}
	return codes
}

// RetryOf is what a pattern says of retries.
type RetryOf struct {
	Pattern string
	Retry   *Retry // nil: they are switched off
}

// Retries returns what the patterns whose rules have the block say, sorted by pattern:
// gRPC looks for the most specific one, as we do.
func (t *Table) Retries() (all []RetryOf) {
	add := func(e *entry) {
		switch r := e.rule.GetRetry(); {
		case r == nil:
		case r.GetDisabled():
			all = append(all, RetryOf{Pattern: e.pattern})
		default:
			all = append(all, RetryOf{Pattern: e.pattern, Retry: newRetry(r, e)})
		}
	}
	for _, e := range t.exact {
		add(e)
	}
	for _, e := range t.services {
		add(e)
	}
	if t.star != nil {
		add(t.star)
	}
	slices.SortFunc(all, func(a, b RetryOf) int { return strings.Compare(a.Pattern, b.Pattern) })
	return all
}

// RetryThrottling is the budget of a channel.
type RetryThrottling struct {
	MaxTokens  int
	TokenRatio float64
}

// NewRetryThrottling fills in the defaults. A nil message is all defaults.
func NewRetryThrottling(r *resiliencev1.RetryThrottling) RetryThrottling {
	t := RetryThrottling{MaxTokens: 10, TokenRatio: 0.1}
	if r != nil {
		t.MaxTokens = numberOr(r.MaxTokens, t.MaxTokens)
	}
	if ratio := r.GetTokenRatio(); ratio > 0 {
		t.TokenRatio = ratio
	}
	return t
}

func (v *validator) retry(r *resiliencev1.Retry) {
	if strings.HasPrefix(string(v.path), "server") {
		v.fail("", "found it in a rule of the server, allowed only in those of the client")
		return
	}
	if r.Disabled {
		v.alone(r, "disabled")
		return
	}
	v.number("max_attempts", r.MaxAttempts, 2, 5)
	v.duration("initial_backoff", r.InitialBackoff, time.Millisecond, time.Minute)
	v.duration("max_backoff", r.MaxBackoff, time.Millisecond, 10*time.Minute)
	if least, most := durationOr(r.InitialBackoff, defaultBackoff), r.MaxBackoff; most != nil && v.readWhole() &&
		time.Millisecond <= most.AsDuration() && most.AsDuration() < least && least <= time.Minute {
		v.fail("max_backoff", "found %s, allowed %s (the initial_backoff) to 10m", units(most.AsDuration()), units(least))
	}
	if m := r.BackoffMultiplier; m != 0 && !(m >= 1 && m <= 10) {
		v.fail("backoff_multiplier", "found %v, allowed 1 to 10", m)
	}
	v.in("retryable_codes", func() { v.failureCodes(r.RetryableCodes) })
}

func (v *validator) retryThrottling(r *resiliencev1.RetryThrottling) {
	v.number("max_tokens", r.MaxTokens, 2, 1000)
	if x := r.TokenRatio; x != 0 && !(x >= 0.001 && x <= 1) {
		v.fail("token_ratio", "found %v, allowed 0.001 to 1", x)
	}
}
