package policy

import (
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Table is one side's rules, indexed by pattern. It is immutable and safe for
// concurrent use.
type Table struct {
	rules    []*resiliencev1.MethodPolicy
	exact    map[string]*entry // by "/pkg.Service/Method"
	services map[string]*entry // by "/pkg.Service/"
	star     *entry            // nil: no rule for "*"
}

// entry is one pattern of a rule.
type entry struct {
	rule    *resiliencev1.MethodPolicy
	pattern string
	name    string     // the rule's name, by default the pattern
	id      int        // number of the rule, from 1
	applies *Effective // to the methods for which this pattern is the most specific one; nil: nothing
}

// NewTable indexes the rules of one side, which Validate has accepted. It keeps
// copies: what the caller does to the rules afterwards has no effect.
func NewTable(rules []*resiliencev1.MethodPolicy) *Table {
	t := &Table{exact: make(map[string]*entry), services: make(map[string]*entry)}
	for i, rule := range rules {
		rule = proto.CloneOf(rule)
		t.rules = append(t.rules, rule)
		for _, pattern := range rule.GetMethods() {
			e := &entry{rule: rule, pattern: pattern, name: rule.GetName(), id: i + 1}
			if e.name == "" {
				e.name = pattern
			}
			if service, all := strings.CutSuffix(pattern, "*"); !all {
				t.exact[pattern] = e
			} else if service != "" {
				t.services[service] = e
			} else {
				t.star = e
			}
		}
	}
	for method, e := range t.exact {
		e.applies = t.effective(method)
	}
	for service, e := range t.services {
		e.applies = t.effective(service)
	}
	if t.star != nil {
		t.star.applies = t.effective("")
	}
	return t
}

// Exact returns the patterns that name one method, sorted.
func (t *Table) Exact() []string {
	return slices.Sorted(maps.Keys(t.exact))
}

// Names reports whether an exact pattern names the method.
func (t *Table) Names(method string) bool {
	return t.exact[method] != nil
}

// Effective returns what applies to a method, given by its full name
// ("/pkg.Service/Method"), or nil if nothing does: no rule matches, or every
// block is absent or switched off. Any string is a valid argument.
func (t *Table) Effective(method string) *Effective {
	if e := t.exact[method]; e != nil {
		return e.applies
	}
	if e := t.services[method[:strings.LastIndexByte(method, '/')+1]]; e != nil {
		return e.applies
	}
	if t.star == nil || strings.HasPrefix(method, "/grpc.") {
		return nil
	}
	return t.star.applies
}

// Of returns what applies to the methods for which a pattern is the most specific one;
// nil if that is nothing, or the table does not have the pattern.
func (t *Table) Of(pattern string) *Effective {
	if e := t.entry(pattern); e != nil {
		return e.applies
	}
	return nil
}

// Predecessors tells which rule of an earlier table each rule goes on from, by their
// numbers (see RateLimit.Shared), among those that have a limit (SharesRate,
// SharesPlaces): the one that had one of its patterns. Rules may be moved, renamed and
// given more patterns; one that is split goes on in the first part.
func (t *Table) Predecessors(earlier *Table, has func(*resiliencev1.MethodPolicy) bool) map[int]int {
	from, taken := map[int]int{}, map[int]bool{}
	for i, rule := range t.rules {
		if !has(rule) {
			continue
		}
		for _, pattern := range rule.GetMethods() {
			if e := earlier.entry(pattern); e != nil && has(e.rule) && !taken[e.id] {
				from[i+1], taken[e.id] = e.id, true
				break
			}
		}
	}
	return from
}

// SharesRate reports whether the methods of a rule share its rate limit.
func SharesRate(rule *resiliencev1.MethodPolicy) bool {
	return rule.GetRateLimit().GetScope() == resiliencev1.Scope_SCOPE_RULE
}

// SharesPlaces reports whether the methods of a rule share its concurrency limit.
func SharesPlaces(rule *resiliencev1.MethodPolicy) bool {
	return rule.GetConcurrencyLimit().GetScope() == resiliencev1.Scope_SCOPE_RULE
}

// Shared returns the limits that the methods of a rule share, by its number; nil:
// there is none. Their Rule is the rule's name, by default its first pattern.
func (t *Table) Shared(number int) (rate *RateLimit, places *Concurrency) {
	rule := t.rules[number-1]
	from := t.entry(rule.GetMethods()[0])
	if SharesRate(rule) {
		rate = newRateLimit(rule.GetRateLimit(), from)
	}
	if SharesPlaces(rule) {
		places = newConcurrency(rule.GetConcurrencyLimit(), from)
	}
	return rate, places
}

// entry returns that of a pattern, nil if the table does not have it.
func (t *Table) entry(pattern string) *entry {
	switch service, several := strings.CutSuffix(pattern, "*"); {
	case !several:
		return t.exact[pattern]
	case service != "":
		return t.services[service]
	}
	return t.star
}

// Covers reports whether something applies to any method that a pattern, for
// which CheckPattern has no error, matches.
func (t *Table) Covers(pattern string) bool {
	prefix, several := strings.CutSuffix(pattern, "*")
	if t.Effective(prefix) != nil {
		return true
	}
	if !several {
		return false
	}
	covers := func(entries map[string]*entry) bool {
		for name, e := range entries {
			if e.applies != nil && strings.HasPrefix(name, prefix) && (prefix != "" || !strings.HasPrefix(name, "/grpc.")) {
				return true
			}
		}
		return false
	}
	return covers(t.exact) || covers(t.services)
}

// effective applies inheritance and defaults to a method, or to all methods of a
// service ("/pkg.Service/").
func (t *Table) effective(method string) *Effective {
	chain := make([]*entry, 0, 3) // most specific first
	for _, e := range [...]*entry{
		t.exact[method],
		t.services[method[:strings.LastIndexByte(method, '/')+1]],
		t.star,
	} {
		// Health, reflection and their like must never meet a limit by accident.
		if e != nil && (e != t.star || !strings.HasPrefix(method, "/grpc.")) {
			chain = append(chain, e)
		}
	}
	if len(chain) == 0 {
		return nil
	}

	e := Effective{
		Pattern:       chain[0].pattern,
		Rule:          chain[0].name,
		Timeout:       inheritDuration(chain, (*resiliencev1.MethodPolicy).GetTimeout),
		StreamTimeout: inheritDuration(chain, (*resiliencev1.MethodPolicy).GetStreamTimeout),
	}
	if d, from := inherit(chain, (*resiliencev1.MethodPolicy).GetMinimumBudget); d.AsDuration() > 0 {
		e.MinimumBudget, e.BudgetRule = d.AsDuration(), from.name
	}
	if b, from := inherit(chain, (*resiliencev1.MethodPolicy).GetBreaker); b != nil && !b.GetDisabled() {
		e.Breaker = newBreaker(b, from, e.Timeout)
	}
	if r, from := inherit(chain, (*resiliencev1.MethodPolicy).GetRateLimit); r != nil && !r.GetDisabled() {
		e.RateLimit = newRateLimit(r, from)
	}
	if c, from := inherit(chain, (*resiliencev1.MethodPolicy).GetConcurrencyLimit); c != nil && !c.GetDisabled() {
		e.Concurrency = newConcurrency(c, from)
	}
	if r, from := inherit(chain, (*resiliencev1.MethodPolicy).GetRetry); r != nil && !r.GetDisabled() {
		e.Retry = newRetry(r, from)
	}
	if e == (Effective{Pattern: e.Pattern, Rule: e.Rule}) {
		return nil
	}
	return &e
}

// inherit returns the block of the most specific rule that has it.
func inherit[T any](chain []*entry, block func(*resiliencev1.MethodPolicy) *T) (*T, *entry) {
	for _, e := range chain {
		if b := block(e.rule); b != nil {
			return b, e
		}
	}
	return nil, nil
}

func inheritDuration(chain []*entry, field func(*resiliencev1.MethodPolicy) *durationpb.Duration) time.Duration {
	d, _ := inherit(chain, field)
	return d.AsDuration() // unset: 0
}

// Effective is what applies to one method, inheritance and defaults applied.
type Effective struct {
	Pattern       string        // the most specific one
	Rule          string        // the name of its rule, by default the pattern
	Timeout       time.Duration // unary calls; 0: none
	StreamTimeout time.Duration // 0: none
	MinimumBudget time.Duration // 0: none
	BudgetRule    string        // the rule that gave it; "": none
	Breaker       *Breaker      // nil: none
	RateLimit     *RateLimit    // nil: none
	Concurrency   *Concurrency  // nil: none
	Retry         *Retry        // nil: none
}

// Breaker is the circuit breaker of one method.
type Breaker struct {
	Rule           string // the rule that gave the block: its name, by default the pattern that matched
	Hystrix        bool   // the engine; the fields that it excludes have window's defaults
	ErrorPercent   int
	RequestVolume  int
	Probes         int
	SlowPercent    int
	Window         time.Duration
	SleepWindow    time.Duration
	MaxSleepWindow time.Duration // at least SleepWindow
	Lease          time.Duration // of a probe: the longer of SleepWindow and the method's timeout
	MinDeadline    time.Duration
	SlowCall       time.Duration // 0: slow calls are not counted
	FailureCodes   uint32        // bit n: gRPC code n is a failure
}

func newBreaker(b *resiliencev1.Breaker, from *entry, timeout time.Duration) *Breaker {
	sleep := durationOr(b.SleepWindow, defaultSleepWindow)
	e := &Breaker{
		Rule:           from.name,
		Hystrix:        UsesHystrix(from.rule),
		ErrorPercent:   numberOr(b.ErrorPercentThreshold, 50),
		RequestVolume:  numberOr(b.RequestVolumeThreshold, 20),
		Probes:         numberOr(b.HalfOpenProbes, 1),
		SlowPercent:    numberOr(b.SlowCallPercentThreshold, 100),
		Window:         durationOr(b.Window, 10*time.Second),
		SleepWindow:    sleep,
		MaxSleepWindow: durationOr(b.MaxSleepWindow, sleep),
		Lease:          max(sleep, timeout),
		MinDeadline:    durationOr(b.MinDeadline, 50*time.Millisecond),
		SlowCall:       b.SlowCallThreshold.AsDuration(),
		FailureCodes:   DefaultFailureCodes,
	}
	if len(b.FailureCodes) > 0 {
		e.FailureCodes = 0
		for _, name := range b.FailureCodes {
			e.FailureCodes |= 1 << codeNumber(name)
		}
	}
	return e
}

// UsesHystrix reports whether a rule has a breaker with engine hystrix.
func UsesHystrix(rule *resiliencev1.MethodPolicy) bool {
	return rule.GetBreaker().GetEngine() == resiliencev1.Breaker_ENGINE_HYSTRIX
}

// RateLimit is the rate limit of one method.
type RateLimit struct {
	Rule     string        // as in Breaker
	Shared   int           // 0: the method's own; else equal for all methods that share the state
	Rate     float64       // calls per second
	Pacing   bool          // calls are spaced evenly
	Burst    int           // tokens in a full bucket; with Pacing the slack
	MaxWait  time.Duration // 0: reject at once
	External string        // name of the limiter that decides instead; the fields above but Rule are 0
}

func newRateLimit(r *resiliencev1.RateLimit, from *entry) *RateLimit {
	if r.External != "" {
		return &RateLimit{Rule: from.name, External: r.External}
	}
	pacing, burst := r.Algorithm == resiliencev1.RateLimit_ALGORITHM_PACING, int(math.Ceil(r.RequestsPerSecond))
	if pacing {
		burst = 10 // go.uber.org/ratelimit's own default
	}
	return &RateLimit{
		Rule:    from.name,
		Shared:  shared(r.Scope, from),
		Rate:    r.RequestsPerSecond,
		Pacing:  pacing,
		Burst:   numberOr(r.Burst, burst),
		MaxWait: r.MaxWait.AsDuration(),
	}
}

// Concurrency is the limit on calls in flight of one method.
type Concurrency struct {
	Rule         string        // as in Breaker
	Shared       int           // as in RateLimit
	MaxInFlight  int           // unary calls, with Shared also streams; 0: unlimited
	MaxStreams   int           // 0: unlimited
	MaxQueue     int           // 0: reject at once
	MaxQueueWait time.Duration // 0: until the caller's deadline
}

func newConcurrency(c *resiliencev1.ConcurrencyLimit, from *entry) *Concurrency {
	return &Concurrency{
		Rule:         from.name,
		Shared:       shared(c.Scope, from),
		MaxInFlight:  numberOr(c.MaxInFlight, 0),
		MaxStreams:   numberOr(c.MaxStreams, 0),
		MaxQueue:     int(c.MaxQueue),
		MaxQueueWait: c.MaxQueueWait.AsDuration(),
	}
}

// Drain is how a server stops.
type Drain struct {
	Announce, Grace, Cut time.Duration
	RejectNew            bool
}

// NewDrain fills in the defaults: 5s, 15s and 5s. A nil message is all defaults.
func NewDrain(d *resiliencev1.Drain) Drain {
	return Drain{
		Announce:  durationOr(d.GetAnnounce(), 5*time.Second),
		Grace:     durationOr(d.GetGrace(), 15*time.Second),
		Cut:       durationOr(d.GetCut(), 5*time.Second),
		RejectNew: d.GetRejectNew(),
	}
}

// defaultSleepWindow is also the lower bound of max_sleep_window.
const defaultSleepWindow = 5 * time.Second

func shared(s resiliencev1.Scope, from *entry) int {
	if s == resiliencev1.Scope_SCOPE_RULE {
		return from.id
	}
	return 0
}

func durationOr(d *durationpb.Duration, unset time.Duration) time.Duration {
	if d == nil {
		return unset
	}
	return d.AsDuration()
}

func numberOr(n *uint32, unset int) int {
	if n == nil {
		return unset
	}
	return int(*n)
}
