package policy

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
)

var update = flag.Bool("update", false, "rewrite testdata/bad/*.want")

// files returns the files of testdata that match, with their texts by base name.
func files(t testing.TB, pattern string) map[string][]byte {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join("testdata", pattern))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no files match %s: %v", pattern, err)
	}
	texts := make(map[string][]byte)
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		texts[filepath.Base(path)] = text
	}
	return texts
}

// messageForm is what programs that read the messages rely on.
var messageForm = regexp.MustCompile(`^[^:]+:[1-9][0-9]*:[1-9][0-9]*: (policy|(client|server)[a-z_.0-9\[\]]*): found .+, allowed .+$`)

func TestCase38_BadPolicies(t *testing.T) {
	for name, text := range files(t, "bad/*.yaml") {
		t.Run(name, func(t *testing.T) {
			p, err := Parse(name, text)
			if err == nil {
				t.Fatalf("parsed to %v", p)
			}
			if p != nil {
				t.Error("an error and a policy")
			}
			for line := range strings.Lines(err.Error() + "\n") {
				if !messageForm.MatchString(strings.TrimSuffix(line, "\n")) {
					t.Errorf("not of the form file:line:col: path: found, allowed: %s", line)
				}
			}
			got := err.Error() + "\n"
			path := filepath.Join("testdata", "bad", strings.TrimSuffix(name, ".yaml")+".want")
			if *update {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal([]byte(got), want) {
				t.Errorf("got:\n%swant:\n%s", got, want)
			}
		})
	}
}

func TestCase38_GoodPolicies(t *testing.T) {
	for name, text := range files(t, "good/*.yaml") {
		p, err := Parse(name, text)
		if err != nil {
			t.Error(err)
			continue
		}
		if err := Validate(p); err != nil {
			t.Errorf("%s: Validate: %v", name, err)
		}
	}
}

func TestParse(t *testing.T) {
	for name, want := range map[string]*resiliencev1.Policy{
		"design.yaml": {
			Client: &resiliencev1.ClientPolicy{Rules: []*resiliencev1.MethodPolicy{
				{
					Methods: []string{"*"},
					Timeout: durationpb.New(2 * time.Second),
					Breaker: &resiliencev1.Breaker{
						ErrorPercentThreshold:  proto.Uint32(50),
						RequestVolumeThreshold: proto.Uint32(20),
						SleepWindow:            durationpb.New(5 * time.Second),
					},
					ConcurrencyLimit: &resiliencev1.ConcurrencyLimit{MaxInFlight: proto.Uint32(100)},
				},
				{
					Methods: []string{"/shop.v1.Orders/*"},
					RateLimit: &resiliencev1.RateLimit{
						RequestsPerSecond: 1000, Burst: proto.Uint32(100), MaxWait: durationpb.New(50 * time.Millisecond),
					},
				},
				{
					Name:    "place-order",
					Methods: []string{"/shop.v1.Orders/Place"},
					Breaker: &resiliencev1.Breaker{
						Engine: resiliencev1.Breaker_ENGINE_WINDOW, ErrorPercentThreshold: proto.Uint32(25),
					},
				},
			}},
			Server: &resiliencev1.ServerPolicy{
				Drain: &resiliencev1.Drain{
					Announce: durationpb.New(5 * time.Second),
					Grace:    durationpb.New(15 * time.Second),
					Cut:      durationpb.New(5 * time.Second),
				},
				Rules: []*resiliencev1.MethodPolicy{
					{
						Methods: []string{"*"},
						ConcurrencyLimit: &resiliencev1.ConcurrencyLimit{
							MaxInFlight: proto.Uint32(512), MaxStreams: proto.Uint32(1000),
							MaxQueue: 128, MaxQueueWait: durationpb.New(50 * time.Millisecond),
						},
					},
					{
						Methods:   []string{"/shop.v1.Orders/Search"},
						RateLimit: &resiliencev1.RateLimit{RequestsPerSecond: 200, Burst: proto.Uint32(20)},
					},
				},
			},
		},
		"every-field.yaml": {
			Client: &resiliencev1.ClientPolicy{Rules: []*resiliencev1.MethodPolicy{
				{
					Name:    "everything",
					Methods: []string{"/a.B/*", "/a.B/C", "/a.B/D"},
					Breaker: &resiliencev1.Breaker{
						Engine:                   resiliencev1.Breaker_ENGINE_WINDOW,
						ErrorPercentThreshold:    proto.Uint32(25),
						RequestVolumeThreshold:   proto.Uint32(7),
						Window:                   durationpb.New(90 * time.Second),
						SleepWindow:              durationpb.New(2500 * time.Millisecond),
						MaxSleepWindow:           durationpb.New(time.Hour),
						HalfOpenProbes:           proto.Uint32(3),
						MinDeadline:              durationpb.New(0),
						SlowCallThreshold:        durationpb.New(750 * time.Millisecond),
						SlowCallPercentThreshold: proto.Uint32(80),
						FailureCodes:             []string{"UNAVAILABLE", "deadline_exceeded", "Unauthenticated"},
					},
					RateLimit: &resiliencev1.RateLimit{
						Algorithm:         resiliencev1.RateLimit_ALGORITHM_TOKEN_BUCKET,
						RequestsPerSecond: 250, Burst: proto.Uint32(5),
						MaxWait: durationpb.New(50 * time.Millisecond),
						Scope:   resiliencev1.Scope_SCOPE_RULE,
					},
					ConcurrencyLimit: &resiliencev1.ConcurrencyLimit{
						MaxInFlight: proto.Uint32(8), MaxQueue: 4,
						MaxQueueWait: durationpb.New(1500 * time.Microsecond),
						Scope:        resiliencev1.Scope_SCOPE_RULE,
					},
					Timeout:       durationpb.New(2 * time.Second),
					StreamTimeout: durationpb.New(time.Hour),
					MinimumBudget: durationpb.New(5 * time.Millisecond),
				},
				{
					Methods:          []string{"*"},
					Breaker:          &resiliencev1.Breaker{Disabled: true},
					RateLimit:        &resiliencev1.RateLimit{External: "redis"},
					ConcurrencyLimit: &resiliencev1.ConcurrencyLimit{MaxStreams: proto.Uint32(9)},
				},
			}},
			Server: &resiliencev1.ServerPolicy{Drain: &resiliencev1.Drain{
				Announce: durationpb.New(0), Grace: durationpb.New(time.Minute),
				Cut: durationpb.New(250 * time.Millisecond), RejectNew: true,
			}},
		},
		"nothing-set.yaml": {
			Client: &resiliencev1.ClientPolicy{},
			Server: &resiliencev1.ServerPolicy{Drain: &resiliencev1.Drain{}},
		},
	} {
		got, err := Parse(name, files(t, "good/"+name)[name])
		if err != nil {
			t.Error(err)
		} else if !proto.Equal(got, want) {
			t.Errorf("%s:\ngot  %v\nwant %v", name, got, want)
		}
	}
}

// The decoder follows the schema, so all that a new field can break is its kind.
func TestDecoderKnowsEveryKind(t *testing.T) {
	var walk func(m protoreflect.MessageDescriptor)
	walk = func(m protoreflect.MessageDescriptor) {
		for i := range m.Fields().Len() {
			field := m.Fields().Get(i)
			switch kind := field.Kind(); kind {
			case protoreflect.MessageKind:
				if field.Message().FullName() != "google.protobuf.Duration" {
					walk(field.Message())
				}
			case protoreflect.EnumKind:
				if first := string(field.Enum().Values().Get(0).Name()); !strings.HasSuffix(first, "_UNSPECIFIED") {
					t.Errorf("%s: %s is no UNSPECIFIED", field.FullName(), first)
				}
			case protoreflect.StringKind, protoreflect.BoolKind, protoreflect.Uint32Kind, protoreflect.DoubleKind:
			default:
				t.Errorf("%s: the decoder cannot read kind %v", field.FullName(), kind)
			}
			if field.IsMap() {
				t.Errorf("%s: the decoder cannot read maps", field.FullName())
			}
		}
	}
	walk((&resiliencev1.Policy{}).ProtoReflect().Descriptor())
}

func TestCase38_Sizes(t *testing.T) {
	rules := func(n int) []byte {
		b := []byte("client:\n  rules:\n")
		for i := range n {
			b = fmt.Appendf(b, "    - {methods: [/a.B/M%d], timeout: 1s}\n", i)
		}
		return b
	}
	comment := func(size int) []byte {
		return append([]byte("client: {} #"), bytes.Repeat([]byte("-"), size-12)...)
	}
	nested := func(open, end string, depth int) []byte {
		return []byte("client: " + strings.Repeat(open, depth) + strings.Repeat(end, depth))
	}
	tooDeep := "big.yaml:1:1: policy: found a syntax error (exceeded max depth of 10000), allowed well-formed YAML"
	for name, c := range map[string]struct {
		text []byte
		want string // "": no mistake
	}{
		"10,000 rules":  {rules(10_000), ""},
		"10,001 rules":  {rules(10_001), "big.yaml:10003:7: client.rules[10000]: found 10001 rules, allowed 10000"},
		"4 MiB":         {comment(4 << 20), ""},
		"4 MiB + 1":     {comment(4<<20 + 1), "big.yaml:1:1: policy: found 4194305 bytes, allowed 4194304"},
		"10 MB":         {bytes.Repeat([]byte("a: b\n"), 2_000_000), "big.yaml:1:1: policy: found 10000000 bytes, allowed 4194304"},
		"lists":         {nested("[", "]", 5000), "big.yaml:1:9: client: found a list, allowed a mapping with rules, load_balancing, retry_throttling"},
		"deep lists":    {nested("[", "]", 1<<20), tooDeep},
		"deep mappings": {nested("{a: ", "}", 1<<18), tooDeep},
	} {
		p, err := Parse("big.yaml", c.text)
		switch {
		case c.want == "" && (err != nil || p == nil):
			t.Errorf("%s: %v", name, err)
		case c.want != "" && (err == nil || err.Error() != c.want):
			t.Errorf("%s:\ngot  %v\nwant %s", name, err, c.want)
		}
	}
}

func TestNearest(t *testing.T) {
	fields := fieldNames((&resiliencev1.MethodPolicy{}).ProtoReflect().Descriptor().Fields())
	fields = append(fields, fieldNames((&resiliencev1.Breaker{}).ProtoReflect().Descriptor().Fields())...)
	fields = append(fields, fieldNames((&resiliencev1.RateLimit{}).ProtoReflect().Descriptor().Fields())...)
	for found, want := range map[string]string{
		"timout":            "timeout",
		"timeout_ms":        "timeout",
		"braker":            "breaker",
		"errorPercent":      "error_percent_threshold",
		"error-percent":     "error_percent_threshold",
		"rate":              "rate_limit",
		"ratelimit":         "rate_limit",
		"RequestsPerSecond": "requests_per_second",
		"busrt":             "burst",
		"sleep":             "sleep_window",
		"slow_call":         "slow_call_threshold",
		"method":            "methods",
		"max_wiat":          "max_wait",
		"failurecodes":      "failure_codes",
	} {
		if got := nearest(found, fields); got != want {
			t.Errorf("%s: got %s, want %s", found, got, want)
		}
	}
}
