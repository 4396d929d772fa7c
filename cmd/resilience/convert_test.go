package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"unicode/utf8"

	"github.com/afex/hystrix-go/hystrix"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
)

var update = flag.Bool("update", false, "rewrite the .yaml files of testdata")

// resilience runs the command.
func resilience(stdin string, args ...string) (status int, stdout, stderr string) {
	var out, errs bytes.Buffer
	status = run(args, strings.NewReader(stdin), &out, &errs)
	return status, out.String(), errs.String()
}

// conversions are those of testdata: the golden file of each, and how it is made.
var conversions = map[string][]string{
	"shop.yaml":   {"-map", "place=/shop.v1.Orders/Place", "testdata/shop.json"},
	"server.yaml": {"-side", "server", "-map=place=shop.v1.Orders/Place", "testdata/shop.json"},
	"values.yaml": {"testdata/values.json"},
	"names.yaml":  append(mapAll("testdata/names.json"), "testdata/names.json"),
}

// mapAll returns a -map for each command of a file.
func mapAll(path string) (flags []string) {
	text, err := os.ReadFile(path)
	if err != nil {
		panic(err)
	}
	return mapFlags(text)
}

func mapFlags(text []byte) (flags []string) {
	var commands map[string]any
	if err := json.Unmarshal(text, &commands); err != nil {
		return nil
	}
	for i, name := range slices.Sorted(maps.Keys(commands)) {
		flags = append(flags, "-map", fmt.Sprintf("%s=/pkg.Service/M%d", name, i))
	}
	return flags
}

func TestConvert(t *testing.T) {
	for golden, args := range conversions {
		t.Run(golden, func(t *testing.T) {
			status, got, stderr := resilience("", append([]string{"convert"}, args...)...)
			if status != 0 || stderr != "" {
				t.Fatalf("status %d: %s", status, stderr)
			}
			path := filepath.Join("testdata", golden)
			if *update {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("got:\n%s\nwant:\n%s", got, want)
			}
			if status, stdout, stderr := resilience("", "check", path); status != 0 || stderr != "" {
				t.Errorf("check: status %d: %s%s", status, stdout, stderr)
			}
		})
	}
}

// TestConvertIsWhatHystrixMakesOfIt: each rule has the settings that
// hystrix.Configure gives the command.
func TestConvertIsWhatHystrixMakesOfIt(t *testing.T) {
	for golden, args := range conversions {
		t.Run(golden, func(t *testing.T) {
			text, err := os.ReadFile(args[len(args)-1])
			if err != nil {
				t.Fatal(err)
			}
			_, policy, _ := resilience("", append([]string{"convert"}, args...)...)
			compare(t, text, policy)
		})
	}
}

func compare(t *testing.T, text []byte, policy string) {
	t.Helper()
	var configs map[string]hystrix.CommandConfig
	if err := json.Unmarshal(text, &configs); err != nil {
		t.Fatalf("hystrix-go's users cannot read it: %v", err)
	}
	p, err := interceptors.Parse("policy", []byte(policy))
	if err != nil {
		t.Fatalf("%v\n%s", err, policy)
	}
	rules := slices.Concat(p.GetClient().GetRules(), p.GetServer().GetRules())
	if len(rules) != len(configs) {
		t.Fatalf("%d rules for %d commands:\n%s", len(rules), len(configs), policy)
	}
	names := slices.Sorted(maps.Keys(configs))
	for i, rule := range rules { // sorted too
		name := names[i]
		if rule.GetName() != name && (nameable(name) || rule.GetName() != "") {
			t.Errorf("rule %d is named %q, the command %q", i, rule.GetName(), name)
		}
		const circuit = "compared" // one name, because hystrix-go never forgets any
		hystrix.Configure(map[string]hystrix.CommandConfig{circuit: configs[name]})
		if got, want := settingsOf(rule), *hystrix.GetCircuitSettings()[circuit]; got != want {
			t.Errorf("%q:\ngot  %+v\nwant %+v", name, got, want)
		}
		if e := rule.GetBreaker().GetEngine(); e != resiliencev1.Breaker_ENGINE_HYSTRIX {
			t.Errorf("%q: engine %v", name, e)
		}
	}
}

