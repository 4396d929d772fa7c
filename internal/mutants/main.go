// Command mutants proves that the tests notice mistakes. It applies the one-line
// mistakes of mutants.txt, which explains their format, one at a time and
// expects a test to fail. Run it from the root of the repository:
//
//	go run ./internal/mutants [-only REGEXP]
//
// It changes no file: it compiles a copy of the mutant's and links the rest as it is, or
// has the go command read it from an overlay.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"
)

// parallel is how many mutants are tried at once.
const parallel = 2

// tries is how often a mutant may survive: some mistakes show only when goroutines
// meet, which they do not in every run.
const tries = 3

func main() {
	only := flag.String("only", "", "apply only the mutants whose name matches this `regexp`")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, *only)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, only string) error {
	root, err := os.Getwd()
	if err != nil {
		return err
	}
	wanted, err := regexp.Compile(only)
	if err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	list, err := os.Open(filepath.Join(root, "internal", "mutants", "mutants.txt"))
	if err != nil {
		return fmt.Errorf("not in the root of the repository? %w", err)
	}
	mutants, err := parse(list)
	if err := errors.Join(err, list.Close()); err != nil {
		return fmt.Errorf("%s:\n%w", list.Name(), err)
	}
	mutants = slices.DeleteFunc(mutants, func(m mutant) bool { return !wanted.MatchString(m.name) })
	if len(mutants) == 0 {
		return errors.New("no mutant to apply")
	}
	return apply(ctx, os.Stdout, root, time.Minute, mutants)
}

// result is what became of one mutant.
type result struct {
	verdict string // killed, timed out (killed too), SURVIVED or ERROR
	by      string // the test that killed it
	took    time.Duration
	slow    error // why the go command built it
	err     error
}

// apply checks that the tests pass, applies each mutant and prints what became
// of it. Its error says why not all of them were killed.
func apply(ctx context.Context, out io.Writer, root string, timeout time.Duration, mutants []mutant) error {
	texts := make([][]byte, len(mutants))
	var errs []error
	for i, m := range mutants {
		text, err := m.apply(root)
		texts[i], errs = text, append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("the list does not fit the code:\n%w", err)
	}
	temp, err := os.MkdirTemp("", "mutants")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)
	builders, err := newBuilders(ctx, root, mutants)
	if err != nil {
		return err
	}
	if err := checkUnmutated(ctx, out, temp, root, timeout, mutants, builders); err != nil {
		return err
	}

	results := make([]result, len(mutants))
	var (
		mu   sync.Mutex // guards done and out
		done int
	)
	inParallel(len(mutants), func(i int) {
		started := time.Now()
		m := &mutants[i]
		r := tryMutant(ctx, filepath.Join(temp, fmt.Sprint(i)), root, timeout, m, texts[i], builders[m.tests()])
		r.took = time.Since(started)
		mu.Lock()
		defer mu.Unlock()
		done++
		results[i] = r
		fmt.Fprintf(out, "[%d/%d] %s: %s %s (%.1fs)\n", done, len(mutants), mutants[i].name, r.verdict, r.by, r.took.Seconds())
	})
	return summarise(out, mutants, results)
}

// group is packages whose tests are built and checked together.
type group struct {
	dir, pkgs string
}

func (m *mutant) tests() group { return group{m.dir, strings.Join(m.pkgs, " ")} }

// checkUnmutated runs the tests of all mutants on the code as it is, those of
// the same packages in one go, and as those of mutants are run.
func checkUnmutated(ctx context.Context, out io.Writer, temp, root string, timeout time.Duration, mutants []mutant, builders map[group]*builder) error {
	runs := map[group][]string{}
	for _, m := range mutants {
		g := m.tests()
		if !slices.Contains(runs[g], m.run) {
			runs[g] = append(runs[g], m.run)
		}
	}
	var groups []group
	for g := range runs {
		groups = append(groups, g)
	}
	errs := make([]error, len(groups))
	inParallel(len(groups), func(i int) {
		g := groups[i]
		run := strings.Join(runs[g], "|")
		if slices.Contains(runs[g], "") {
			run = ""
		}
		// Many tests run here in one go, one mutant's timeout is too short.
		r, err := testUnmutated(ctx, filepath.Join(temp, fmt.Sprint("unmutated", i)), filepath.Join(root, g.dir), 5*timeout, g, run, builders[g])
		switch {
		case err != nil:
			errs[i] = fmt.Errorf("%s %s: %w", g.dir, g.pkgs, err)
		case r.failed != "":
			errs[i] = fmt.Errorf("%s %s: %s fails without a mutant:\n%s", g.dir, g.pkgs, r.failed, r.output)
		}
	})
	if err := errors.Join(errs...); err != nil {
		return err
	}
	fmt.Fprintf(out, "%d mutants; their tests pass without them\n", len(mutants))
	return nil
}

