// Command balancing compares resilience_p2c, the client's load balancing of this module,
// with the balancers that come with grpc-go, and writes docs/balancing.md:
//
//	make bench-balancing                        # from the root: everything, some 5 minutes, up to 15 beside neighbours
//	cd benchmarks && go run ./balancing -quick  # a look at whether it works, to stdout alone
//
// Each arm has replicas of its own, and all arms are called at the same time: what
// disturbs one disturbs all. fleet.go has the replicas, load.go makes the calls,
// scenario.go has what happens meanwhile, pick.go the cost of a pick.
package main

import (
	"flag"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"regexp"
	"time"
)

// settings are how long and how much is measured: full, or to see that it works.
type settings struct {
	rate      float64       // calls a second of each arm
	warmUp    time.Duration // before a scenario, not counted
	fault     time.Duration // how long an endpoint is bad
	after     time.Duration // how long its return is watched
	unfaulty  time.Duration // the scenarios without an end of the fault
	settled   time.Duration // when a balancer should know better
	every     time.Duration // between restarts, and the half of a flap
	attempts  int           // at a scenario that neighbours disturb
	pickSizes []int
	pickTurns int // before and after each scenario
}

var (
	full = settings{
		rate: 250, warmUp: 4 * time.Second, fault: 10 * time.Second, after: 14 * time.Second, unfaulty: 20 * time.Second,
		settled: 2 * time.Second, every: 2 * time.Second, attempts: 3, pickSizes: []int{10, 1000}, pickTurns: 10,
	}
	quick = settings{
		rate: 300, warmUp: 300 * time.Millisecond, fault: 800 * time.Millisecond, after: 300 * time.Millisecond, unfaulty: time.Second,
		settled: 400 * time.Millisecond, every: 200 * time.Millisecond, attempts: 1, pickSizes: []int{10}, pickTurns: 1,
	}
)

func main() {
	out := flag.String("o", "", "write the report to this `file` too, and its charts to a folder of its name")
	brief := flag.Bool("quick", false, "see in some 15 seconds that it works; the figures mean little")
	run := flag.String("run", "", "the scenarios whose `name` matches, without the cost of a pick unless it matches too")
	flag.Parse()
	set := full
	if *brief {
		set = quick
	}
	r := measure(set, regexp.MustCompile(*run))
	text := r.markdown()
	fmt.Print(text)
	if *out == "" {
		return
	}
	must(0, os.WriteFile(*out, []byte(text), 0o644))
	folder := filepath.Join(filepath.Dir(*out), chartFolder)
	must(0, os.MkdirAll(folder, 0o755))
	for _, c := range r.charts() {
		must(0, os.WriteFile(filepath.Join(folder, c.file), []byte(c.svg()), 0o644))
	}
}

// must is for what fails only if this program or its machine is wrong.
func must[T any](v T, err error) T {
	if err != nil {
		log.Panic(err)
	}
	return v
}