func settingsOf(r *resiliencev1.MethodPolicy) hystrix.Settings {
	return hystrix.Settings{
		Timeout:                r.GetTimeout().AsDuration(),
		MaxConcurrentRequests:  int(r.GetConcurrencyLimit().GetMaxInFlight()),
		RequestVolumeThreshold: uint64(r.GetBreaker().GetRequestVolumeThreshold()),
		SleepWindow:            r.GetBreaker().GetSleepWindow().AsDuration(),
		ErrorPercentThreshold:  int(r.GetBreaker().GetErrorPercentThreshold()),
	}
}

// form is that of the policy loader's messages.
var form = regexp.MustCompile(`^f\.json:[1-9][0-9]*:[1-9][0-9]*: .+: found .+, allowed .+$`)

const (
	fields   = "timeout, max_concurrent_requests, request_volume_threshold, sleep_window, error_percent_threshold"
	noMethod = "found a name that is not a method, allowed /pkg.Service/Method, or any name with a -map: add -map "
)

func TestConvertMistakes(t *testing.T) {
	for name, test := range map[string]struct {
		args []string
		json string
		want []string
	}{
		"everything at once": {
			args: []string{"-map", "plaze=/shop.v1.Orders/Place", "-map", "b=/a.B/D", "-map", "a=/a.B/D"},
			json: `{
  "place": {"timeout": "1s", "max_concurrent_requests": -1},
  "a.B/C": {
    "error_percent_threshold": 101,
    "sleepWindow": 5000,
    "timeout": 1, "timeout": 2
  },
  "search": null
}`,
			want: []string{
				"1:1: a: found a -map for a command that is not in the file, nearest is place, allowed only for one that is",
				"1:1: b: found a -map for a command that is not in the file, nearest is a.B/C, allowed only for one that is",
				"1:1: plaze: found a -map for a command that is not in the file, nearest is place, allowed only for one that is",
				"2:3: place: " + noMethod + "place=/pkg.Service/Method",
				`2:24: place.timeout: found "1s", allowed a whole number of milliseconds from 1 to 86400000, or 0 for hystrix-go's default 1000`,
				"2:57: place.max_concurrent_requests: found -1, allowed a whole number from 1 to 1000000, or 0 for hystrix-go's default 10",
				"4:32: a.B/C.error_percent_threshold: found 101, allowed a whole number from 1 to 100, or 0 for hystrix-go's default 50",
				`5:5: a.B/C: found unknown field "sleepWindow", nearest is sleep_window, allowed ` + fields,
				"6:19: a.B/C: found timeout twice, first at 6:5, allowed once",
				"8:3: search: " + noMethod + "search=/pkg.Service/Method",
				"8:13: search: found null, allowed an object with " + fields,
			},
		},
		"values": {
			json: `{"a.B/C": {
"timeout": 86400001,
"sleep_window": 3600001,
"max_concurrent_requests": 1000001,
"request_volume_threshold": 1.0,
"error_percent_threshold": 1e1}, "a.B/D": {
"timeout": 99999999999999999999,
"sleep_window": null,
"max_concurrent_requests": [1],
"request_volume_threshold": {"timeout": 1},
"error_percent_threshold": true}}`,
			want: []string{
				"2:12: a.B/C.timeout: found 86400001, allowed a whole number of milliseconds from 1 to 86400000, or 0 for hystrix-go's default 1000",
				"3:17: a.B/C.sleep_window: found 3600001, allowed a whole number of milliseconds from 1 to 3600000, or 0 for hystrix-go's default 5000",
				"4:28: a.B/C.max_concurrent_requests: found 1000001, allowed a whole number from 1 to 1000000, or 0 for hystrix-go's default 10",
				"5:29: a.B/C.request_volume_threshold: found 1.0, allowed a whole number from 1 to 1000000, or 0 for hystrix-go's default 20",
				"6:28: a.B/C.error_percent_threshold: found 1e1, allowed a whole number from 1 to 100, or 0 for hystrix-go's default 50",
				"7:12: a.B/D.timeout: found 99999999999999999999, allowed a whole number of milliseconds from 1 to 86400000, or 0 for hystrix-go's default 1000",
				"8:17: a.B/D.sleep_window: found null, allowed a whole number of milliseconds from 1 to 3600000, or 0 for hystrix-go's default 5000",
				"9:28: a.B/D.max_concurrent_requests: found a list, allowed a whole number from 1 to 1000000, or 0 for hystrix-go's default 10",
				"10:29: a.B/D.request_volume_threshold: found an object, allowed a whole number from 1 to 1000000, or 0 for hystrix-go's default 20",
				"11:28: a.B/D.error_percent_threshold: found true, allowed a whole number from 1 to 100, or 0 for hystrix-go's default 50",
			},
		},
		"a command is not an object": {
			json: `{"a.B/C": 1000, "a.B/D": "x", "a.B/E": [{}]}`,
			want: []string{
				"1:11: a.B/C: found 1000, allowed an object with " + fields,
				`1:26: a.B/D: found "x", allowed an object with ` + fields,
				"1:40: a.B/E: found a list, allowed an object with " + fields,
			},
		},
		"equal keys": {
			json: `{"a.B/C": {}, "a.B\/C": {"timeout": -1}, "a.B/D": {"timeout": 1, "Timeout": -1}}`,
			want: []string{
				"1:15: a.B/C: found a.B/C twice, first at 1:2, allowed once",
				"1:37: a.B/C.timeout: found -1, allowed a whole number of milliseconds from 1 to 86400000, or 0 for hystrix-go's default 1000",
				"1:66: a.B/D: found timeout twice, first at 1:52, allowed once",
				"1:77: a.B/D.timeout: found -1, allowed a whole number of milliseconds from 1 to 86400000, or 0 for hystrix-go's default 1000",
			},
		},
		"one method, several commands": {
			args: []string{"-map", "x=/a.B/C"},
			json: `{"a.B/C": {}, "/a.B/C": {}, "x": {}}`,
			want: []string{
				`1:15: /a.B/C: found the method "/a.B/C" a second time, allowed for one command, first for a.B/C at 1:2`,
				`1:29: x: found the method "/a.B/C" a second time, allowed for one command, first for a.B/C at 1:2`,
			},
		},
		"names that are no methods": {
			json: `{"users/list": {}, "GET /users/list": {}, "/a.B/*": {}, "a.B": {}, "it's": {}, "two\nlines": {}, "": {}, "` + strings.Repeat("x", 101) + `": {}}`,
			want: []string{
				"1:2: users/list: " + noMethod + "users/list=/pkg.Service/Method",
				`1:20: "GET /users/list": ` + noMethod + "'GET /users/list=/pkg.Service/Method'",
				`1:43: "/a.B/*": ` + noMethod + "'/a.B/*=/pkg.Service/Method'",
				"1:57: a.B: " + noMethod + "a.B=/pkg.Service/Method",
				`1:68: "it's": ` + noMethod + `'it'\''s=/pkg.Service/Method'`,
				`1:80: "two\nlines": ` + noMethod + "NAME=/pkg.Service/Method",
				`1:98: "": ` + noMethod + "NAME=/pkg.Service/Method",
				`1:106: "` + strings.Repeat("x", 60) + `…": ` + noMethod + "NAME=/pkg.Service/Method",
			},
		},
		"columns are characters": {
			json: "\ufeff{\"größe\": {\"timeout\": -1},\r\n \"a.B/C\": {\"größe\": 1}}",
			want: []string{
				`1:2: "größe": ` + noMethod + "'größe=/pkg.Service/Method'",
				`1:23: "größe".timeout: found -1, allowed a whole number of milliseconds from 1 to 86400000, or 0 for hystrix-go's default 1000`,
				`2:12: a.B/C: found unknown field "größe", nearest is timeout, allowed ` + fields,
			},
		},
		"nothing":    {json: " \n", want: []string{"2:1: settings: found the end of the text, allowed a JSON object of command names"}},
		"null":       {json: "null", want: []string{"1:1: settings: found null, allowed an object of command names"}},
		"a list":     {json: " [1]", want: []string{"1:2: settings: found a list, allowed an object of command names"}},
		"a text":     {json: `"{}"`, want: []string{`1:1: settings: found "{}", allowed an object of command names`}},
		"no command": {args: []string{"-map", "a=/b.C/D"}, json: "{}", want: []string{"1:1: settings: found no command, allowed one or more"}},
		"cut off":    {json: "{\"a.B/C\": {\n", want: []string{"2:1: settings: found the end of the text, allowed a JSON object of command names"}},
		"not JSON": {
			json: "{\n  # a comment\n}",
			want: []string{"2:3: settings: found a syntax error (invalid character '#' looking for beginning of object key string), allowed JSON"},
		},
		"a trailing comma": {
			json: `{"a.B/C": {},}`,
			want: []string{"1:14: settings: found a syntax error (invalid character '}' looking for beginning of object key string), allowed JSON"},
		},
		"trailing data": {
			json: "{\"a.B/C\": {\"timeout\": -1}}\n{}",
			want: []string{
				"1:23: a.B/C.timeout: found -1, allowed a whole number of milliseconds from 1 to 86400000, or 0 for hystrix-go's default 1000",
				"2:1: settings: found more after the end, allowed one JSON object",
			},
		},
		"not UTF-8": {json: "{\n\"\xff\": {}}", want: []string{"2:2: settings: found a byte that is not UTF-8 (0xff), allowed UTF-8 text"}},
		"too deep":  {json: strings.Repeat("[", 10_001), want: []string{"1:10001: settings: found a syntax error (invalid character '[' exceeded max depth), allowed JSON"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			if err := os.WriteFile("f.json", []byte(test.json), 0o600); err != nil {
				t.Fatal(err)
			}
			status, stdout, stderr := resilience("", slices.Concat([]string{"convert"}, test.args, []string{"f.json"})...)
			if status != 1 || stdout != "" {
				t.Errorf("status %d, stdout %q; want 1 and nothing", status, stdout)
			}
			var want strings.Builder
			for _, line := range test.want {
				want.WriteString("f.json:" + line + "\n")
			}
			if stderr != want.String() {
				t.Errorf("got:\n%swant:\n%s", stderr, want.String())
			}
			for line := range strings.Lines(stderr) {
				if !form.MatchString(strings.TrimSuffix(line, "\n")) {
					t.Errorf("not of the form file:line:col: path: found, allowed: %s", line)
				}
			}
		})
	}
}

