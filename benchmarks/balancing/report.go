package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/grpc-resilience/grpc-resilience/benchmarks/internal/page"
)

const chartFolder = "balancing"

// claim is what this module promises, and what was measured.
type claim struct {
	what, got, most string
	held            bool
	disturbed       bool // by others on the machine
}

// The policy's defaults.
const (
	sleepWindow = 5 * time.Second
	returnsIn   = sleepWindow + 5*time.Second
)

func (m *measured) run(name string) (run, bool) {
	i := slices.IndexFunc(m.runs, func(r run) bool { return r.name == name })
	if i < 0 {
		return run{}, false
	}
	return m.runs[i], true
}

// claims are those of the scenarios that were played.
func (m *measured) claims() (list []claim) {
	add := func(what string, got, most string, held bool, r run) {
		list = append(list, claim{what, got, most, held, r.disturbed()})
	}
	most := func(what string, got, most float64, unit string, r run) {
		add(what, fmt.Sprintf("%.2f%s", got, unit), fmt.Sprintf("%v%s", most, unit), got <= most, r)
	}
	if s, ok := m.run(slow); ok {
		o := s.outcomes[ours]
		most("one of ten ten times slower: p99, against that of ten alike in the same seconds", o.p99/s.outcomes[ourControl].p99, 1.5, " ×", s)
		most("one of ten ten times slower: its share of the calls, of a fair one", o.share, 20, " %", s)
	}
	for _, name := range []string{unavailable, exhausted} {
		if s, ok := m.run(name); ok {
			most(fmt.Sprintf("%s: calls that fail, from %v on, without retries", name, m.set.settled), s.outcomes[ours].failedOn, 1, " %", s)
		}
	}
	for _, name := range []string{slow, unavailable, exhausted, silent} {
		if s, ok := m.run(name); ok {
			o := s.outcomes[ours]
			add(fmt.Sprintf("%s: from when it is well until it has 80 %% of its share", name), o.backText(m.set), fmt.Sprint(returnsIn), o.returned && o.back <= returnsIn, s)
		}
	}
	if s, ok := m.run(rolling); ok {
		most("rolling restart: calls that fail", s.outcomes[ours].failed, 0, " %", s)
	}
	for _, p := range m.picks {
		if p.arm == ours {
			most(fmt.Sprintf("a pick and its end, %d endpoints", p.endpoints), p.ns, 250, " ns", run{})
			most(fmt.Sprintf("a pick and its end, %d endpoints: allocations", p.endpoints), p.allocs, 0, "", run{})
		}
	}
	return list
}

func (o outcome) backText(set settings) string {
	if !o.returned {
		return fmt.Sprintf("not in %v", set.after)
	}
	return fmt.Sprintf("%.1fs", o.back.Seconds())
}

// charts are the drawings of the scenarios that were played.
func (m *measured) charts() (list []chart) {
	shares := func(s []sample) float64 { return share(s, 0) }
	p99 := func(s []sample) float64 { return quantile(s, 0.99) }
	for _, c := range []struct {
		scenario, file, title, axis string
		of                          func([]sample) float64
	}{
		{slow, "slow-share.svg", "One of ten is ten times slower: its share of the calls", "% of a fair share", shares},
		{slow, "slow-p99.svg", "One of ten is ten times slower: the 99th percentile of all calls", "p99 of each second, ms", p99},
		{unavailable, "unavailable-share.svg", "One of ten fails at once: its share of the calls", "% of a fair share", shares},
		{exhausted, "exhausted-errors.svg", "One of ten rejects at once: calls that fail", "% of the calls", failed},
		{silent, "silent-errors.svg", "One of ten is a black hole: calls that fail", "% of the calls", failed},
		{rolling, "rolling-p99.svg", "Rolling restart: the 99th percentile of all calls", "p99 of each second, ms", p99},
		{flapping, "flapping-errors.svg", "One of ten fails every other second: calls that fail", "% of the calls", failed},
	} {
		if r, ok := m.run(c.scenario); ok {
			list = append(list, chart{c.file, c.title, c.axis, r, m.set, c.of})
		}
	}
	return list
}

