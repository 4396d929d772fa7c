package policy

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
)

var (
	patterns = []string{
		"*", "/a.A/*", "/a.B/*", "/grpc.health.v1.Health/*",
		"/a.A/M", "/a.A/N", "/a.B/M", "/a.C/M", "/grpc.health.v1.Health/Check", "/grpc.reflection.v1.R/Info",
	}
	methods = append([]string{"/a.A/O", "/a.B/O", "/a.C/O", "/d.D/O", "/grpc.health.v1.Health/Watch", "", "/"}, patterns[4:]...)
)

// randomRules deals some patterns out to rules that set some fields.
func randomRules(r *rand.Rand) (rules []*resiliencev1.MethodPolicy) {
	coin := func() bool { return r.IntN(2) == 0 }
	duration := func(least, most time.Duration) *durationpb.Duration {
		if coin() {
			return nil
		}
		return durationpb.New(least + time.Duration(r.Int64N(int64(most-least))))
	}
	number := func(most uint32) *uint32 {
		if coin() {
			return nil
		}
		return proto.Uint32(1 + r.Uint32N(most))
	}
	left := slices.Clone(patterns)
	r.Shuffle(len(left), func(i, j int) { left[i], left[j] = left[j], left[i] })
	left = left[:r.IntN(len(left)+1)]
	for len(left) > 0 {
		n := 1 + r.IntN(min(3, len(left)))
		rule := &resiliencev1.MethodPolicy{
			Methods:       left[:n],
			Timeout:       duration(time.Millisecond, 24*time.Hour),
			StreamTimeout: duration(time.Millisecond, 720*time.Hour),
			MinimumBudget: duration(0, time.Hour),
		}
		left = left[n:]
		if coin() {
			rule.Name = fmt.Sprintf("rule %d: \"ü\" # {%d}", len(left), r.Int())
		}
		if coin() {
			rule.Timeout = durationpb.New(0)
		}
		switch r.IntN(3) {
		case 0:
			rule.Breaker = &resiliencev1.Breaker{Disabled: true}
		case 1:
			rule.Breaker = &resiliencev1.Breaker{
				Engine:                   resiliencev1.Breaker_Engine(r.IntN(2)),
				ErrorPercentThreshold:    number(100),
				RequestVolumeThreshold:   number(1_000_000),
				Window:                   duration(100*time.Millisecond, time.Hour),
				SleepWindow:              duration(time.Millisecond, time.Hour),
				MaxSleepWindow:           duration(time.Hour, 24*time.Hour),
				HalfOpenProbes:           number(1000),
				MinDeadline:              duration(0, time.Hour),
				SlowCallThreshold:        durationpb.New(time.Second),
				SlowCallPercentThreshold: number(100),
			}
			for _, i := range r.Perm(len(failureCodes))[:r.IntN(4)] {
				rule.Breaker.FailureCodes = append(rule.Breaker.FailureCodes, failureCodes[i])
			}
		}
		switch r.IntN(4) {
		case 0:
			rule.RateLimit = &resiliencev1.RateLimit{Disabled: true}
		case 1:
			rule.RateLimit = &resiliencev1.RateLimit{External: "true"}
		case 2:
			rule.RateLimit = &resiliencev1.RateLimit{
				Algorithm:         resiliencev1.RateLimit_Algorithm(r.IntN(2)),
				RequestsPerSecond: 5 + r.ExpFloat64()*1000,
				Burst:             number(10_000_000),
				MaxWait:           duration(0, time.Hour),
				Scope:             resiliencev1.Scope(r.IntN(3)),
			}
		}
		switch r.IntN(3) {
		case 0:
			rule.ConcurrencyLimit = &resiliencev1.ConcurrencyLimit{Disabled: true}
		case 1:
			rule.ConcurrencyLimit = &resiliencev1.ConcurrencyLimit{
				MaxInFlight:  proto.Uint32(1 + r.Uint32N(1_000_000)),
				MaxStreams:   number(1_000_000),
				MaxQueue:     1 + r.Uint32N(1_000_000),
				MaxQueueWait: duration(time.Millisecond, time.Hour),
			}
			if rule.ConcurrencyLimit.MaxStreams == nil {
				rule.ConcurrencyLimit.Scope = resiliencev1.Scope(r.IntN(3))
			}
		}
		if proto.Equal(rule, &resiliencev1.MethodPolicy{Name: rule.Name, Methods: rule.Methods}) {
			rule.MinimumBudget = durationpb.New(0)
		}
		rules = append(rules, rule)
	}
	return rules
}