// TestPolicyTooLarge: what the policy's loader alone forbids is found before
// anything is printed.
func TestPolicyTooLarge(t *testing.T) {
	status, stdout, stderr := resilience(`{"a.B/`+strings.Repeat("C", 4<<20)+`": {}}`, "convert", "-")
	want := "resilience: stdin: the policy made from it does not load:\npolicy:1:1: policy: found "
	if status != 1 || stdout != "" || !strings.HasPrefix(stderr, want) {
		t.Errorf("status %d, stdout %.100q, stderr %.200q", status, stdout, stderr)
	}
}

func TestStandardInput(t *testing.T) {
	status, policy, stderr := resilience(`{"a.B/C": {}}`, "convert", "-")
	if status != 0 || !strings.HasPrefix(policy, "# Made from hystrix-go's settings in stdin.") {
		t.Fatalf("convert: status %d: %s%s", status, policy, stderr)
	}
	status, stdout, stderr := resilience(policy, "check", "-")
	if want := "stdin: ok (1 client rules, 0 server rules)\n"; status != 0 || stdout != want || stderr != "" {
		t.Errorf("check: status %d: %q %q, want %q", status, stdout, stderr, want)
	}
	if status, _, stderr := resilience(`{"a": {}}`, "convert", "-"); status != 1 || !strings.HasPrefix(stderr, "stdin:1:2: a: ") {
		t.Errorf("status %d: %s", status, stderr)
	}
}

