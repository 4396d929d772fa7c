package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// report is what one `go test` did.
type report struct {
	ran      int    // tests started
	failed   string // what failed first: a test, else a package; empty: nothing
	timedOut bool
	output   string // what that or the compiler printed, shortened
}

// event is a line of `go test -json`, see `go doc test2json` and `go help buildjson`.
type event struct {
	Action      string
	Package     string
	Test        string
	Output      string
	FailedBuild string
}

// goTest runs the tests of packages in a module. A non-nil error means that
// they could not be built or started, so that nothing is known about the code.
func goTest(ctx context.Context, dir string, timeout time.Duration, args ...string) (report, error) {
	return runTests(ctx, dir, timeout, append([]string{"test", "-json", "-vet=off", noInlining, "-timeout=" + timeout.String()}, args...))
}

// runProgram runs the tests' program of a package as `go test -failfast` does.
func runProgram(ctx context.Context, p *goPackage, program string, timeout time.Duration, run string) (report, error) {
	return runTests(ctx, p.Dir, timeout, []string{"tool", "test2json", "-t", "-p", p.ImportPath, program, "-test.v=test2json", "-test.paniconexit0",
		"-test.failfast", "-test.timeout=" + timeout.String(), "-test.run=" + run})
}

// runTests runs a go command that prints events, and ends itself after a time.
func runTests(ctx context.Context, dir string, timeout time.Duration, args []string) (report, error) {
	// A process that a test has left behind and that holds its output is not waited for.
	bounded, cancel := context.WithTimeout(ctx, timeout+timeout/2)
	defer cancel()
	cmd := exec.CommandContext(bounded, "go", args...)
	cmd.Dir = dir
	// All that it starts is one group. The go command tidies up when it is interrupted; tests may ignore it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.WaitDelay = timeout / 6
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, runErr := cmd.Output()
	if cmd.Process != nil {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // who is left of the group; often nobody
	}

	var (
		r          report
		outputs    = map[string]string{} // by test; "": the packages and the compiler
		failedTest string
		broken     bool
	)
	decoder := json.NewDecoder(bytes.NewReader(stdout))
	for {
		var e event
		if err := decoder.Decode(&e); err != nil {
			if !errors.Is(err, io.EOF) {
				return report{}, fmt.Errorf("go %s: %w\n%s%s", strings.Join(args, " "), err, stdout, stderr.Bytes())
			}
			break
		}
		outputs[e.Test] += e.Output
		switch {
		case e.FailedBuild != "" || e.Action == "build-fail":
			broken = true
		case e.Action == "run":
			r.ran++
		case e.Action == "fail" && r.failed == "":
			r.failed = cmp.Or(e.Test, e.Package)
			failedTest = e.Test
		}
		r.timedOut = r.timedOut || strings.HasPrefix(e.Output, "panic: test timed out after ")
	}
	r.output = head(outputs[failedTest])
	switch {
	case ctx.Err() != nil:
		return report{}, context.Cause(ctx)
	case broken:
		return report{}, fmt.Errorf("does not build: %w\n%s%s", runErr, r.output, stderr.Bytes())
	case runErr != nil && r.failed == "":
		return report{}, fmt.Errorf("the tests do not start: %w\n%s%s", runErr, r.output, stderr.Bytes())
	}
	return r, nil
}

// head returns the first lines of a text: a test that timed out prints every
// goroutine.
func head(text string) string {
	const most = 60
	lines := strings.SplitAfterN(text, "\n", most+1)
	if len(lines) > most {
		lines[most] = "...\n"
	}
	return strings.Join(lines, "")
}

// writeOverlay makes the folder's overlay.json, with which the go command reads
// text instead of file, and returns its path.
func writeOverlay(folder, file string, text []byte) (string, error) {
	copied, overlay := filepath.Join(folder, "mutant.go"), filepath.Join(folder, "overlay.json")
	replace, err := json.Marshal(map[string]map[string]string{"Replace": {file: copied}})
	if err != nil {
		return "", err
	}
	return overlay, errors.Join(os.WriteFile(copied, text, 0o600), os.WriteFile(overlay, replace, 0o600))
}
