package interceptors_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
)

// The most specific pattern has the say; the others are not asked after it.
func TestFallbackPatterns(t *testing.T) {
	var asked []string
	named := func(pattern string) interceptors.Option {
		return interceptors.WithFallback(pattern, func(_ context.Context, _ string, _, _ any, cause error) error {
			asked = append(asked, pattern)
			return cause
		})
	}
	g := mustGuard(t, `client: {rules: [{methods: ["*", "/grpc.health.v1.Health/*", "/grpc.a.B/C"], breaker: {}}, {methods: ["/off.v1.S/*"], breaker: {disabled: true}}]}`,
		named("*"), named("/a.B/*"), named("/a.B/C"), named("/grpc.a.B/C"))
	for method, want := range map[string]string{
		"/a.B/C": "/a.B/C", "/a.B/D": "/a.B/*", "/a.B/": "/a.B/*", "/a.BB/C": "*", "/x.Y/Z": "*", "": "*", "no slash": "*",
		"/grpc.a.B/C": "/grpc.a.B/C", "/grpc.health.v1.Health/Check": "", "/grpc.x.Y/Z": "",
		"/off.v1.S/M": "", // no rule: not judged
	} {
		asked = nil
		if err := callOn(g, nil, method, errDown); err != errDown {
			t.Errorf("%s: %v", method, err)
		}
		if got := strings.Join(asked, " "); got != want {
			t.Errorf("%q asked %q, want %q", method, got, want)
		}
	}
}

// Methods beyond the cap share a state, not a fallback.
func TestFallbackBeyondTheCap(t *testing.T) {
	s := new(standIn)
	g := mustGuard(t, "client: "+capped, interceptors.WithFallback("/c.C/Later", func(ctx context.Context, method string, req, reply any, cause error) error {
		if method != "/c.C/Later" {
			t.Errorf("it was told %q", method)
		}
		return s.answer(ctx, method, req, reply, cause)
	}))
	cc := channel(t, "example.com")
	for i := range maxStates {
		_ = callOn(g, cc, fmt.Sprintf("/b.B/M%d", i), nil)
	}
	if err := callOn(g, cc, "/c.C/Later", errDown); err != nil || len(s.asked()) != 1 {
		t.Errorf("its own fallback: %v", err)
	}
	if err := callOn(g, cc, "/c.C/Other", errDown); err != errDown && reasonOf(err) != interceptors.ReasonRateLimited || len(s.asked()) != 0 {
		t.Errorf("another method: %v", err)
	}
	if len(others(g)) == 0 {
		t.Error("they have state of their own: the test proves nothing")
	}
}