// TestFileNameInHeader: a file's name cannot leave its comment.
func TestFileNameInHeader(t *testing.T) {
	t.Chdir(t.TempDir())
	const path = "a\nclient: {}\n#.json"
	if err := os.WriteFile(path, []byte(`{"a.B/C": {}}`), 0o600); err != nil {
		t.Skip("this file system has no such names:", err)
	}
	status, stdout, stderr := resilience("", "convert", path)
	if want := `# Made from hystrix-go's settings in "a\nclient: {}\n#.json". `; status != 0 || !strings.HasPrefix(stdout, want) {
		t.Errorf("status %d: %s%s", status, stdout, stderr)
	}
}

// TestOutputIsLost: a disk that is full must not leave half a policy and a 0.
func TestOutputIsLost(t *testing.T) {
	for _, args := range [][]string{{"convert", "testdata/values.json"}, {"check", "testdata/shop.yaml"}, {"help"}} {
		var stderr bytes.Buffer
		status := run(args, nil, failingWriter{}, &stderr)
		if want := "resilience: the disk is full\n"; status != 1 || stderr.String() != want {
			t.Errorf("%v: status %d: %s", args, status, stderr.String())
		}
	}
	var stdout, stderr bytes.Buffer
	status := run([]string{"convert", "-"}, iotest.ErrReader(errors.New("the line is cut")), &stdout, &stderr)
	if status != 1 || stdout.Len() > 0 || stderr.String() != "resilience: the line is cut\n" {
		t.Errorf("status %d: %s%s", status, stdout.String(), stderr.String())
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errors.New("the disk is full") }

// TestDocumented: what docs/policy.md shows is what the command prints.
func TestDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	settings, err := os.ReadFile("testdata/shop.json")
	if err != nil {
		t.Fatal(err)
	}
	policy, err := os.ReadFile("testdata/shop.yaml")
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(t.TempDir())
	for path, text := range map[string]string{
		"shop.json":   string(settings),
		"policy.yaml": string(policy),
		"wrong.yaml":  "client:\n  rules:\n    - methods: [\"/shop.v1.Orders/Place\"]\n      timeout: 2\n      braker: {}\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct{ args, intro string }{
		{"convert -map place=/shop.v1.Orders/Place shop.json", "```yaml\n"},
		{"convert shop.json", "```text\n$ resilience convert shop.json\n"},
		{"check policy.yaml wrong.yaml", "```text\n$ resilience check policy.yaml wrong.yaml\n"},
	} {
		_, stdout, stderr := resilience("", strings.Fields(test.args)...)
		if block := test.intro + stdout + stderr; !strings.Contains(string(doc), block) {
			t.Errorf("docs/policy.md does not show\n%s", block)
		}
	}
	if !strings.Contains(string(doc), string(settings)) {
		t.Errorf("docs/policy.md does not show\n%s", settings)
	}
}

