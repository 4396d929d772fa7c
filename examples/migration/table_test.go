package migration

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The columns of the README's table.
const (
	ours       = "grpc-resilience"
	hystrixGo  = "hystrix-go"
	failsafeGo = "failsafe-go"
	goBreaker  = "gobreaker"
	middleware = "go-grpc-middleware"
)

// cell is what the table says of one project, and the proof.
type cell struct {
	says  string
	check func(*testing.T)
}

// row is a line of the table. A project that a row is not about has no cell
// here, and a dash there.
type row struct {
	title string
	cells map[string]cell
}

const dash = "–"

// table is the README's, line by line.
var table = []row{
	{"Streams", map[string]cell{
		ours:       {"breaker, limits and timeout, on both sides; the verdict is the final status", streamsOfOurs},
		hystrixGo:  {"`DoC` sees a stream open, not end", streamsOfHystrix},
		failsafeGo: {"pass: its interceptors are unary; `NewServerInHandle` can refuse them, but sees no end", streamsOfFailsafe},
		goBreaker:  {"`Execute` sees a stream open, not end; by hand with `TwoStepCircuitBreaker`", streamsOfGobreaker},
		middleware: {"limited and recovered", streamsOfMiddleware},
	}},
	{"State of one method", map[string]cell{
		ours:       {"its own, from one rule", methodsOfOurs},
		hystrixGo:  {"by the name that each call gives", methodsOfHystrix},
		failsafeGo: {"shared by all methods of an interceptor", methodsOfFailsafe},
		goBreaker:  {"one a breaker; a map of breakers is yours to write", methodsOfGobreaker},
		middleware: {"one limiter for all", methodsOfMiddleware},
	}},
	{"A refused call gets", map[string]cell{
		ours:       {"`UNAVAILABLE` or `RESOURCE_EXHAUSTED`, `RetryInfo`, retry pushback", refusalOfOurs},
		hystrixGo:  {"a Go error; out of a handler `UNKNOWN`", refusalOfHystrix},
		failsafeGo: {"interceptors: `UNKNOWN`; `NewServerInHandle`: `PERMISSION_DENIED`", refusalOfFailsafe},
		goBreaker:  {"a Go error; out of a handler `UNKNOWN`", refusalOfGobreaker},
		middleware: {"`RESOURCE_EXHAUSTED` and the limiter's error as text", refusalOfMiddleware},
	}},
	{"`NOT_FOUND` is a failure", map[string]cell{
		ours:       {"no", notFoundOfOurs},
		hystrixGo:  {"yes", notFoundOfHystrix},
		failsafeGo: {"yes, unless `HandleIf` says no", notFoundOfFailsafe},
		goBreaker:  {"yes, unless `IsSuccessful` says no", notFoundOfGobreaker},
	}},
	{"The caller's cancel is a failure", map[string]cell{
		ours:       {"no", cancelOfOurs},
		hystrixGo:  {"yes with `Do`", cancelOfHystrix},
		failsafeGo: {"yes, unless `HandleIf` says no", cancelOfFailsafe},
		goBreaker:  {"yes, unless `IsExcluded` says no", cancelOfGobreaker},
	}},
	{"A late success from before the opening", map[string]cell{
		ours:       {"is dropped", staleOfOurs},
		hystrixGo:  {"closes the open circuit", staleOfHystrix},
		failsafeGo: {"closes a half-open breaker", staleOfFailsafe},
		goBreaker:  {"is dropped", staleOfGobreaker},
	}},
	{"A half-open probe that hangs", map[string]cell{
		ours:       {"another is let in when its lease ends", probeOfOurs},
		hystrixGo:  {"another is let in after the sleep window", probeOfHystrix},
		failsafeGo: {"all calls are refused until it ends", probeOfFailsafe},
		goBreaker:  {"all calls are refused until it ends", probeOfGobreaker},
	}},
	{"A panic in the call", map[string]cell{
		ours:       {"a failure; permits come back", panicOfOurs},
		hystrixGo:  {"ends the process: it is on another goroutine", panicOfHystrix},
		failsafeGo: {"permits are lost", panicOfFailsafe},
		goBreaker:  {"a failure", panicOfGobreaker},
		middleware: {"recovered in a server's handlers", panicOfMiddleware},
	}},
	{"A client reads of a handler's panic", map[string]cell{
		ours:       {"`INTERNAL` and an incident id", panicTextOfOurs},
		failsafeGo: {"not recovered", panicTextOfFailsafe},
		middleware: {"`UNKNOWN`, the panic's text and stack, unless a handler is set", panicTextOfMiddleware},
	}},
	{"At its timeout a call", map[string]cell{
		ours:       {"is cancelled; its caller returns after it", timeoutOfOurs},
		hystrixGo:  {"runs on, not cancelled, when `DoC` has returned", timeoutOfHystrix},
		failsafeGo: {"is cancelled; its caller returns after it", timeoutOfFailsafe},
		middleware: {"is cancelled; its caller returns after it", timeoutOfMiddleware},
	}},
	{"Waiting for a permit", map[string]cell{
		ours:       {"ends with the call's context; a turn after its deadline is refused at once and spends nothing", waitOfOurs},
		hystrixGo:  {"never", waitOfHystrix},
		failsafeGo: {"client: until the deadline though the turn is later, and spends it; server: on, when the call is cancelled", waitOfFailsafe},
		middleware: {"up to the limiter, which gets the context", waitOfMiddleware},
	}},
	{"Goroutines started for a call", map[string]cell{
		ours:       {"0; with `engine: hystrix` hystrix-go's, 1 for each metric collector", goroutinesOfOurs},
		hystrixGo:  {"2, and 1 for each metric collector, at least 1", goroutinesOfHystrix},
		failsafeGo: {"0; 1 with a timeout; 1 that outlives it with `Executor.WithContext`", goroutinesOfFailsafe},
		goBreaker:  {"0", goroutinesOfGobreaker},
		middleware: {"0", goroutinesOfMiddleware},
	}},
	{"Asking for the state in a callback", map[string]cell{
		ours:       {"is fine, also in the log of `engine: hystrix`", callbackOfOurs},
		failsafeGo: {"is fine", callbackOfFailsafe},
		goBreaker:  {"deadlocks", callbackOfGobreaker},
	}},
	{"Drain", map[string]cell{
		ours: {"calls in flight end; one that hangs is named and cut, on time", drainOfOurs},
	}},
}

