package policy

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Validate checks a policy built in Go. The error joins every mistake, each as
// "path: what was found, what is allowed".
func Validate(p *resiliencev1.Policy) error {
	if p == nil {
		return errors.New("policy: found nil, allowed a policy")
	}
	var v validator
	v.policy(p)
	errs := make([]error, len(v.mistakes))
	for i, m := range v.mistakes {
		errs[i] = errors.New(m.String())
	}
	return errors.Join(errs...)
}

// validator checks what the schema says in words: ranges, and what needs or
// excludes what.
type validator struct {
	report
	unread   map[string]bool   // as in decoder; nil for a policy built in Go
	patterns map[string]string // of one side: where each was found first
}

func (v *validator) policy(p *resiliencev1.Policy) {
	v.in("client", func() {
		v.rules(p.GetClient().GetRules())
		if b := p.GetClient().GetLoadBalancing(); b != nil {
			v.in("load_balancing", func() { v.loadBalancing(b) })
		}
		if r := p.GetClient().GetRetryThrottling(); r != nil {
			v.in("retry_throttling", func() { v.retryThrottling(r) })
		}
	})
	v.in("server", func() {
		v.rules(p.GetServer().GetRules())
		v.in("drain", func() { v.drain(p.GetServer().GetDrain()) })
	})
}

func (v *validator) drain(d *resiliencev1.Drain) {
	v.duration("announce", d.GetAnnounce(), 0, 10*time.Minute)
	v.duration("grace", d.GetGrace(), 0, 24*time.Hour)
	v.duration("cut", d.GetCut(), 0, 10*time.Minute)
}

func (v *validator) rules(rules []*resiliencev1.MethodPolicy) {
	v.patterns = make(map[string]string)
	v.in("rules", func() {
		if len(rules) > maxRules {
			v.item(maxRules, func() { v.fail("", "found %d rules, allowed %d", len(rules), maxRules) })
		}
		for i, rule := range rules {
			v.item(i, func() { v.rule(rule) })
		}
	})
}

const maxRules = 10_000

func (v *validator) rule(r *resiliencev1.MethodPolicy) {
	if name := r.GetName(); utf8.RuneCountInString(name) > 100 || !printable(name) {
		v.fail("name", "found %s, allowed at most 100 printable characters", quoted(name))
	}
	v.in("methods", func() {
		for i, pattern := range r.GetMethods() {
			v.item(i, func() { v.pattern(pattern) })
		}
	})
	if len(r.GetMethods()) == 0 && v.readWhole() {
		v.fail("methods", "found nothing, allowed one or more of %s", patternForms)
	}
	if b := r.GetBreaker(); b != nil {
		v.in("breaker", func() { v.breaker(b) })
	}
	if l := r.GetRateLimit(); l != nil {
		v.in("rate_limit", func() { v.rateLimit(l) })
	}
	if c := r.GetConcurrencyLimit(); c != nil {
		v.in("concurrency_limit", func() { v.concurrencyLimit(c) })
	}
	if retry := r.GetRetry(); retry != nil {
		v.in("retry", func() { v.retry(retry) })
	}
	v.timeout("timeout", r.GetTimeout(), 24*time.Hour)
	v.timeout("stream_timeout", r.GetStreamTimeout(), 720*time.Hour)
	v.duration("minimum_budget", r.GetMinimumBudget(), 0, time.Hour)
	if v.readWhole() && r.GetBreaker() == nil && r.GetRateLimit() == nil && r.GetConcurrencyLimit() == nil &&
		r.GetTimeout() == nil && r.GetStreamTimeout() == nil && r.GetMinimumBudget() == nil && r.GetRetry() == nil {
		v.fail("", "found a rule that sets nothing, allowed one with "+
			"breaker, rate_limit, concurrency_limit, timeout, stream_timeout, minimum_budget or retry")
	}
}

const patternForms = `"*", "/pkg.Service/*" or "/pkg.Service/Method"`

// CheckPattern returns what is wrong with a pattern that is not in a policy.
func CheckPattern(p string) error {
	if !isPattern(p) {
		return fmt.Errorf("found %s, allowed %s", quoted(p), patternForms)
	}
	return nil
}

func (v *validator) pattern(p string) {
	if err := CheckPattern(p); err != nil {
		v.fail("", "%v", err)
	} else if first, twice := v.patterns[p]; twice {
		v.record("", mistake{first: first, text: fmt.Sprintf("found %s a second time, allowed once, first at %s", quoted(p), first)})
	} else {
		v.patterns[p] = string(v.path)
	}
}