// FuzzConvert: no panic; all or nothing; a mistake lies inside of the file and
// has the form that is promised; what is printed loads, and says what
// hystrix-go would have done.
func FuzzConvert(f *testing.F) {
	paths, err := filepath.Glob("testdata/*.json")
	if err != nil || len(paths) == 0 {
		f.Fatalf("no testdata: %v", err)
	}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text, true)
		f.Add(text, false)
	}
	f.Add([]byte(`{"a.B/C": {"timeout": 1, "timeout": null}, "a": [], "b": {"x": {}}} {`), false)
	f.Add([]byte("{\"\xff\": {}}"), true)
	f.Fuzz(func(t *testing.T, text []byte, mapped bool) {
		args := []string{"convert"}
		if mapped {
			args = append(args, mapFlags(text)...)
		}
		status, stdout, stderr := resilience(string(text), append(args, "-")...)
		switch {
		case status == 0 && stderr == "":
			compare(t, text, stdout)
		case status == 1 && stdout == "" && stderr != "":
			lines := bytes.Split(bytes.TrimPrefix(text, []byte("\ufeff")), []byte("\n"))
			for message := range strings.Lines(stderr) {
				message = strings.TrimSuffix(message, "\n")
				rest, ok := strings.CutPrefix(message, "stdin:")
				var line, col int
				if _, err := fmt.Sscanf(rest, "%d:%d:", &line, &col); !ok || err != nil || !form.MatchString("f.json:"+rest) {
					t.Fatalf("not of the form file:line:col: path: found, allowed: %q", message)
				}
				if line < 1 || line > len(lines) || col < 1 || col > utf8.RuneCount(lines[line-1])+1 {
					t.Fatalf("outside of the file: %q", message)
				}
			}
		default:
			t.Fatalf("status %d, stdout %q, stderr %q", status, stdout, stderr)
		}
	})
}

// FuzzConvertName: a command of any name becomes a rule that loads.
func FuzzConvertName(f *testing.F) {
	text, err := os.ReadFile("testdata/names.json")
	if err != nil {
		f.Fatal(err)
	}
	var commands map[string]any
	if err := json.Unmarshal(text, &commands); err != nil {
		f.Fatal(err)
	}
	for name := range commands {
		f.Add(name, 1)
	}
	f.Fuzz(func(t *testing.T, name string, timeout int) {
		name = strings.ToValidUTF8(name, "")
		text, err := json.Marshal(map[string]hystrix.CommandConfig{name: {Timeout: timeout}})
		if err != nil {
			t.Fatal(err)
		}
		status, stdout, stderr := resilience(string(text), "convert", "-map", name+"=/a.B/C", "-")
		if valid := 0 <= timeout && timeout <= 24*60*60*1000; valid != (status == 0) || valid != (stderr == "") {
			t.Fatalf("%q, timeout %d: status %d: %s", name, timeout, status, stderr)
		}
		if status == 0 {
			compare(t, text, stdout)
		}
	})
}