// TestTable runs what the README's table says, and checks that it says nothing
// else: row by row, cell by cell.
func TestTable(t *testing.T) {
	header, lines := readTable(t)
	columns := header[1:]
	for i, want := range []string{ours, hystrixGo, failsafeGo, goBreaker, middleware} {
		if i >= len(columns) || !strings.HasPrefix(columns[i], want) {
			t.Fatalf("the columns are %q, want one for %s at %d", columns, want, i)
		}
		columns[i] = want
	}
	if len(lines) != len(table) {
		t.Errorf("the table has %d rows, %d are checked", len(lines), len(table))
	}
	for i, r := range table {
		t.Run(r.title, func(t *testing.T) {
			if i >= len(lines) || lines[i][0] != r.title {
				t.Fatalf("row %d is not this one", i)
			}
			for j, column := range columns {
				c, ok := r.cells[column]
				if !ok {
					c.says = dash
				}
				if got := lines[i][j+1]; got != c.says {
					t.Errorf("%s: the table says %q, checked is %q", column, got, c.says)
				}
				if ok {
					t.Run(column, c.check)
				}
			}
		})
	}
}

// TestTableVersions: the versions in the table's head are those that are tested.
func TestTableVersions(t *testing.T) {
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	header, _ := readTable(t)
	for column, path := range map[string]string{
		failsafeGo: "github.com/failsafe-go/failsafe-go",
		goBreaker:  "github.com/sony/gobreaker/v2",
		middleware: "github.com/grpc-ecosystem/go-grpc-middleware/v2",
		hystrixGo:  "github.com/afex/hystrix-go",
	} {
		at := slices.IndexFunc(header, func(h string) bool { return strings.HasPrefix(h, column) })
		if at < 0 {
			t.Errorf("no column %s", column)
			continue
		}
		// A version, or the commit of one that has none.
		version, _, _ := strings.Cut(strings.TrimSpace(strings.TrimPrefix(header[at], column)), " ")
		required := regexp.MustCompile(`(?m)^\t` + regexp.QuoteMeta(path) + ` (v[^ ]*-)?` + regexp.QuoteMeta(version))
		if version == "" || !required.Match(mod) {
			t.Errorf("the table says %s %q, go.mod has another", column, version)
		}
	}
}

// readTable returns the cells of the README's table.
func readTable(t *testing.T) (header []string, lines [][]string) {
	t.Helper()
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(readme), "\n## Compared\n")
	if !ok {
		t.Fatal("README.md has no section Compared")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	for line := range strings.Lines(section) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "|") || strings.HasPrefix(line, "|-") {
			continue
		}
		cells := strings.Split(strings.Trim(line, "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		lines = append(lines, cells)
	}
	if len(lines) < 2 {
		t.Fatal("README.md has no table in the section Compared")
	}
	for _, l := range lines {
		if len(l) != len(lines[0]) {
			t.Fatalf("the row %q has %d cells, not %d", l[0], len(l), len(lines[0]))
		}
	}
	return lines[0], lines[1:]
}