// The naive reading of the schema: merge, field by field, the rules that match.
func TestEffectiveAgainstModel(t *testing.T) {
	for seed := range uint64(2000) {
		rules := randomRules(rand.New(rand.NewPCG(seed, 1)))
		table := NewTable(rules)
		for _, method := range methods {
			var merged resiliencev1.MethodPolicy
			names := make(map[string]string) // of the rule that gave the field
			mostSpecific := ""
			for _, pattern := range matching(method) {
				for _, rule := range rules {
					if !slices.Contains(rule.Methods, pattern) {
						continue
					}
					mostSpecific = cmp.Or(mostSpecific, pattern)
					for i := range rule.ProtoReflect().Descriptor().Fields().Len() {
						field := rule.ProtoReflect().Descriptor().Fields().Get(i)
						if !rule.ProtoReflect().Has(field) || merged.ProtoReflect().Has(field) {
							continue
						}
						merged.ProtoReflect().Set(field, rule.ProtoReflect().Get(field))
						names[string(field.Name())] = pattern
						if rule.Name != "" {
							names[string(field.Name())] = rule.Name
						}
					}
				}
			}
			// Alone, the merged rule means the same; only its names differ.
			merged.Name, merged.Methods = "", []string{method}
			want := NewTable([]*resiliencev1.MethodPolicy{&merged}).Effective(method)
			got := table.Effective(method)
			if want != nil && got != nil {
				want.Pattern, want.Rule = mostSpecific, names["methods"]
				if want.MinimumBudget > 0 {
					want.BudgetRule = names["minimum_budget"]
				}
				if want.Breaker != nil {
					want.Breaker.Rule = names["breaker"]
				}
				if want.RateLimit != nil && got.RateLimit != nil {
					want.RateLimit.Rule, want.RateLimit.Shared = names["rate_limit"], got.RateLimit.Shared
				}
				if want.Concurrency != nil && got.Concurrency != nil {
					want.Concurrency.Rule, want.Concurrency.Shared = names["concurrency_limit"], got.Concurrency.Shared
				}
			}
			if !reflect.DeepEqual(got, want) {
				t.Fatalf("seed %d, %s:\ngot  %v\nwant %v\nrules %v", seed, method, got, want, rules)
			}
		}
	}
}

// matching is the patterns that match a method, most specific first.
func matching(method string) []string {
	parts := strings.Split(method, "/")
	switch {
	case len(parts) != 3:
		return []string{"*"}
	case strings.HasPrefix(parts[1], "grpc."):
		return []string{method, "/" + parts[1] + "/*"}
	}
	return []string{method, "/" + parts[1] + "/*", "*"}
}

func TestCase39_YAMLEqualsGo(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 2))
		policy := &resiliencev1.Policy{
			Client: &resiliencev1.ClientPolicy{Rules: randomRules(r)},
			Server: &resiliencev1.ServerPolicy{Rules: randomRules(r), Drain: &resiliencev1.Drain{Cut: durationpb.New(time.Duration(r.Int64N(int64(time.Minute))))}},
		}
		if err := Validate(policy); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		json, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(policy)
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range [][]byte{json, handWritten(t, json)} {
			read, err := Parse("random.yaml", text)
			if err != nil {
				t.Fatalf("seed %d: %v\n%s", seed, err, text)
			}
			if !proto.Equal(read, policy) {
				t.Fatalf("seed %d:\ngot  %v\nwant %v\n%s", seed, read, policy, text)
			}
			for _, sides := range [][2][]*resiliencev1.MethodPolicy{
				{read.Client.GetRules(), policy.Client.GetRules()},
				{read.Server.GetRules(), policy.Server.GetRules()},
			} {
				fromYAML, fromGo := NewTable(sides[0]), NewTable(sides[1])
				for _, method := range methods {
					if got, want := fromYAML.Effective(method), fromGo.Effective(method); !reflect.DeepEqual(got, want) {
						t.Fatalf("seed %d, %s:\ngot  %v\nwant %v\n%s", seed, method, got, want, text)
					}
				}
			}
			if got, want := NewDrain(read.Server.Drain), NewDrain(policy.Server.Drain); got != want {
				t.Fatalf("seed %d: got %+v, want %+v", seed, got, want)
			}
		}
	}
}

// handWritten is a policy in JSON as a person would write it: in blocks, with
// Go's durations and the short names of enum values.
func handWritten(t *testing.T, json []byte) []byte {
	var doc yaml.Node
	if err := yaml.Unmarshal(json, &doc); err != nil {
		t.Fatal(err)
	}
	var walk func(n *yaml.Node)
	walk = func(n *yaml.Node) {
		n.Style = 0
		if n.Kind == yaml.MappingNode {
			for i := 1; i < len(n.Content); i += 2 {
				key, value := n.Content[i-1], n.Content[i]
				if d, err := time.ParseDuration(value.Value); err == nil {
					value.Value = d.String()
				} else if key.Value == "scope" || key.Value == "algorithm" || key.Value == "engine" {
					_, suffix, _ := strings.Cut(value.Value, "_")
					value.Value = strings.ToLower(suffix)
				}
			}
		}
		for _, child := range n.Content {
			walk(child)
		}
	}
	walk(&doc)
	text, err := yaml.Marshal(&doc)
	if err != nil {
		t.Fatal(err)
	}
	return text
}
