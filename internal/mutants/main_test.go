package main

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// The code that the tests of this file mutate: two modules, one that tests the
// other from outside.
var files = map[string]string{
	"go.mod": "module example.test/sum\n\ngo 1.26.0\n",
	"sum.go": `package sum

func Sum(numbers ...int) int {
	sum := 0
	for _, n := range numbers {
		sum += n
	}
	return sum
}

func Double(n int) int {
	sum := 0
	sum += n
	sum += n
	return sum
}
`,
	"sum_test.go": `package sum

import "testing"

func TestSum(t *testing.T) {
	if Sum(1, 2) != 3 {
		t.Error("not 3")
	}
}
`,
	"outside/go.mod": `module example.test/outside

go 1.26.0

require example.test/sum v0.0.0

replace example.test/sum => ../
`,
	"outside/outside_test.go": `package outside

import (
	"testing"

	"example.test/sum"
)

func TestDouble(t *testing.T) {
	if sum.Double(2) != 4 {
		t.Error("not 4")
	}
}
`,
}

// addsNothing is a mutant that TestSum notices.
const addsNothing = `
name: adds-nothing
file: sum.go
find#1: sum += n
with: sum += 0 * n
test: . -run ^TestSum$
`

// writeModules writes the files, changed by edit, and returns their folder.
func writeModules(t *testing.T, edit func(files map[string]string)) string {
	t.Helper()
	t.Setenv("GOFLAGS", "-mod=mod") // nothing that the caller has set for the repository
	t.Setenv("GOWORK", "off")
	root := t.TempDir()
	edited := map[string]string{}
	for name, text := range files {
		edited[name] = text
	}
	if edit != nil {
		edit(edited)
	}
	for name, text := range edited {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// applyList parses and applies a list and returns what was printed.
func applyList(t *testing.T, root, list string) (string, error) {
	t.Helper()
	mutants, err := parse(strings.NewReader(list))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	err = apply(t.Context(), &out, root, 3*time.Second, mutants)
	return out.String(), err
}

func TestKilled(t *testing.T) {
	root := writeModules(t, nil)
	out, err := applyList(t, root, `
name: adds-nothing
file: sum.go
# The first of two lines alike is in Sum.
find#1: sum += n
with: sum += 0 * n
test: . -run ^TestSum$

name: line-removed
file: sum.go
find#3: sum += n
with:
test: ./... -run TestDouble
dir: outside

name: never-ends
file: sum.go
find: for _, n := range numbers {
with: for n := 0; ; {
test: .
`)
	if err != nil {
		t.Error(err)
	}
	for _, want := range []string{
		`(?m)^adds-nothing +killed +[0-9.]+ +TestSum$`,
		`(?m)^line-removed +killed +[0-9.]+ +TestDouble$`,
		`(?m)^never-ends +timed out +[0-9.]+ +TestSum$`,
		`(?m)^\[3/3\] `,
		`(?m)^3 killed, 0 survived$`,
	} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("no %s in:\n%s", want, out)
		}
	}
	if slow := regexp.MustCompile(`(?m)^\S+: .*$`).FindAllString(out, -1); len(slow) != 1 || slow[0] != "line-removed: several packages" {
		t.Errorf("not only line-removed was built by go test:\n%s", out)
	}
	for name, text := range files {
		if got, err := os.ReadFile(filepath.Join(root, name)); err != nil || string(got) != text {
			t.Errorf("%s was changed: %v\n%s", name, err, got)
		}
	}
}

// A test that notices every other time is enough.
func TestKilledAtTheSecondTry(t *testing.T) {
	root := writeModules(t, func(files map[string]string) {
		files["sum_test.go"] = `package sum

import (
	"os"
	"testing"
)

func TestSum(t *testing.T) {
	right := Sum(1, 2) == 3
	if _, err := os.Stat("marker"); err == nil && !right {
		t.Error("not 3")
	}
	if !right {
		_ = os.WriteFile("marker", nil, 0o600)
	}
}
`
	})
	out, err := applyList(t, root, addsNothing)
	if err != nil || !regexp.MustCompile(`(?m)^adds-nothing +killed +[0-9.]+ +TestSum$`).MatchString(out) {
		t.Errorf("%v:\n%s", err, out)
	}
}

