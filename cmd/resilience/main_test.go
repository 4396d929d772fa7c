package main

import (
	"os"
	"strings"
	"testing"
)

func TestHelp(t *testing.T) {
	for _, args := range []string{"", "help", "-h", "-help", "--help", "convert -h", "check -h"} {
		status, stdout, stderr := resilience("", strings.Fields(args)...)
		if status != 0 || stdout != usage || stderr != "" {
			t.Errorf("%q: status %d, stdout %q, stderr %q", args, status, stdout, stderr)
		}
	}
	// The example of the usage works.
	if status, _, stderr := resilience("", "convert", "-map", "place=/shop.v1.Orders/Place", "testdata/shop.json"); status != 0 {
		t.Error(stderr)
	}
}

func TestWrongUsage(t *testing.T) {
	for args, want := range map[string]string{
		"explain":                        `found "explain", allowed check, convert or help`,
		"-map a=/b.C/D f.json":           `found "-map", allowed check, convert or help`,
		"check":                          "check: found no file, allowed one or more",
		"check -v f.yaml":                "check: flag provided but not defined: -v",
		"convert":                        "convert: found 0 files, allowed one, after the flags",
		"convert a.json -map a=/b.C/D":   "convert: found 3 files, allowed one, after the flags",
		"convert -side both f.json":      `convert: invalid value "both" for flag -side: allowed client or server`,
		"convert -map place f.json":      `convert: invalid value "place" for flag -map: allowed NAME=/pkg.Service/Method`,
		"convert -map a=/b.C/* f.json":   `convert: invalid value "a=/b.C/*" for flag -map: found the method "/b.C/*", allowed /pkg.Service/Method`,
		"convert -map a=/b.C/D/E f.json": `convert: invalid value "a=/b.C/D/E" for flag -map: found the method "/b.C/D/E", allowed /pkg.Service/Method`,
		"convert -map a=//D f.json":      `convert: invalid value "a=//D" for flag -map: found the method "//D", allowed /pkg.Service/Method`,
		"convert -map a=* f.json":        `convert: invalid value "a=*" for flag -map: found the method "*", allowed /pkg.Service/Method`,
		"convert -map a=/b.C/D -map a=/b.C/E f.json": `convert: invalid value "a=/b.C/E" for flag -map: found "a" twice, ` +
			"allowed one method for a command: several would not share its circuit",
	} {
		status, stdout, stderr := resilience("", strings.Fields(args)...)
		if want := "resilience: " + want + "\nresilience help says more.\n"; status != 2 || stdout != "" || stderr != want {
			t.Errorf("%q: status %d, stdout %q, stderr:\n%swant:\n%s", args, status, stdout, stderr, want)
		}
	}
}

func TestCheck(t *testing.T) {
	t.Chdir(t.TempDir())
	for path, text := range map[string]string{
		"good.yaml": `
client:
  rules:
    - {methods: ["*"], timeout: 1s}
    - {methods: ["/a.B/C"], rate_limit: {external: quota}}
server: {rules: [{methods: ["*"], timeout: 1s}]}
`,
		"empty.yaml": "{}",
		"bad.yaml":   "client:\n  rules:\n    - {methods: [x], timeout: 1}\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	status, stdout, stderr := resilience("", "check", "bad.yaml", "good.yaml", "none.yaml", "empty.yaml")
	if status != 1 {
		t.Errorf("status %d, want 1", status)
	}
	if want := "good.yaml: ok (2 client rules, 1 server rules)\nempty.yaml: ok (0 client rules, 0 server rules)\n"; stdout != want {
		t.Errorf("stdout %q, want %q", stdout, want)
	}
	want := `bad.yaml:3:18: client.rules[0].methods[0]: found "x", allowed "*", "/pkg.Service/*" or "/pkg.Service/Method"
bad.yaml:3:31: client.rules[0].timeout: found 1, allowed a duration with a unit, such as 50ms, 1.5s or 2h, below 290 years
resilience: open none.yaml: no such file or directory
`
	if stderr != want {
		t.Errorf("stderr:\n%swant:\n%s", stderr, want)
	}
	if status, _, stderr := resilience("", "check", "good.yaml", "empty.yaml"); status != 0 || stderr != "" {
		t.Errorf("status %d: %s", status, stderr)
	}
}
