package main

import (
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/google/pprof/profile"

	"github.com/grpc-resilience/grpc-resilience/benchmarks/internal/page"
)

// A report is docs/performance.md in the making.
type report struct {
	body    strings.Builder
	budgets []budget
}

// A budget is a figure and the most that its median may be.
type budget struct {
	what string
	got  series
	most float64
	unit string
	why  *profile.Profile // of one that is not reached; nil: no profile would say
}

func (b budget) reached() bool { return b.got.median() <= b.most }

// check compares a figure with its budget. why profiles what takes too long, nil if
// no profile would say.
func (r *report) check(what string, got series, most float64, unit string, why func() *profile.Profile) {
	b := budget{what: what, got: got, most: most, unit: unit}
	if why != nil && !b.reached() {
		progress("not reached, profiling: %s", what)
		b.why = why()
	}
	r.budgets = append(r.budgets, b)
}

func (r *report) section(title, text string) { fmt.Fprintf(&r.body, "\n## %s\n\n%s\n", title, text) }

func (r *report) text(text string) { fmt.Fprintf(&r.body, "\n%s\n", text) }

func (r *report) table(head []string, rows [][]string) { r.body.WriteString(page.Table(head, rows)) }

// notes are names, and what there is to say beside.
func (r *report) notes(list [][]string) {
	r.body.WriteByte('\n')
	for _, n := range list {
		if n[1] != "" {
			fmt.Fprintf(&r.body, "- %s: %s\n", n[0], n[1])
		}
	}
}

// modules are those whose versions the report names.
const modules = `github.com/afex/hystrix-go github.com/failsafe-go/failsafe-go github.com/go-kratos/aegis
	github.com/grpc-ecosystem/go-grpc-middleware/v2 github.com/sony/gobreaker/v2 go.opentelemetry.io/otel go.uber.org/ratelimit
	go.yaml.in/yaml/v3 golang.org/x/time google.golang.org/grpc google.golang.org/protobuf`

// markdown puts the report together.
func (r *report) markdown() string {
	var out strings.Builder
	fmt.Fprintf(&out, `# Performance

Written by `+"`make bench`"+` on %s; do not edit. What is compared was measured in one run, so that it had the same machine, neighbours and minutes.
Absolute times say little about another machine; ratios say more.

`, time.Now().UTC().Format("2 January 2006, 15:04 UTC"))
	for _, line := range page.Machine(modules) {
		fmt.Fprintf(&out, "- %s\n", line)
	}
	out.WriteString(`
Time and CPU are measured in many short rounds, each arm once a round, in a new order each round; a ratio is of two figures of the same round. Shown is the median over the
rounds, in brackets the lower and the upper quartile. Sections that measure otherwise say so.

## Budgets

What this project has set itself. A budget is reached if the median is; what misses it is profiled at the end of this page.
`)
	var rows [][]string
	missed := map[*profile.Profile][]string{} // one may be of several budgets
	for _, b := range r.budgets {
		verdict := "reached"
		if !b.reached() {
			verdict = "**not reached**"
			missed[b.why] = append(missed[b.why], b.what)
		}
		rows = append(rows, []string{b.what, number(b.most) + b.unit, spreadTo(4, b.got), verdict})
	}
	out.WriteString(page.Table([]string{"what", "at most", "measured", ""}, rows))
	out.WriteString(r.body.String())
	out.WriteString("\n## Not reached, and why\n\nWhat was tried, and why it stays as it is: [decisions.md](decisions.md#what-a-call-costs), and [of the policy](decisions.md#the-policy) and [of metrics](decisions.md#metrics).\n")
	for _, b := range r.budgets {
		if of := missed[b.why]; b.why != nil && of[0] == b.what {
			fmt.Fprintf(&out, "\n%s: a CPU profile, by functions and by packages.\n", strings.Join(of, "; "))
			out.WriteString(page.Table([]string{"function", "its own", "with its calls"}, top(b.why, 12, itself, true)))
			out.WriteString(page.Table([]string{"package", "its own", "with its calls"}, top(b.why, 12, packageOf, false)))
		}
	}
	return out.String()
}

// number writes three digits that mean something.
func number(v float64) string { return numberTo(3, v) }

func numberTo(digits int, v float64) string {
	digits -= 1 + int(math.Floor(math.Log10(math.Max(math.Abs(v), 0.001))))
	s := fmt.Sprintf("%.*f", min(max(digits, 0), 3), v)
	if strings.Contains(s, ".") {
		return strings.TrimRight(strings.TrimRight(s, "0"), ".")
	}
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

func spread(s series) string { return spreadTo(3, s) }

// spreadTo is the median, and the quartiles unless they are the same.
func spreadTo(digits int, s series) string {
	median, low, high := numberTo(digits, s.median()), numberTo(digits, s.quantile(0.25)), numberTo(digits, s.quantile(0.75))
	if low == high {
		return median
	}
	return fmt.Sprintf("%s (%s–%s)", median, low, high)
}

func times(s series) string { return number(s.median()) + " ×" }