func isPattern(p string) bool {
	word := func(s string) bool {
		return s != "" && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || r == '*' || r == '/' })
	}
	path, rooted := strings.CutPrefix(p, "/")
	service, method, _ := strings.Cut(path, "/")
	return p == "*" || rooted && word(service) && (method == "*" || word(method))
}

func (v *validator) breaker(b *resiliencev1.Breaker) {
	if b.Disabled {
		v.alone(b, "disabled")
		return
	}
	v.enum("engine", b.Engine)
	if b.Engine == resiliencev1.Breaker_ENGINE_HYSTRIX {
		v.hystrix(b)
	}
	v.number("error_percent_threshold", b.ErrorPercentThreshold, 1, 100)
	v.number("request_volume_threshold", b.RequestVolumeThreshold, 1, 1_000_000)
	v.duration("window", b.Window, 100*time.Millisecond, time.Hour)
	v.sleepWindows(b.SleepWindow, b.MaxSleepWindow)
	v.number("half_open_probes", b.HalfOpenProbes, 1, 1000)
	v.duration("min_deadline", b.MinDeadline, 0, time.Hour)
	v.duration("slow_call_threshold", b.SlowCallThreshold, time.Millisecond, time.Hour)
	v.number("slow_call_percent_threshold", b.SlowCallPercentThreshold, 1, 100)
	if b.SlowCallPercentThreshold != nil && b.SlowCallThreshold == nil && v.readWhole() {
		v.fail("slow_call_percent_threshold", "found no slow_call_threshold, allowed only with it")
	}
	v.in("failure_codes", func() { v.failureCodes(b.FailureCodes) })
}

// hystrix refuses what hystrix-go has no setting for.
func (v *validator) hystrix(b *resiliencev1.Breaker) {
	fixed := [...]struct {
		field string
		set   bool
		why   string
	}{
		{"window", b.Window != nil, "its window is 10s"},
		{"max_sleep_window", b.MaxSleepWindow != nil, "its sleep window does not grow"},
		{"half_open_probes", b.HalfOpenProbes != nil, "it lets one probe through in each sleep window"},
		{"slow_call_threshold", b.SlowCallThreshold != nil, "it does not count slow calls"},
		{"slow_call_percent_threshold", b.SlowCallPercentThreshold != nil, "it does not count slow calls"},
	}
	for _, f := range fixed {
		if f.set {
			v.fail(f.field, "found beside engine hystrix, allowed only with engine window: %s", f.why)
		}
	}
	if d := b.SleepWindow; d != nil && d.Nanos%int32(time.Millisecond) != 0 {
		v.fail("sleep_window", "found %s, allowed whole milliseconds with engine hystrix", units(d.AsDuration()))
	}
}

func (v *validator) failureCodes(names []string) {
	var seen uint32
	for i, name := range names {
		v.item(i, func() {
			switch n := codeNumber(name); {
			case n < 0:
				v.fail("", "found %s, nearest is %s, allowed %s", quoted(name), nearest(name, failureCodes), strings.Join(failureCodes, ", "))
			case n < codeUnknown:
				v.fail("", "found %s, which is no failure, allowed %s", quoted(name), strings.Join(failureCodes, ", "))
			case seen&(1<<n) != 0:
				v.fail("", "found %s a second time, allowed once", quoted(name))
			default:
				seen |= 1 << n
			}
		})
	}
}

func (v *validator) rateLimit(l *resiliencev1.RateLimit) {
	switch {
	case l.Disabled:
		v.alone(l, "disabled")
		return
	case l.External != "":
		if !printable(l.External) {
			v.fail("external", "found %s, allowed printable characters", quoted(l.External))
		}
		v.alone(l, "external")
		return
	}
	v.rate(l, ", or external instead")
	v.enum("scope", l.Scope)
	v.duration("max_wait", l.MaxWait, 0, time.Hour)
}

// rate checks what a bucket or a pacer is made from.
func (v *validator) rate(l *resiliencev1.RateLimit, instead string) {
	v.enum("algorithm", l.Algorithm)
	most, least := 10_000_000, uint32(1)
	if l.Algorithm == resiliencev1.RateLimit_ALGORITHM_PACING {
		most, least = 1_000_000, 0 // its interval is in whole nanoseconds
	}
	v.number("burst", l.Burst, least, 10_000_000)
	const month = 30 * 24 * 3600 // seconds
	switch rate := l.RequestsPerSecond; {
	case rate == 0:
		if v.readWhole() {
			v.fail("requests_per_second", "found 0 or nothing, allowed 0.001 to %d%s", most, instead)
		}
	case !(rate >= 0.001 && rate <= float64(most)): // also NaN
		v.fail("requests_per_second", "found %s, allowed 0.001 to %d", short(strconv.FormatFloat(rate, 'f', -1, 64)), most)
	case l.GetBurst() <= 10_000_000 && float64(l.GetBurst()) > rate*month:
		v.fail("burst", "found %d, allowed %d to %.0f, so that the bucket fills within 30 days", l.GetBurst(), least, math.Floor(rate*month))
	}
}

