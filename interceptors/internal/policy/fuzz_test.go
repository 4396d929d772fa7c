package policy

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// FuzzParse: no panic; a mistake lies inside of the file and has the form that
// is promised; a policy that parses is valid and survives being written.
func FuzzParse(f *testing.F) {
	for _, pattern := range []string{"good/*.yaml", "bad/*.yaml"} {
		for _, text := range files(f, pattern) {
			f.Add(text)
		}
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := Parse("f", text)
		if err != nil {
			lines := bytes.Split(bytes.TrimPrefix(text, []byte("\ufeff")), []byte("\n"))
			for message := range strings.SplitSeq(err.Error(), "\n") {
				var line, col int
				if _, err := fmt.Sscanf(message, "f:%d:%d:", &line, &col); err != nil || !messageForm.MatchString(message) {
					t.Fatalf("not of the form file:line:col: path: found, allowed: %q", message)
				}
				if line < 1 || line > len(lines) || col < 1 || col > utf8.RuneCount(lines[line-1])+1 {
					t.Fatalf("outside of the file: %q", message)
				}
			}
			return
		}
		if err := Validate(p); err != nil {
			t.Fatalf("Validate: %v", err)
		}
		NewTable(p.GetClient().GetRules()).Effective("/a.B/C")
		json, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse("json", json)
		if err != nil {
			t.Fatalf("%v\n%s", err, json)
		}
		if !proto.Equal(again, p) {
			t.Fatalf("written and read again:\ngot  %v\nwant %v", again, p)
		}
	})
}

// manyRules is a policy of n rules in the usual style.
func manyRules(n int) []byte {
	var b bytes.Buffer
	b.WriteString("client:\n  rules:\n")
	for i := range n {
		fmt.Fprintf(&b, `    - methods: ["/shop.v1.Service%d/Method%d"]
      timeout: 2s
      breaker: {error_percent_threshold: 25, sleep_window: 2s}
      rate_limit: {requests_per_second: 1000, burst: 100}
      concurrency_limit: {max_in_flight: 100}
`, i/20, i)
	}
	return b.Bytes()
}

var table *Table

func BenchmarkParse10000Rules(b *testing.B) {
	text := manyRules(10_000)
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	for b.Loop() {
		p, err := Parse("rules.yaml", text)
		if err != nil {
			b.Fatal(err)
		}
		table = NewTable(p.Client.Rules)
	}
}

// The same without YAML: what a policy built in Go costs.
func BenchmarkNewTable10000Rules(b *testing.B) {
	p, err := Parse("rules.yaml", manyRules(10_000))
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := Validate(p); err != nil {
			b.Fatal(err)
		}
		table = NewTable(p.Client.Rules)
	}
}

var effective *Effective

func BenchmarkEffective(b *testing.B) {
	p, err := Parse("rules.yaml", manyRules(10_000))
	if err != nil {
		b.Fatal(err)
	}
	table := NewTable(append(p.Client.Rules, &resiliencev1.MethodPolicy{
		Methods: []string{"*"}, Breaker: &resiliencev1.Breaker{},
	}))
	b.ReportAllocs()
	for b.Loop() {
		effective = table.Effective("/shop.v1.Service77/Method1542")
	}
}
