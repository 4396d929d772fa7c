package migration

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const pages = "../../docs/migration"

// TestGoBlocksCompile: each go block of the pages is in this package, line by
// line.
func TestGoBlocksCompile(t *testing.T) {
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	var code strings.Builder
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		code.Write(text)
	}
	source := squeeze(code.String())
	for _, page := range allPages(t) {
		for _, block := range blocks(t, page, "go") {
			if !strings.Contains(source, squeeze(block)) {
				t.Errorf("%s: this go block does not stand in examples/migration:\n%s", page, block)
			}
		}
	}
}

// TestYAMLBlocksLoad: each yaml block of the pages is a policy that loads. The
// pages' own tests run them.
func TestYAMLBlocksLoad(t *testing.T) {
	for _, page := range allPages(t) {
		for _, block := range blocks(t, page, "yaml") {
			t.Run(page, func(t *testing.T) { mustGuard(t, block, externalQuota(10)) })
		}
	}
}

func allPages(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(pages, "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 4 {
		t.Fatalf("%d pages, want 4", len(files))
	}
	for i := range files {
		files[i] = filepath.Base(files[i])
	}
	return files
}

var fence = regexp.MustCompile("(?ms)^```([a-z]*)\n(.*?)^```")

// blocks returns the fenced blocks of a language on a page; there is one at
// least.
func blocks(t *testing.T, page, language string) (found []string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(pages, page))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range fence.FindAllStringSubmatch(string(text), -1) {
		if m[1] == language {
			found = append(found, m[2])
		}
	}
	if len(found) == 0 {
		t.Fatalf("%s: no %s block", page, language)
	}
	return found
}

var space = regexp.MustCompile(`\s+`)

func squeeze(s string) string { return strings.TrimSpace(space.ReplaceAllString(s, " ")) }