func TestFallbackMistakes(t *testing.T) {
	f := func(context.Context, string, any, any, error) error { return nil }
	good := interceptors.LastGoodConfig{MaxAge: time.Second, Key: interceptors.WholeRequest}
	rules := []*resiliencev1.MethodPolicy{
		{Methods: []string{"/a.B/C", "/s.S/*", "/grpc.a.B/C"}, Breaker: &resiliencev1.Breaker{}},
		{Methods: []string{"/s.S/Off"}, Breaker: &resiliencev1.Breaker{Disabled: true}},
	}
	policy := &resiliencev1.Policy{
		Client: &resiliencev1.ClientPolicy{Rules: rules},
		Server: &resiliencev1.ServerPolicy{Rules: []*resiliencev1.MethodPolicy{{Methods: []string{"*"}, Breaker: &resiliencev1.Breaker{}}}},
	}
	_, err := interceptors.New(policy,
		interceptors.WithFallback("nonsense", f), interceptors.WithFallback("", f), interceptors.WithFallback("/a.B/C", nil),
		interceptors.WithFallback("/a.B/C", f), interceptors.WithFallback("/a.B/C", f), interceptors.LastGood("/a.B/C", good),
		interceptors.WithFallback("/x.Y/Z", f), interceptors.LastGood("/x.Y/*", good), interceptors.WithFallback("/s.S/Off", f),
		interceptors.WithFallback("/grpc.health.v1.Health/*", f),
		interceptors.LastGood("/s.S/M", interceptors.LastGoodConfig{MaxEntries: -1, MaxBytes: -2, MaxAge: -3}),
		interceptors.LastGood("/s.S/N", interceptors.LastGoodConfig{}), interceptors.LastGood("/s.S", good),
		// These are fine.
		interceptors.WithFallback("/a.B/*", f), interceptors.WithFallback("*", f), interceptors.WithFallback("/s.S/*", f), interceptors.WithFallback("/grpc.a.B/*", f),
	)
	const add = `so nothing would be rejected or judged: add a rule, such as client.rules: [{methods: [%q], breaker: {}}]`
	const noKey = `LastGood: Key of %q is required: interceptors.WholeRequest if nothing but the request and the outgoing metadata decides the reply, else a function that has the caller in its key`
	want := []string{
		`WithFallback: found "nonsense", allowed "*", "/pkg.Service/*" or "/pkg.Service/Method"`,
		`WithFallback: found "", allowed "*", "/pkg.Service/*" or "/pkg.Service/Method"`,
		`WithFallback: the fallback of "/a.B/C" is nil`,
		`WithFallback: "/a.B/C" has a fallback already, by WithFallback`,
		`LastGood: "/a.B/C" has a fallback already, by WithFallback`,
		`LastGood: MaxAge of "/s.S/M": found -3ns, allowed more than 0s`,
		`LastGood: MaxEntries of "/s.S/M": found -1, allowed 0 (1000) or more`,
		`LastGood: MaxBytes of "/s.S/M": found -2, allowed 0 (16777216) or more`,
		fmt.Sprintf(noKey, "/s.S/M"),
		`LastGood: MaxAge of "/s.S/N": found 0s, allowed more than 0s`,
		fmt.Sprintf(noKey, "/s.S/N"),
		`LastGood: found "/s.S", allowed "*", "/pkg.Service/*" or "/pkg.Service/Method"`,
		`WithFallback: no client rule is for "/grpc.health.v1.Health/*", ` + fmt.Sprintf(add, "/grpc.health.v1.Health/*"),
		`WithFallback: no client rule is for "/s.S/Off", ` + fmt.Sprintf(add, "/s.S/Off"),
		`LastGood: no client rule is for "/x.Y/*", ` + fmt.Sprintf(add, "/x.Y/*"),
		`WithFallback: no client rule is for "/x.Y/Z", ` + fmt.Sprintf(add, "/x.Y/Z"),
	}
	if err == nil {
		t.Fatal("no error")
	}
	if got := strings.Split(err.Error(), "\n"); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	// Without a client rule, or with one for package grpc alone, "*" matches nothing.
	for _, rules := range [][]*resiliencev1.MethodPolicy{nil, {{Methods: []string{"/grpc.a.B/*", "/grpc.a.B/C"}, Breaker: &resiliencev1.Breaker{}}}} {
		p := &resiliencev1.Policy{Client: &resiliencev1.ClientPolicy{Rules: rules}}
		if _, err := interceptors.New(p, interceptors.WithFallback("*", f)); err == nil || !strings.Contains(err.Error(), `no client rule is for "*"`) {
			t.Errorf("%v: %v", rules, err)
		}
	}
	// What a policy with a mistake covers cannot be known.
	p := &resiliencev1.Policy{Client: &resiliencev1.ClientPolicy{Rules: []*resiliencev1.MethodPolicy{{Methods: []string{"a.B/C"}, Breaker: &resiliencev1.Breaker{}}}}}
	if _, err := interceptors.New(p, interceptors.WithFallback("/a.B/C", f)); err == nil || strings.Contains(err.Error(), "no client rule") {
		t.Errorf("got %v", err)
	}
}
