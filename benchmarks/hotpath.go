package main

import (
	"fmt"
	"runtime"
	"slices"
	"strings"

	"github.com/google/pprof/profile"
)

// hotPath measures what is added to a call, without a network.
func hotPath(r *report, set settings) {
	procs := runtime.GOMAXPROCS(0)
	var subjects []subject
	var refused []refusal
	var frees []func()
	refuse := func(list []refusal) {
		for _, no := range list {
			s, free := no.subject()
			subjects, refused, frees = append(subjects, s.at(1, procs)...), append(refused, no), append(frees, free)
		}
	}
	defer func() {
		for _, free := range frees {
			free()
		}
	}()
	for _, a := range slices.Concat(unaryArms, streamArms) {
		subjects = append(subjects, a.subject().at(1, procs)...)
		refuse(a.refusals())
	}
	refuse(moreRefusals())
	sent := messages()
	for _, s := range sent {
		subjects = append(subjects, s.at(1, procs)...)
	}
	got := measure("hot path", subjects, set.rounds, set.batch)
	of := func(name string, width int) *result { return got[subject{name: name, width: width}.key()] }
	serial := func(name string) *result { return of(name, 1) }

	r.section("Hot path", "What is added to a unary call, without a network: an interceptor is called as gRPC calls it, with an invoker or a handler that does nothing, on one method. "+
		"Limits are never reached. Serial is one goroutine; parallel is one for each core, in wall clock over calls: what scales perfectly on two cores takes half. "+
		"CPU is that of the process in the serial run, its goroutines and the garbage collector included: hystrix-go works in goroutines of its own.")
	arms := func(list []arm) {
		var rows, notes [][]string
		for _, a := range list {
			s, p := serial(a.name), of(a.name, procs)
			rows = append(rows, []string{a.name, spread(s.ns), times(ratio(s.ns, serial(floorArm).ns)), spread(p.ns), times(ratio(p.ns, of(floorArm, procs).ns)), spread(s.cpu), number(s.allocs)})
			notes = append(notes, []string{a.name, a.what})
		}
		r.table([]string{"", "serial, ns", "× floor", "parallel, ns", "× floor", "CPU, ns", "allocations"}, rows)
		r.notes(notes)
	}
	arms(unaryArms)

	r.section("Streams", "A client stream is opened and received from until its end, which comes at once; a server stream is a handler that returns. Beneath is a stream that does nothing. "+
		"failsafe-go, gobreaker and aegis have no streams.")
	arms(streamArms)
	var rows [][]string
	for _, s := range sent {
		rows = append(rows, []string{s.name, spread(serial(s.name).ns), spread(of(s.name, procs).ns), number(serial(s.name).allocs)})
	}
	r.table([]string{"a message", "serial, ns", "parallel, ns", "allocations"}, rows)

	r.section("Refused calls", "What it takes until the interceptor has said no. On a client that is all, and the status with its details is made when somebody asks for it; on a server the wire is to come, see End to end.")
	var notes [][]string
	rows = nil
	mostAllocs := 0.0
	for _, no := range refused {
		s, p := serial("refused: "+no.name), of("refused: "+no.name, procs)
		row := []string{no.name, spread(s.ns), spread(p.ns), spread(s.cpu), number(s.allocs)}
		if no.name == queueTimeout {
			row[1], row[2] = "", ""
		}
		if no.cheap() {
			mostAllocs = max(mostAllocs, s.allocs)
		}
		rows, notes = append(rows, row), append(notes, []string{no.name, no.what})
	}
	r.table([]string{"", "serial, ns", "parallel, ns", "CPU, ns", "allocations"}, rows)
	r.notes(notes)

	profiles := map[string]*profile.Profile{}
	why := func(key string) func() *profile.Profile {
		s := subjects[slices.IndexFunc(subjects, func(s subject) bool { return s.key() == key })]
		return func() *profile.Profile {
			if profiles[key] == nil {
				profiles[key] = profiled(set.profile, func() { s.batch(20 * chunk) })
			}
			return profiles[key]
		}
	}
	against := func(name, other string, most float64, width int) {
		key := subject{name: name, width: width}.key()
		kind := "serial"
		if width > 1 {
			kind = "parallel"
		}
		r.check(fmt.Sprintf("%s, %s: time, against %s", name, kind, other), ratio(got[key].ns, of(other, width).ns), most, " ×", why(key))
	}
	allocs := func(what string, got, most float64) { r.check(what+": allocations", series{got}, most, "", nil) }
	for _, side := range []struct{ ours, failsafe string }{{clientArm, failsafeClient}, {serverArm, failsafeServer}} {
		for _, width := range slices.Compact([]int{1, procs}) {
			against(side.ours, floorArm, 2, width)
			against(side.ours, side.failsafe, map[bool]float64{true: 0.12, false: 0.2}[width == 1], width)
			against(side.ours, gobreakerArm, 1.2, width)
		}
		allocs(side.ours, serial(side.ours).allocs, 0)
	}
	allocs(timeoutArm+", beyond those without and of "+deadlineArm, serial(timeoutArm).allocs-serial(clientArm).allocs-serial(deadlineArm).allocs, 0)
	against(engineArm, hystrixArm, 1.4, 1)
	against(engineArm, hystrixDo, 0.25, 1)
	for _, s := range sent {
		if what, ok := strings.CutSuffix(s.name, ", three gates"); ok {
			bare := serial(what + ", bare").ns
			added, reporters := over(serial(s.name).ns, bare), over(serial(what+", go-grpc-middleware reporter").ns, bare)
			message, cause := "a guarded stream's message, "+what, why(subject{name: s.name, width: 1}.key())
			r.check(message+": time over bare", added, 15, " ns", cause)
			r.check(message+": time over bare, against that of go-grpc-middleware's reporter", ratio(added, reporters), 0.21, " ×", cause)
			allocs(message, serial(s.name).allocs, 0)
		}
	}
	for _, side := range []string{"client stream", "server stream"} {
		allocs(side+", over bare", serial(side+", three gates").allocs-serial(side+", bare").allocs, 6)
	}
	allocs("a client's refusal, engine window, whatever the reason but QUEUE_TIMEOUT", mostAllocs, 1)
}
