package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// What a package exports of a generic function is all of it: its importers must be
// compiled anew.
func TestKilledWhereImportersChange(t *testing.T) {
	root := writeModules(t, func(files map[string]string) {
		files["sum.go"] += `
func Triple[T int | float64](n T) T {
	return 3 * n
}
`
		files["triple_test.go"] = `package sum_test

import (
	"testing"

	"example.test/sum"
)

func TestTriple(t *testing.T) {
	if sum.Triple(2) != 6 {
		t.Error("not 6")
	}
}
`
	})
	out, err := applyList(t, root, `
name: twice
file: sum.go
find: return 3 * n
with: return 2 * n
test: . -run ^TestTriple$
`+addsNothing)
	if err != nil || !regexp.MustCompile(`(?m)^twice +killed +[0-9.]+ +TestTriple$`).MatchString(out) {
		t.Errorf("%v:\n%s", err, out)
	}
	if slow := regexp.MustCompile(`(?m)^\S+: .*$`).FindAllString(out, -1); len(slow) != 1 || !strings.HasPrefix(slow[0], "twice: what the package exports has changed") {
		t.Errorf("not only twice was built by go test:\n%s", out)
	}
}

// A test that is not run as `go test` runs it may fail whatever the code does.
func TestRunsAsGoTestDoes(t *testing.T) {
	root := writeModules(t, func(files map[string]string) {
		files["godebug_test.go"] = "//go:debug panicnil=1\n\npackage sum\n"
		files["sum_test.go"] = `package sum

import (
	"os"
	"testing"
)

func TestSum(t *testing.T) {
	if !testing.Testing() {
		t.Error("not a test")
	}
	if _, err := os.Stat("go.mod"); err != nil {
		t.Error(err)
	}
	defer func() {
		if recover() != nil {
			t.Error("not Go before 1.21")
		}
	}()
	panic(nil)
}
`
	})
	out, err := applyList(t, root, `
name: equivalent
file: sum.go
find#1: sum += n
with: sum += n + 0
test: . -run ^TestSum$
`)
	if err == nil || !strings.Contains(out, "0 killed, 1 survived") || strings.Contains(out, "built by go test") {
		t.Errorf("%v:\n%s", err, out)
	}
}

// A process that a test leaves behind, with its output, is ended, and not waited for.
func TestProcessesThatTestsLeave(t *testing.T) {
	root := writeModules(t, func(files map[string]string) {
		files["sum_test.go"] = `package sum

import (
	"fmt"
	"os"
	"os/exec"
	"testing"
)

func TestSum(t *testing.T) {
	if Sum(1, 2) == 3 {
		return
	}
	left := exec.Command("sleep", "60")
	left.Stdout, left.Stderr = os.Stdout, os.Stderr
	_ = left.Start()
	_ = os.WriteFile("pid", fmt.Append(nil, left.Process.Pid), 0o600)
	t.Error("not 3")
}
`
	})
	started := time.Now()
	out, err := applyList(t, root, addsNothing)
	if err != nil || !strings.Contains(out, "1 killed") || time.Since(started) > 40*time.Second {
		t.Errorf("%v after %v:\n%s", err, time.Since(started), out)
	}
	text, err := os.ReadFile(filepath.Join(root, "pid"))
	if err != nil {
		t.Fatal(err)
	}
	if stat, err := os.ReadFile("/proc/" + string(text) + "/stat"); err == nil && !strings.Contains(string(stat), ") Z ") {
		t.Errorf("still there: %s", stat)
	}
}

// The programs of hundreds of mutants would fill a disk.
func TestProgramsDoNotPileUp(t *testing.T) {
	root := writeModules(t, nil)
	mutants, err := parse(strings.NewReader(addsNothing))
	if err != nil {
		t.Fatal(err)
	}
	m := &mutants[0]
	text, err := m.apply(root)
	if err != nil {
		t.Fatal(err)
	}
	builders, err := newBuilders(t.Context(), root, mutants)
	if err != nil {
		t.Fatal(err)
	}
	folder := filepath.Join(t.TempDir(), "mutant")
	r := tryMutant(t.Context(), folder, root, 3*time.Second, m, text, builders[m.tests()])
	if _, err := os.Stat(folder); r.verdict != "killed" || r.slow != nil || !os.IsNotExist(err) {
		t.Errorf("%+v; its folder: %v", r, err)
	}
}
