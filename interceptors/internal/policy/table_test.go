package policy

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
)

// clientTable is the client's table of a policy in YAML, given by its rules.
func clientTable(t testing.TB, rules string) *Table {
	t.Helper()
	p, err := Parse("test.yaml", []byte("client:\n  rules:\n"+rules))
	if err != nil {
		t.Fatal(err)
	}
	return NewTable(p.Client.Rules)
}

func (e *Effective) String() string {
	if e == nil {
		return "nil"
	}
	return fmt.Sprintf("{%s %s %v %v %v %s %+v %+v %+v}",
		e.Pattern, e.Rule, e.Timeout, e.StreamTimeout, e.MinimumBudget, e.BudgetRule, e.Breaker, e.RateLimit, e.Concurrency)
}

func TestEffectiveDefaults(t *testing.T) {
	table := clientTable(t, `
    - methods: ["/a.B/C"]
      breaker: {}
      rate_limit: {requests_per_second: 12.5}
      concurrency_limit: {max_streams: 7}
`)
	want := &Effective{
		Pattern: "/a.B/C", Rule: "/a.B/C",
		Breaker: &Breaker{
			Rule: "/a.B/C", ErrorPercent: 50, RequestVolume: 20, Probes: 1, SlowPercent: 100,
			Window: 10 * time.Second, SleepWindow: 5 * time.Second, MaxSleepWindow: 5 * time.Second,
			Lease: 5 * time.Second, MinDeadline: 50 * time.Millisecond,
			FailureCodes: 1<<2 | 1<<4 | 1<<13 | 1<<14 | 1<<15,
		},
		RateLimit:   &RateLimit{Rule: "/a.B/C", Rate: 12.5, Burst: 13},
		Concurrency: &Concurrency{Rule: "/a.B/C", MaxStreams: 7},
	}
	if got := table.Effective("/a.B/C"); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

func TestEffectiveEveryField(t *testing.T) {
	p, err := Parse("every-field.yaml", files(t, "good/every-field.yaml")["every-field.yaml"])
	if err != nil {
		t.Fatal(err)
	}
	want := &Effective{
		Rule: "everything", Timeout: 2 * time.Second, StreamTimeout: time.Hour, MinimumBudget: 5 * time.Millisecond, BudgetRule: "everything",
		Breaker: &Breaker{
			Rule: "everything", ErrorPercent: 25, RequestVolume: 7, Probes: 3, SlowPercent: 80,
			Window: 90 * time.Second, SleepWindow: 2500 * time.Millisecond, MaxSleepWindow: time.Hour,
			Lease: 2500 * time.Millisecond, MinDeadline: 0, SlowCall: 750 * time.Millisecond,
			FailureCodes: 1<<14 | 1<<4 | 1<<16,
		},
		RateLimit:   &RateLimit{Rule: "everything", Shared: 1, Rate: 250, Burst: 5, MaxWait: 50 * time.Millisecond},
		Concurrency: &Concurrency{Rule: "everything", Shared: 1, MaxInFlight: 8, MaxQueue: 4, MaxQueueWait: 1500 * time.Microsecond},
	}
	table := NewTable(p.Client.Rules)
	for _, method := range []string{"/a.B/C", "/a.B/D", "/a.B/Other"} {
		if want.Pattern = method; method == "/a.B/Other" {
			want.Pattern = "/a.B/*"
		}
		if got := table.Effective(method); !reflect.DeepEqual(got, want) {
			t.Errorf("%s:\ngot  %v\nwant %v", method, got, want)
		}
	}
	want = &Effective{
		Pattern: "*", Rule: "*",
		RateLimit:   &RateLimit{Rule: "*", External: "redis"},
		Concurrency: &Concurrency{Rule: "*", MaxStreams: 9},
	}
	if got := table.Effective("/a.C/D"); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

func TestInheritance(t *testing.T) {
	table := clientTable(t, `
    - methods: ["/a.B/Place"]
      breaker: {error_percent_threshold: 25}
      timeout: 0s
    - methods: ["*"]
      breaker: {request_volume_threshold: 99}
      concurrency_limit: {max_in_flight: 100}
      timeout: 2s
      stream_timeout: 1h
      minimum_budget: 3ms
    - name: orders
      methods: ["/a.B/*", "/a.C/D"]
      rate_limit: {requests_per_second: 10}
      concurrency_limit: {disabled: true}
      stream_timeout: 5m
`)
	place := table.Effective("/a.B/Place")
	if place.Rule != "/a.B/Place" || place.Timeout != 0 || place.StreamTimeout != 5*time.Minute || place.MinimumBudget != 3*time.Millisecond || place.BudgetRule != "*" {
		t.Errorf("Place: %v", place)
	}
	if b := place.Breaker; b.Rule != "/a.B/Place" || b.ErrorPercent != 25 || b.RequestVolume != 20 {
		t.Errorf("Place takes the most specific breaker, whole: %+v", b)
	}
	if r := place.RateLimit; r.Rule != "orders" || r.Rate != 10 {
		t.Errorf("Place inherits the service's rate limit: %+v", r)
	}
	if place.Concurrency != nil {
		t.Errorf("the service switches the limit of * off: %+v", place.Concurrency)
	}
	if other := table.Effective("/a.B/Other"); other.Rule != "orders" || other.Timeout != 2*time.Second || other.Breaker.Rule != "*" || other.Breaker.RequestVolume != 99 {
		t.Errorf("Other: %v", other)
	}
	if other := table.Effective("/a.C/E"); other.Rule != "*" || other.RateLimit != nil || other.Concurrency.MaxInFlight != 100 {
		t.Errorf("only one method of a.C is named: %v", other)
	}
}

func TestEffectiveIsNilIfNothingApplies(t *testing.T) {
	table := clientTable(t, `
    - methods: ["/a.B/*"]
      timeout: 1s
      breaker: {}
      rate_limit: {requests_per_second: 1}
      concurrency_limit: {max_in_flight: 1}
    - methods: ["/a.B/Free"]
      timeout: 0s
      breaker: {disabled: true}
      rate_limit: {disabled: true}
      concurrency_limit: {disabled: true}
`)
	for _, method := range []string{"/a.B/Free", "/a.C/D"} {
		if got := table.Effective(method); got != nil {
			t.Errorf("%s: %v", method, got)
		}
	}
	if table.Effective("/a.B/Other") == nil {
		t.Error("/a.B/Other: nil")
	}
}

func TestBreakerFollowsTheTimeout(t *testing.T) {
	table := clientTable(t, `
    - methods: ["*"]
      breaker: {sleep_window: 2s}
    - methods: ["/a.B/Quick"]
      timeout: 30ms
    - methods: ["/a.B/Slow"]
      timeout: 10s
`)
	for method, want := range map[string]time.Duration{
		"/a.B/None":  2 * time.Second,
		"/a.B/Quick": 2 * time.Second,
		"/a.B/Slow":  10 * time.Second,
	} {
		if got := table.Effective(method).Breaker.Lease; got != want {
			t.Errorf("%s: lease %v, want %v", method, got, want)
		}
	}
}

func TestSleepWindowDoesNotGrowByDefault(t *testing.T) {
	table := clientTable(t, "  - {methods: ['*'], breaker: {sleep_window: 2s}}\n")
	if b := table.Effective("/a.B/C").Breaker; b.SleepWindow != 2*time.Second || b.MaxSleepWindow != 2*time.Second {
		t.Errorf("sleep_window %v, max_sleep_window %v", b.SleepWindow, b.MaxSleepWindow)
	}
}

func TestDefaultBurstIsOneSecond(t *testing.T) {
	for rate, want := range map[float64]int{0.001: 1, 1: 1, 1.5: 2, 100: 100, 10_000_000: 10_000_000} {
		table := NewTable([]*resiliencev1.MethodPolicy{{
			Methods: []string{"*"}, RateLimit: &resiliencev1.RateLimit{RequestsPerSecond: rate},
		}})
		if got := table.Effective("/a.B/C").RateLimit.Burst; got != want {
			t.Errorf("%v per second: %d, want %d", rate, got, want)
		}
	}
}

func TestFailureCodes(t *testing.T) {
	for i, name := range codes {
		if i < codeUnknown {
			continue
		}
		table := clientTable(t, "  - {methods: ['*'], breaker: {failure_codes: ["+strings.ToLower(name)+"]}}\n")
		if got := table.Effective("/a.B/C").Breaker.FailureCodes; got != 1<<i {
			t.Errorf("%s: %b", name, got)
		}
	}
}

// Methods share state exactly when they take the block from the same rule.
func TestShared(t *testing.T) {
	table := clientTable(t, `
    - methods: ["/a.B/*", "/a.C/*"]
      rate_limit: {requests_per_second: 1, scope: rule}
    - methods: ["/a.D/*"]
      rate_limit: {requests_per_second: 1, scope: rule}
      concurrency_limit: {max_in_flight: 1, scope: rule}
    - methods: ["/a.B/X"]
      timeout: 1s
    - methods: ["/a.B/Y"]
      rate_limit: {requests_per_second: 1, scope: method}
`)
	shared := func(method string) int { return table.Effective(method).RateLimit.Shared }
	b := shared("/a.B/M")
	if b == 0 || shared("/a.B/N") != b || shared("/a.C/M") != b || shared("/a.B/X") != b {
		t.Error("one rule, several numbers")
	}
	if d := shared("/a.D/M"); d == 0 || d == b || table.Effective("/a.D/M").Concurrency.Shared == 0 {
		t.Error("two rules, one number")
	}
	if shared("/a.B/Y") != 0 {
		t.Error("scope method is shared")
	}
	if got := table.Effective("/a.C/M").RateLimit.Rule; got != "/a.C/*" {
		t.Errorf("without a name the rule is called %s", got)
	}
}

func TestCase30_StarNeverMatchesGRPC(t *testing.T) {
	const star = `
    - methods: ["*"]
      timeout: 1s
      breaker: {}
`
	for _, method := range []string{
		"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch",
		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "/grpc.x/", "/grpc.",
	} {
		if got := clientTable(t, star).Effective(method); got != nil {
			t.Errorf("%s: %v", method, got)
		}
	}
	for _, method := range []string{"/grpcurl.Service/M", "/my.grpc.health.v1.Health/Check", "/grpc/M", "/Grpc.x/M"} {
		if got := clientTable(t, star).Effective(method); got == nil || got.Timeout != time.Second {
			t.Errorf("%s: %v", method, got)
		}
	}
	named := clientTable(t, star+`
    - methods: ["/grpc.health.v1.Health/*"]
      minimum_budget: 1ms
    - methods: ["/grpc.health.v1.Health/Check"]
      rate_limit: {requests_per_second: 1}
`)
	want := &Effective{
		Pattern: "/grpc.health.v1.Health/Check", Rule: "/grpc.health.v1.Health/Check", MinimumBudget: time.Millisecond, BudgetRule: "/grpc.health.v1.Health/*",
		RateLimit: &RateLimit{Rule: "/grpc.health.v1.Health/Check", Rate: 1, Burst: 1},
	}
	if got := named.Effective(want.Rule); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	want = &Effective{Pattern: "/grpc.health.v1.Health/*", Rule: "/grpc.health.v1.Health/*", MinimumBudget: time.Millisecond, BudgetRule: "/grpc.health.v1.Health/*"}
	if got := named.Effective("/grpc.health.v1.Health/Watch"); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

func TestCase27_HostileMethodNames(t *testing.T) {
	rules := `
    - methods: ["/a/b"]
      timeout: 1s
    - methods: ["/a/*"]
      timeout: 2s
`
	none, star := clientTable(t, rules), clientTable(t, rules+"    - {methods: ['*'], timeout: 3s}\n")
	for _, method := range []string{
		"", "x", "/", "//", "///", "*", "/*", "/*/*", "a/b", "/a", "//a/b", "/a/b/", "/a/b/c", "/a//b", "/A/b", " /a/b",
		"/\x00/\xff", strings.Repeat("/", 1<<16), "/" + strings.Repeat("a", 1<<20) + "/b",
	} {
		if got := none.Effective(method); got != nil {
			t.Errorf("%.20q: %v, want nil", method, got)
		}
		if got := star.Effective(method); got == nil || got.Rule != "*" || got.Timeout != 3*time.Second {
			t.Errorf("%.20q: %v, want the policy of *", method, got)
		}
		if star.Names(method) {
			t.Errorf("%.20q is not named", method)
		}
	}
}

func TestExact(t *testing.T) {
	table := clientTable(t, `
    - methods: ["/b.B/C", "*", "/a.B/*"]
      timeout: 1s
    - methods: ["/a.B/C", "/a.B/A"]
      timeout: 2s
`)
	if got, want := table.Exact(), []string{"/a.B/A", "/a.B/C", "/b.B/C"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for method, want := range map[string]bool{"/a.B/C": true, "/b.B/C": true, "/a.B/D": false, "/a.B/*": false, "*": false} {
		if table.Names(method) != want {
			t.Errorf("Names(%s) = %v", method, !want)
		}
	}
	if empty := NewTable(nil); empty.Exact() != nil || empty.Effective("/a.B/C") != nil {
		t.Error("a table without rules is not empty")
	}
}

func TestTableKeepsCopies(t *testing.T) {
	rule := &resiliencev1.MethodPolicy{
		Methods: []string{"*"},
		Breaker: &resiliencev1.Breaker{HalfOpenProbes: proto.Uint32(2)},
	}
	table := NewTable([]*resiliencev1.MethodPolicy{rule})
	*rule.Breaker.HalfOpenProbes = 3
	rule.Timeout = durationpb.New(time.Second)
	if got := table.Effective("/a.B/C"); got.Breaker.Probes != 2 || got.Timeout != 0 {
		t.Errorf("got %v", got)
	}
}

func TestNewDrain(t *testing.T) {
	defaults := Drain{Announce: 5 * time.Second, Grace: 15 * time.Second, Cut: 5 * time.Second}
	if got := NewDrain(nil); got != defaults {
		t.Errorf("nil: %+v", got)
	}
	if got := NewDrain(&resiliencev1.Drain{}); got != defaults {
		t.Errorf("empty: %+v", got)
	}
	got := NewDrain(&resiliencev1.Drain{
		Announce: durationpb.New(0), Grace: durationpb.New(time.Minute), Cut: durationpb.New(time.Second), RejectNew: true,
	})
	if want := (Drain{Grace: time.Minute, Cut: time.Second, RejectNew: true}); got != want {
		t.Errorf("set: %+v", got)
	}
}

func TestCovers(t *testing.T) {
	some := clientTable(t, `
    - methods: ["/a.B/C", "/s.S/*", "/grpc.a.B/C"]
      breaker: {}
    - methods: ["/s.S/Off", "/off.S/*"]
      breaker: {disabled: true}
    - methods: ["/off.S/On"]
      timeout: 1s
`)
	star := clientTable(t, `
    - methods: ["*"]
      timeout: 1s
    - methods: ["/off.S/*"]
      timeout: 0s
`)
	grpcOnly := clientTable(t, `
    - methods: ["/grpc.a.B/*", "/grpc.c.D/E"]
      timeout: 1s
`)
	for pattern, want := range map[string][3]bool{ // some, star, grpcOnly
		"*":           {true, true, false},
		"/a.B/C":      {true, true, false},
		"/a.B/D":      {false, true, false},
		"/a.B/*":      {true, true, false},
		"/a.BB/*":     {false, true, false},
		"/s.S/*":      {true, true, false},
		"/s.S/M":      {true, true, false},
		"/s.S/Off":    {false, true, false},
		"/off.S/*":    {true, false, false},
		"/off.S/M":    {false, false, false},
		"/off.S/On":   {true, false, false},
		"/grpc.a.B/*": {true, false, true},
		"/grpc.a.B/C": {true, false, true},
		"/grpc.c.D/*": {false, false, true},
		"/grpc.c.D/F": {false, false, false},
	} {
		if got := [3]bool{some.Covers(pattern), star.Covers(pattern), grpcOnly.Covers(pattern)}; got != want {
			t.Errorf("%s: %v, want %v", pattern, got, want)
		}
		if err := CheckPattern(pattern); err != nil {
			t.Errorf("%s: %v", pattern, err)
		}
	}
	if (NewTable(nil)).Covers("*") {
		t.Error("no rule covers something")
	}
	if err := CheckPattern("a.B/C"); err == nil || !strings.Contains(err.Error(), `found "a.B/C", allowed`) {
		t.Errorf("got %v", err)
	}
}

func TestOf(t *testing.T) {
	table := clientTable(t, `
    - methods: ["*"]
      timeout: 3s
    - methods: ["/a.B/*", "/off.S/*"]
      timeout: 2s
    - methods: ["/a.B/C"]
      timeout: 1s
    - methods: ["/off.S/Off"]
      timeout: 0s
`)
	for pattern, want := range map[string]time.Duration{"*": 3 * time.Second, "/a.B/*": 2 * time.Second, "/off.S/*": 2 * time.Second, "/a.B/C": time.Second} {
		if got := table.Of(pattern); got == nil || got.Pattern != pattern || got.Timeout != want {
			t.Errorf("%s: %v, want timeout %v", pattern, got, want)
		}
	}
	for _, pattern := range []string{"/off.S/Off", "/a.B/D", "/a.C/*", "/a.B/", "/*", "", "/"} { // nothing applies, or no rule has it
		if got := table.Of(pattern); got != nil {
			t.Errorf("%q: %v", pattern, got)
		}
	}
	if got := NewTable(nil).Of("*"); got != nil {
		t.Errorf("without rules: %v", got)
	}
	for seed := range uint64(200) { // it is the very one that applies
		table := NewTable(randomRules(rand.New(rand.NewPCG(seed, 3))))
		for _, method := range methods {
			if eff := table.Effective(method); eff != nil && table.Of(eff.Pattern) != eff {
				t.Fatalf("seed %d, %s: %v, want %v", seed, method, table.Of(eff.Pattern), eff)
			}
		}
	}
}

func TestPredecessors(t *testing.T) {
	const a, b, c, all, star = "/a.B/A", "/a.B/B", "/a.B/C", "/a.B/*", "*"
	type rules [][]string
	for _, tt := range []struct {
		name        string
		before, now rules
		want        map[int]int
	}{
		{"the same", rules{{a}, {all}, {star}}, rules{{a}, {all}, {star}}, map[int]int{1: 1, 2: 2, 3: 3}},
		{"moved", rules{{a}, {all}, {star}}, rules{{star}, {a}, {all}}, map[int]int{1: 3, 2: 1, 3: 2}},
		{"one is new", rules{{a}}, rules{{b}, {a}}, map[int]int{2: 1}},
		{"one is gone", rules{{a}, {b}}, rules{{b}}, map[int]int{1: 2}},
		{"all are new", rules{{a}}, rules{{b}}, map[int]int{}},
		{"more patterns", rules{{a}}, rules{{b, all, a, star}}, map[int]int{1: 1}},
		{"fewer patterns", rules{{a, b, c}}, rules{{c}}, map[int]int{1: 1}},
		{"split: the first part goes on", rules{{a, b, c}}, rules{{c}, {a}, {b}}, map[int]int{1: 1}},
		{"joined: from the first", rules{{a}, {b}}, rules{{b, a}}, map[int]int{1: 2}},
		{"what another goes on from is passed over", rules{{a, b}, {c}}, rules{{a}, {b, c}}, map[int]int{1: 1, 2: 2}},
		{"a pattern that covers another is not the same", rules{{a}, {star}}, rules{{all}}, map[int]int{}},
		{"from nothing", nil, rules{{a}}, map[int]int{}},
		{"to nothing", rules{{a}}, nil, map[int]int{}},
	} {
		table := func(of rules) *Table {
			var policies []*resiliencev1.MethodPolicy
			for i, patterns := range of { // a name that is of its place, not of the rule
				policies = append(policies, &resiliencev1.MethodPolicy{
					Name: fmt.Sprint(i), Methods: patterns, RateLimit: &resiliencev1.RateLimit{RequestsPerSecond: 1, Scope: resiliencev1.Scope_SCOPE_RULE},
				})
			}
			return NewTable(policies)
		}
		if got := table(tt.now).Predecessors(table(tt.before), SharesRate); !maps.Equal(got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

// The numbers are those that methods with shared state have.
func TestPredecessorsAreTheSharedNumbers(t *testing.T) {
	const limited = "rate_limit: {requests_per_second: 1, scope: rule}"
	before := clientTable(t, "    - {methods: [/a.B/X], timeout: 1s}\n    - {methods: [/a.B/*], "+limited+"}\n")
	now := clientTable(t, "    - {methods: [/a.B/*], "+limited+"}\n")
	was, is := before.Effective("/a.B/M").RateLimit.Shared, now.Effective("/a.B/M").RateLimit.Shared
	if from := now.Predecessors(before, SharesRate); was == is || from[is] != was {
		t.Errorf("%v, want %d from %d", from, is, was)
	}
}