func TestSurvived(t *testing.T) {
	out, err := applyList(t, writeModules(t, nil), `
name: unnoticed
file: sum.go
find#2: sum += n
with: sum -= n
test: .

name: noticed
file: sum.go
find#1: sum += n
with: sum -= n
test: .
`)
	if err == nil || !strings.Contains(err.Error(), "1 survived") {
		t.Errorf("error %v", err)
	}
	if !strings.Contains(out, "SURVIVED") || !strings.Contains(out, "1 killed, 1 survived") {
		t.Error(out)
	}
}

// A mutant that shows nothing about the tests is a mistake of the list.
func TestListDoesNotFit(t *testing.T) {
	for name, tt := range map[string]struct{ list, want string }{
		"does not compile": {`
name: m
file: sum.go
find#1: sum += n
with: sum += undefined
test: .`, "line 2: m: does not build"},
		"no such package": {`
name: m
file: sum.go
find#1: sum += n
with: sum -= n
test: ./nowhere`, "./nowhere: does not build"},
		"no such module": {`
name: m
file: sum.go
find#1: sum += n
with: sum -= n
test: .
dir: nowhere`, "nowhere .: does not build"},
		"no such test": {`
name: m
file: sum.go
find#1: sum += n
with: sum -= n
test: . -run TestNothing`, "-run TestNothing matches no test"},
		"no such file": {`
name: m
file: nowhere.go
find: sum += n
with: sum -= n
test: .`, "line 2: m: open "},
		"no such line": {`
name: m
file: sum.go
find: sum += m
with: sum -= n
test: .`, `line 2: m: sum.go has no line "sum += m"`},
		"part of a line": {`
name: m
file: sum.go
find: return
with: return 1
test: .`, `sum.go has no line "return"`},
		"several such lines": {`
name: m
file: sum.go
find: sum += n
with: sum -= n
test: .`, `has 3 lines "sum += n", say which with find#1`},
		"fewer such lines": {`
name: m
file: sum.go
find#4: sum += n
with: sum -= n
test: .`, `has 3 lines "sum += n", not 4`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := applyList(t, writeModules(t, nil), tt.list)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %s", err, tt.want)
			}
		})
	}
}

// Tests that fail anyway notice nothing.
func TestFailsWithoutMutant(t *testing.T) {
	root := writeModules(t, func(files map[string]string) {
		files["sum_test.go"] = strings.Replace(files["sum_test.go"], "!= 3", "!= 4", 1)
		files["other_test.go"] = "package sum\n\nimport \"testing\"\n\nfunc TestOther(t *testing.T) {}\n"
	})
	out, err := applyList(t, root, `
name: m
file: sum.go
find#1: sum += n
with: sum -= n
test: .
`)
	if err == nil || !strings.Contains(err.Error(), "TestSum fails without a mutant") || !strings.Contains(err.Error(), "not 3") {
		t.Errorf("error %v", err)
	}
	if err != nil && strings.Contains(err.Error(), "TestOther") {
		t.Errorf("more than the failed test in %v", err)
	}
	if strings.Contains(out, "killed") {
		t.Error(out)
	}
}

func TestParseMistakes(t *testing.T) {
	_, err := parse(strings.NewReader(`
name: one
file: a.go
find: x
with: x
test: . -run A B
test: .
words
fnd: y
with#2: y
find#0: y

name: one
file:
`))
	if err == nil {
		t.Fatal("no error")
	}
	want := strings.TrimSpace(`
line 6: one word is expected after -run
line 7: test twice
line 8: "words" is not "key: value"
line 9: unknown key "fnd"
line 10: unknown key "with#2"
line 11: unknown key "find#0"
line 2: "one" changes nothing
line 14: file is empty
line 13: "one" has no find
line 13: "one" has no with
line 13: "one" has no test
line 13: a second mutant named "one"`)
	if err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
}

// The list of this repository is well-formed, and its lines are in the code.
func TestOwnList(t *testing.T) {
	list, err := os.Open("mutants.txt")
	if err != nil {
		t.Fatal(err)
	}
	mutants, err := parse(list)
	if err != nil {
		t.Error(err)
	}
	for _, m := range mutants {
		if _, err := m.apply(filepath.Join("..", "..")); err != nil {
			t.Error(err)
		}
	}
	if err := list.Close(); err != nil {
		t.Error(err)
	}
}