func testUnmutated(ctx context.Context, folder, dir string, timeout time.Duration, g group, run string, b *builder) (report, error) {
	if b == nil {
		return goTest(ctx, dir, timeout, append(strings.Fields(g.pkgs), "-failfast", "-run", run)...)
	}
	defer os.RemoveAll(folder)
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return report{}, err
	}
	program, err := b.unchanged(ctx, folder)
	if err != nil {
		return report{}, err
	}
	return runProgram(ctx, b.main, program, timeout, run)
}

// tryMutant runs the tests of a mutant until one fails, but not for ever. What it made in
// folder is gone then: hundreds of programs would fill a disk.
func tryMutant(ctx context.Context, folder, root string, timeout time.Duration, m *mutant, text []byte, b *builder) result {
	defer os.RemoveAll(folder)
	test, slow, err := m.build(ctx, folder, root, timeout, text, b)
	if err != nil {
		return result{verdict: "ERROR", err: err}
	}
	for range tries {
		r, err := test()
		switch {
		case err != nil:
			return result{verdict: "ERROR", err: err}
		case r.timedOut:
			return result{verdict: "timed out", by: r.failed, slow: slow}
		case r.failed != "":
			return result{verdict: "killed", by: r.failed, slow: slow}
		case r.ran == 0:
			return result{verdict: "ERROR", err: fmt.Errorf("-run %s matches no test", m.run)}
		}
	}
	return result{verdict: "SURVIVED", slow: slow}
}

// build returns what runs the tests of a mutant. slow is why it is `go test`, which
// compiles all that imports the mutant's package.
func (m *mutant) build(ctx context.Context, folder, root string, timeout time.Duration, text []byte, b *builder) (test func() (report, error), slow, err error) {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, nil, err
	}
	slow = errors.New("several packages")
	if b != nil {
		program, err := b.build(ctx, folder, filepath.Join(root, m.file), text)
		if err == nil {
			return func() (report, error) { return runProgram(ctx, b.main, program, timeout, m.run) }, nil, nil
		}
		slow = err
	}
	overlay, err := writeOverlay(folder, filepath.Join(root, m.file), text)
	if err != nil {
		return nil, nil, err
	}
	args := append([]string{"-overlay=" + overlay, "-count=1", "-failfast"}, m.pkgs...)
	if m.run != "" {
		args = append(args, "-run", m.run)
	}
	return func() (report, error) { return goTest(ctx, filepath.Join(root, m.dir), timeout, args...) }, slow, nil
}

// summarise prints the table and returns an error unless all were killed.
func summarise(out io.Writer, mutants []mutant, results []result) error {
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "\nmutant\tverdict\tseconds\tby")
	var (
		killed, survived int
		slow             []string
		errs             []error
	)
	for i, r := range results {
		fmt.Fprintf(table, "%s\t%s\t%.1f\t%s\n", mutants[i].name, r.verdict, r.took.Seconds(), r.by)
		if r.slow != nil {
			slow = append(slow, fmt.Sprintf("%s: %v", mutants[i].name, r.slow))
		}
		switch {
		case r.err != nil:
			errs = append(errs, fmt.Errorf("line %d: %s: %w", mutants[i].line, mutants[i].name, r.err))
		case r.verdict == "SURVIVED":
			survived++
		default:
			killed++
		}
	}
	if err := table.Flush(); err != nil {
		return err
	}
	if len(slow) > 0 {
		fmt.Fprintf(out, "\nbuilt by go test, which takes longer:\n%s\n\n", strings.Join(slow, "\n"))
	}
	fmt.Fprintf(out, "%d killed, %d survived\n", killed, survived)
	if survived > 0 {
		errs = append(errs, fmt.Errorf("%d survived: no test notices", survived))
	}
	return errors.Join(errs...)
}

// inParallel calls f with 0 to n-1, a few at a time, and returns when all have.
func inParallel(n int, f func(int)) {
	var group sync.WaitGroup
	slots := make(chan struct{}, parallel)
	for i := range n {
		slots <- struct{}{}
		group.Go(func() {
			defer func() { <-slots }()
			f(i)
		})
	}
	group.Wait()
}
