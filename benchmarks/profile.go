package main

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"runtime/pprof"
	"slices"
	"strings"
	"time"

	"github.com/google/pprof/profile"
)

// profiled returns the CPU profile of calling f for a time.
func profiled(d time.Duration, f func()) *profile.Profile {
	var out bytes.Buffer
	must(0, pprof.StartCPUProfile(&out))
	for start := time.Now(); time.Since(start) < d; {
		f()
	}
	pprof.StopCPUProfile()
	return must(profile.Parse(&out))
}

// top are the n functions or packages of a CPU profile that take most, by their own
// time or by that with what they call: a name, and both shares.
func top(p *profile.Profile, n int, name func(function string) string, byOwn bool) (rows [][]string) {
	own, with, all := map[string]int64{}, map[string]int64{}, int64(0)
	for _, s := range p.Sample {
		ns, leaf, seen := s.Value[1], true, map[string]bool{}
		all += ns
		for _, l := range s.Location {
			for _, line := range l.Line { // what is inlined comes first
				f := name(strings.TrimPrefix(line.Function.Name, "github.com/grpc-resilience/grpc-resilience/"))
				if leaf {
					own[f] += ns
				}
				if !seen[f] {
					with[f] += ns
				}
				leaf, seen[f] = false, true
			}
		}
	}
	by := with
	if byOwn {
		by = own
	}
	most := slices.SortedFunc(maps.Keys(with), func(a, b string) int { return cmp.Or(cmp.Compare(by[b], by[a]), cmp.Compare(a, b)) })
	for _, f := range most[:min(n, len(most))] {
		share := func(ns int64) string { return fmt.Sprintf("%.1f %%", 100*float64(ns)/float64(all)) }
		rows = append(rows, []string{"`" + f + "`", share(own[f]), share(with[f])})
	}
	return rows
}

// takes are the parts of a CPU profile that the guard's functions and this program's
// take, with what they call but the other's and gRPC's.
func takes(p *profile.Profile) (guard, program float64) {
	all := 1.0 // ns: nothing
	for _, s := range p.Sample {
		ns := float64(s.Value[1])
		all += ns
		switch whose(s) {
		case "guard":
			guard += ns
		case "program":
			program += ns
		}
	}
	return guard / all, program / all
}

// whose is who called what a sample was taken in.
func whose(s *profile.Sample) string {
	const module = "github.com/grpc-resilience/grpc-resilience/"
	for _, l := range s.Location {
		for _, line := range l.Line {
			switch name := line.Function.Name; {
			case strings.HasPrefix(name, "main."), strings.HasPrefix(name, module+"benchmarks."): // as it is called in a test
				return "program"
			case strings.HasPrefix(name, module), strings.HasPrefix(name, "github.com/grpc-ecosystem/"):
				return "guard"
			case strings.HasPrefix(name, "google.golang.org/grpc"):
				return "gRPC"
			}
		}
	}
	return ""
}

func itself(function string) string { return function }

// packageOf is all but what follows the first dot after the last slash that is not a
// type parameter's.
func packageOf(function string) string {
	function, _, _ = strings.Cut(function, "[")
	slash := strings.LastIndex(function, "/") + 1
	name, _, _ := strings.Cut(function[slash:], ".")
	return function[:slash] + name
}
