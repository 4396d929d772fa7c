package policy

import (
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
)

// clientRule is a policy of one client rule for every method.
func clientRule(r *resiliencev1.MethodPolicy) *resiliencev1.Policy {
	if r != nil && r.Methods == nil {
		r.Methods = []string{"*"}
	}
	return &resiliencev1.Policy{Client: &resiliencev1.ClientPolicy{Rules: []*resiliencev1.MethodPolicy{r}}}
}

func TestValidateAcceptsEmptyPolicies(t *testing.T) {
	for _, p := range []*resiliencev1.Policy{
		{},
		{Client: &resiliencev1.ClientPolicy{}, Server: &resiliencev1.ServerPolicy{Drain: &resiliencev1.Drain{}}},
	} {
		if err := Validate(p); err != nil {
			t.Errorf("%v: %v", p, err)
		}
	}
}

// What only Go values can hold; what YAML can hold is in testdata/bad.
func TestValidateGoValues(t *testing.T) {
	breaker := func(b *resiliencev1.Breaker) *resiliencev1.Policy {
		return clientRule(&resiliencev1.MethodPolicy{Breaker: b})
	}
	rateLimit := func(l *resiliencev1.RateLimit) *resiliencev1.Policy {
		return clientRule(&resiliencev1.MethodPolicy{RateLimit: l})
	}
	window := func(d *durationpb.Duration) *resiliencev1.Policy {
		return breaker(&resiliencev1.Breaker{Window: d})
	}
	for name, c := range map[string]struct {
		policy *resiliencev1.Policy
		want   []string
	}{
		"nil policy": {nil, []string{"policy: found nil, allowed a policy"}},
		"nil rule": {clientRule(nil), []string{
			`client.rules[0].methods: found nothing, allowed one or more of "*", "/pkg.Service/*" or "/pkg.Service/Method"`,
			"client.rules[0]: found a rule that sets nothing, allowed one with breaker, rate_limit, concurrency_limit, timeout, stream_timeout, minimum_budget or retry",
		}},
		"zero": {window(durationpb.New(0)), []string{"client.rules[0].breaker.window: found 0s, allowed 100ms to 1h"}},
		"nanosecond short": {
			window(durationpb.New(100*time.Millisecond - 1)),
			[]string{"client.rules[0].breaker.window: found 99.999999ms, allowed 100ms to 1h"},
		},
		"signs differ": {
			window(&durationpb.Duration{Seconds: 1, Nanos: -1}),
			[]string{"client.rules[0].breaker.window: found 1 seconds and -1 nanoseconds, allowed 100ms to 1h"},
		},
		"too many nanoseconds": {
			window(&durationpb.Duration{Nanos: 1e9}),
			[]string{"client.rules[0].breaker.window: found 0 seconds and 1000000000 nanoseconds, allowed 100ms to 1h"},
		},
		"too long for Go": {
			window(&durationpb.Duration{Seconds: 1 << 40}),
			[]string{"client.rules[0].breaker.window: found 1099511627776 seconds and 0 nanoseconds, allowed 100ms to 1h"},
		},
		"timeout not quite zero": {
			clientRule(&resiliencev1.MethodPolicy{Timeout: &durationpb.Duration{Seconds: 1, Nanos: -1e9}}),
			[]string{"client.rules[0].timeout: found 1 seconds and -1000000000 nanoseconds, allowed 0s, or 1ms to 24h"},
		},
		"enums": {
			&resiliencev1.Policy{Server: &resiliencev1.ServerPolicy{Rules: []*resiliencev1.MethodPolicy{{
				Methods:          []string{"*"},
				Breaker:          &resiliencev1.Breaker{Engine: 9},
				RateLimit:        &resiliencev1.RateLimit{Algorithm: -1, Scope: 3, RequestsPerSecond: 1},
				ConcurrencyLimit: &resiliencev1.ConcurrencyLimit{Scope: 3, MaxInFlight: proto.Uint32(1)},
			}}}},
			[]string{
				"server.rules[0].breaker.engine: found 9, allowed window, hystrix",
				"server.rules[0].rate_limit.algorithm: found -1, allowed token_bucket, pacing",
				"server.rules[0].rate_limit.scope: found 3, allowed method, rule",
				"server.rules[0].concurrency_limit.scope: found 3, allowed method, rule",
			},
		},
		"not a number": {
			rateLimit(&resiliencev1.RateLimit{RequestsPerSecond: math.NaN()}),
			[]string{"client.rules[0].rate_limit.requests_per_second: found NaN, allowed 0.001 to 10000000"},
		},
		"infinite": {
			rateLimit(&resiliencev1.RateLimit{RequestsPerSecond: math.Inf(1)}),
			[]string{"client.rules[0].rate_limit.requests_per_second: found +Inf, allowed 0.001 to 10000000"},
		},
		"invalid UTF-8": {
			clientRule(&resiliencev1.MethodPolicy{
				Name: "\xff", Methods: []string{"/a.B/\xff"},
				Breaker:   &resiliencev1.Breaker{FailureCodes: []string{"\xff"}},
				RateLimit: &resiliencev1.RateLimit{External: "\xff"},
			}),
			[]string{
				`client.rules[0].name: found "\xff", allowed at most 100 printable characters`,
				`client.rules[0].methods[0]: found "/a.B/\xff", allowed "*", "/pkg.Service/*" or "/pkg.Service/Method"`,
				`client.rules[0].breaker.failure_codes[0]: found "\xff", nearest is UNKNOWN, allowed ` + strings.Join(failureCodes, ", "),
				`client.rules[0].rate_limit.external: found "\xff", allowed printable characters`,
			},
		},
		"every mistake at once": {
			&resiliencev1.Policy{
				Client: &resiliencev1.ClientPolicy{Rules: []*resiliencev1.MethodPolicy{
					{Methods: []string{"/a.B/C"}, Timeout: durationpb.New(-1)},
					{Methods: []string{"/a.B/C"}, MinimumBudget: durationpb.New(2 * time.Hour)},
				}},
				Server: &resiliencev1.ServerPolicy{
					Rules: []*resiliencev1.MethodPolicy{{Methods: []string{"/a.B/C"}, Breaker: &resiliencev1.Breaker{}}},
					Drain: &resiliencev1.Drain{Cut: durationpb.New(time.Hour)},
				},
			},
			[]string{
				"client.rules[0].timeout: found -1ns, allowed 0s, or 1ms to 24h",
				`client.rules[1].methods[0]: found "/a.B/C" a second time, allowed once, first at client.rules[0].methods[0]`,
				"client.rules[1].minimum_budget: found 2h, allowed 0s to 1h",
				"server.drain.cut: found 1h, allowed 0s to 10m",
			},
		},
	} {
		err := Validate(c.policy)
		if err == nil {
			t.Errorf("%s: no error", name)
			continue
		}
		if got, want := err.Error(), strings.Join(c.want, "\n"); got != want {
			t.Errorf("%s:\ngot:\n%s\nwant:\n%s", name, got, want)
		}
	}
}

// A caller can take the joined errors apart.
func TestMistakesAreJoined(t *testing.T) {
	_, err := Parse("p.yaml", []byte("client: 1\nserver: 2\n"))
	var joined interface{ Unwrap() []error }
	if !errors.As(err, &joined) || len(joined.Unwrap()) != 2 {
		t.Errorf("got %v", err)
	}
}
