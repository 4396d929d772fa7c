package main

import (
	"encoding/xml"
	"io"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
)

// Everything runs, shortened, and the scenarios are what they say: who does not look is
// hurt by them.
func TestQuick(t *testing.T) {
	m := measure(quick, regexp.MustCompile(""))
	for _, r := range m.runs {
		for _, a := range arms {
			o, samples := r.outcomes[a.name], r.samples[a.name]
			if len(samples) == 0 || o.p50 < float64(leastDelay.Milliseconds()) {
				t.Errorf("%s, %s: %d calls, a median of %v ms", r.name, a.name, len(samples), o.p50)
			}
			if r.name != even {
				continue
			}
			if o.failed > 0 {
				t.Errorf("%s, %s: %v %% failed", r.name, a.name, o.failed)
			}
			for i := range replicas {
				if share(samples, i) == 0 {
					t.Errorf("%s, %s: replica %d was not called", r.name, a.name, i)
				}
			}
		}
		blind := r.outcomes["round_robin"]
		switch r.name {
		case slow:
			if blind.p99 < 60 {
				t.Errorf("%s: round_robin has a p99 of %v ms", r.name, blind.p99)
			}
		case unavailable, exhausted, silent, flapping:
			if our := r.outcomes[ours]; blind.failed < 2 || our.failed >= blind.failed {
				t.Errorf("%s: %v %% fail with round_robin, %v %% with ours", r.name, blind.failed, our.failed)
			}
		}
	}
	text := m.markdown()
	for _, want := range []string{"## Claims", "## Scenarios", "## The cost of a pick", "## How it works", "google.golang.org/grpc v1."} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in the report", want)
		}
	}
	for _, c := range m.charts() {
		if !strings.Contains(text, chartFolder+"/"+c.file) {
			t.Errorf("%s is not in the report", c.file)
		}
		for d := xml.NewDecoder(strings.NewReader(c.svg())); ; {
			if _, err := d.Token(); err == io.EOF {
				break
			} else if err != nil {
				t.Fatalf("%s: %v", c.file, err)
			}
		}
	}
}

// What a channel of ours has, breakers included, picks without an allocation.
func TestPicksDoNotAllocate(t *testing.T) {
	ctx, cancel := callContext()
	defer cancel()
	for _, n := range []int{1, 2, 10, 1000} {
		p, end := arms[0].picker(n)
		defer end()
		if got := testing.AllocsPerRun(1000, picks(ctx, p)); got > 0 {
			t.Errorf("%d endpoints: %v allocations", n, got)
		}
	}
}

// A claim that does not hold is said so.
func TestOutcomes(t *testing.T) {
	s := scenario{name: exhausted, fault: behaviour{code: codes.ResourceExhausted}}
	set := settings{fault: 4 * time.Second, after: 14 * time.Second, settled: time.Second}
	calls := func(failUntil, awayUntil time.Duration) (list []sample) {
		for at := -time.Second; at < set.fault+set.after; at += 10 * time.Millisecond {
			one := sample{at: at, took: 10 * time.Millisecond, endpoint: int(at/(10*time.Millisecond)+1000) % replicas}
			switch {
			case one.endpoint != 0 || at < 0:
			case at < failUntil:
				one.code, one.took = codes.ResourceExhausted, time.Millisecond
			case at < awayUntil:
				one.endpoint = 1
			}
			list = append(list, one)
		}
		return list
	}
	for _, c := range []struct {
		failUntil, awayUntil time.Duration
		want                 outcome
		held                 []bool // errors, return
	}{
		{time.Second, 9 * time.Second, outcome{p50: 10, p99: 10, failed: 2.5, share: 25, back: 5 * time.Second, returned: true}, []bool{true, true}},
		{4 * time.Second, 0, outcome{p50: 10, p99: 10, failed: 10, failedOn: 10, share: 100, returned: true}, []bool{false, true}},
		{0, 15 * time.Second, outcome{p50: 10, p99: 10, back: 11 * time.Second, returned: true}, []bool{true, false}},
		{0, time.Hour, outcome{p50: 10, p99: 10}, []bool{true, false}},
	} {
		o := s.outcome(calls(c.failUntil, c.awayUntil), set)
		if c.want.back > 0 && o.back >= c.want.back-300*time.Millisecond && o.back <= c.want.back {
			o.back = c.want.back // its window may begin a little before
		}
		if !o.returned {
			o.back = 0
		}
		if o != c.want {
			t.Errorf("%v, %v: %+v, want %+v", c.failUntil, c.awayUntil, o, c.want)
		}
		m := &measured{set: set, runs: []run{{scenario: s, outcomes: map[string]outcome{ours: o}}}}
		for i, claim := range m.claims() {
			if claim.held != c.held[i] {
				t.Errorf("%v, %v: %+v", c.failUntil, c.awayUntil, claim)
			}
		}
	}
}