func (v *validator) concurrencyLimit(c *resiliencev1.ConcurrencyLimit) {
	if c.Disabled {
		v.alone(c, "disabled")
		return
	}
	v.enum("scope", c.Scope)
	v.number("max_in_flight", c.MaxInFlight, 1, 1_000_000)
	v.number("max_streams", c.MaxStreams, 1, 1_000_000)
	v.number("max_queue", &c.MaxQueue, 0, 1_000_000)
	v.duration("max_queue_wait", c.MaxQueueWait, time.Millisecond, time.Hour)
	if c.MaxStreams != nil && c.Scope == resiliencev1.Scope_SCOPE_RULE {
		v.fail("max_streams", "found %d with scope rule, allowed none: unary calls and streams share max_in_flight", *c.MaxStreams)
	}
	if c.MaxInFlight == nil && c.MaxStreams == nil && v.readWhole() {
		v.fail("max_in_flight", "found nothing, allowed 1 to 1000000, or max_streams instead")
	}
	if c.MaxQueueWait != nil && c.MaxQueue == 0 && v.readWhole() {
		v.fail("max_queue_wait", "found no max_queue, allowed only with it")
	}
}

// alone refuses every other field of m that is set.
func (v *validator) alone(m proto.Message, field string) {
	fields := m.ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		if f := fields.Get(i); string(f.Name()) != field && m.ProtoReflect().Has(f) {
			v.fail(string(f.Name()), "found beside %s, allowed only without it", field)
		}
	}
}

func (v *validator) enum(field string, e protoreflect.Enum) {
	if values := e.Descriptor().Values(); values.ByNumber(e.Number()) == nil {
		v.fail(field, "found %d, allowed %s", e.Number(), strings.Join(enumNames(values)[1:], ", "))
	}
}

func (v *validator) number(field string, n *uint32, least, most uint32) {
	if n != nil && (*n < least || *n > most) {
		v.fail(field, "found %d, allowed %d to %d", *n, least, most)
	}
}

// timeout is a duration that 0s switches off.
func (v *validator) timeout(field string, d *durationpb.Duration, most time.Duration) {
	if d.GetSeconds() != 0 || d.GetNanos() != 0 {
		v.within(field, d, time.Millisecond, most, "0s, or ")
	}
}

func (v *validator) duration(field string, d *durationpb.Duration, least, most time.Duration) {
	v.within(field, d, least, most, "")
}

func (v *validator) within(field string, d *durationpb.Duration, least, most time.Duration, also string) {
	if d == nil {
		return
	}
	t := d.AsDuration()
	if valid := d.CheckValid() == nil; valid && least <= t && t <= most {
		return
	}
	found := units(t)
	if back := durationpb.New(t); back.Seconds != d.Seconds || back.Nanos != d.Nanos { // malformed, or too long for Go
		found = fmt.Sprintf("%d seconds and %d nanoseconds", d.Seconds, d.Nanos)
	}
	v.fail(field, "found %s, allowed %s%s to %s", found, also, units(least), units(most))
}

// readWhole reports whether everything in the message at hand could be read:
// only then can something be said to be missing.
func (v *validator) readWhole() bool {
	return !v.unread[string(v.path)]
}

// fail records a mistake in a field of the message at hand, or in the message
// itself ("").
func (v *validator) fail(field, format string, args ...any) {
	v.record(field, mistake{text: fmt.Sprintf(format, args...)})
}

// record leaves out what is said of a value that could not be read.
func (v *validator) record(field string, m mistake) {
	m.path = string(v.path)
	if field != "" {
		m.path += "." + field
	}
	if !v.unread[m.path] {
		v.mistakes = append(v.mistakes, m)
	}
}

// units is d without the zeros of time.Duration's own notation (1h0m0s).
func units(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = s[:len(s)-2]
	}
	if strings.HasSuffix(s, "h0m") {
		s = s[:len(s)-2]
	}
	return s
}