// markdown puts the report together.
func (m *measured) markdown() string {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format, args...) }
	p(`# Load balancing, measured

Written by `+"`make bench-balancing`"+` on %s; do not edit. It compares `+"`client.load_balancing`"+` ([what it does and its keys](policy.md#clientload_balancing)) with the balancers of grpc-go when an endpoint is slow, fails, hangs or comes and goes.

`, time.Now().UTC().Format("2 January 2006, 15:04 UTC"))
	for _, line := range page.Machine("google.golang.org/grpc google.golang.org/protobuf") {
		p("- %s\n", line)
	}
	fault, _ := scenarios[1].spans(m.set)
	p(`
Each arm has a channel and %d gRPC servers of its own on addresses 127.0.x.y, over TCP. All arms are called at the same time, so that what disturbs one disturbs all. Calls come at %v a second for each arm, at random times that are
the same for all and do not depend on the answers (an open loop); a call's time counts from when it should have begun. Servers answer after %v and, on average, %v more (exponentially distributed), which costs no CPU. Each call has a deadline of %v. Nobody retries.
%v pass before a scenario begins; a fault lasts %v. Who else uses the machine delays calls before anybody balances them: in brackets behind a scenario is how late one of a hundred calls began. If that is more than %d ms the scenario is played
again, up to %d times; shown is the run that was disturbed least, and what it says is marked if it was disturbed still.

`, replicas, m.set.rate, leastDelay, moreDelay, deadline, m.set.warmUp, fault, undisturbed, m.set.attempts)
	for _, a := range arms {
		p("- `%s`: %s\n", a.name, a.about)
	}
	p("\n## Claims\n\nWhat this project has set itself, and what came of it in this run.\n")
	var rows [][]string
	for _, c := range m.claims() {
		verdict := "held"
		if !c.held {
			verdict = "**NOT HELD**"
		}
		if c.disturbed {
			verdict += ", disturbed"
		}
		rows = append(rows, []string{c.what, c.most, c.got, verdict})
	}
	b.WriteString(page.Table([]string{"what", "at most", "measured", ""}, rows))

	p("\n## Scenarios\n\n")
	for _, r := range m.runs {
		p("- %s: %s (%.1f ms)\n", r.name, r.about, r.late)
	}
	p(`
Times and errors are of the calls that begin while the fault lasts, or of all of them where it does not end; failed calls count with the time they took. The share is that of the endpoint which is bad, in percent of a tenth of the
calls. Back is how long after the fault's end there begins a second in which the endpoint has 80 %% of its share, and has it on average from then on; 0 for who never took it away. "%s" has ten that are alike, in the same seconds.
`, ourControl)
	rows = nil
	for _, r := range m.runs {
		name := r.name
		list := arms
		if r.control {
			list = append(slices.Clone(list), arm{name: ourControl})
		}
		for _, a := range list {
			o := r.outcomes[a.name]
			row := []string{name, a.name, fmt.Sprintf("%.1f", o.p50), fmt.Sprintf("%.1f", o.p99), fmt.Sprintf("%.2f", o.failed), fmt.Sprintf("%.2f", o.failedOn), "", ""}
			if a.name != ourControl && (r.victim || r.bad()) {
				row[6] = fmt.Sprintf("%.1f", o.share)
			}
			if a.name != ourControl && r.bad() {
				row[7] = o.backText(m.set)
			}
			rows, name = append(rows, row), ""
		}
	}
	b.WriteString(page.Table([]string{"", "", "p50, ms", "p99, ms", "failed, %", fmt.Sprintf("from %v on", m.set.settled), "share, %", "back"}, rows))
	p("\n")
	for _, c := range m.charts() {
		p("![%s](%s/%s)\n\n", c.title, chartFolder, c.file)
	}
	if len(m.picks) > 0 {
		p(`## The cost of a pick

A pick, and the end of the oldest of %d calls in flight, one after the other on one core, without the calls themselves; the best of %d rounds of all arms in turns, before and after each
scenario: what neighbours take of the core is not the pick's.
round_robin has nothing to do at the end of a call.
`, inFlight, m.set.pickTurns*(len(m.runs)+1))
		rows = nil
		for _, c := range m.picks {
			rows = append(rows, []string{c.arm, fmt.Sprint(c.endpoints), fmt.Sprintf("%.0f", c.ns), fmt.Sprint(c.allocs)})
		}
		b.WriteString(page.Table([]string{"", "endpoints", "ns", "allocations"}, rows))
	}
	b.WriteString(forReaders)
	return b.String()
}

// bad reports whether an endpoint is, until the fault ends.
func (s scenario) bad() bool { return s.fault != behaviour{} }

const forReaders = `
## How it works

Of two endpoints drawn at random a call goes to the one where it has to expect less: the endpoint's latency (a peak EWMA: worse counts at once, better slowly) times the calls in flight there. Two and not all, because the best of all
would get everybody's calls at once. A failure or a rejection, however fast, counts as a high cost that fades. Beside that each endpoint has a circuit breaker: after 5 failures in a row, or when half of its calls fail or are slow against
the median endpoint, it is ejected for 5 s, and the first call after that decides whether it comes back; a probe that fails doubles the time, up to a minute, so who was bad for long may come back that late. Never more than half of the endpoints are ejected, and when too few are
left all are used. It needs nothing of the servers.

## When round_robin is as good

- All endpoints are alike and well, and calls cost the same: see "all alike". Then round_robin spreads calls more evenly than any choice at random, and its pick is the cheapest.
- Endpoints come and go with their connections, as in a rolling restart or when a process dies: gRPC itself takes an endpoint out of any balancer when its connection ends.
- There are few calls: a channel with less than a call a second for each endpoint learns too little of them. So does each of many clients of which every one makes few calls.
- Something behind one address, a proxy or a mesh, balances already: there is nothing to choose.

least_request_experimental helps against an endpoint that hangs or is slow, the more the more calls are in flight, and needs no memory. It likes an endpoint that fails fast: there are never calls in flight.
weighted_round_robin knows most about servers that report their load truthfully, in particular of different sizes, and of the load that other clients put on them, which no client sees by itself.
gRPC has outlier detection, too (gRFC A50), which ejects endpoints by their errors, but not by their time; in grpc-go it comes with xDS, and is no arm here.
`
