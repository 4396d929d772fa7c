// Command benchmarks measures this module and what a user would pick instead of it, in
// one run, and writes docs/performance.md:
//
//	make bench                                # from the root: everything, some 10 minutes
//	cd benchmarks && go run . -run 'hot|wire' # some sections, to stdout alone
//
// What it reports is in the report itself; how it measures is in measure.go. The arms
// are tables: arms.go and streams.go without a network, wire.go with one.
package main

import (
	"flag"
	"fmt"
	"log"
	"os"
	"regexp"
	"time"
)

// settings are how long and how much is measured: full, or in tests less.
type settings struct {
	rounds  int           // of the hot path
	batch   time.Duration // of one arm in a round
	profile time.Duration // of what does not reach its budget

	wireRounds, callers, calls, messages int

	scaleRounds int
	sizes       []int // of methods and of goroutines
	repeats     int   // of what takes milliseconds or more

	rates        []float64 // calls a second
	rateCallers  []int
	rateTime     time.Duration
	queueCallers int
}

var full = settings{
	rounds: 41, batch: 5 * time.Millisecond, profile: 4 * time.Second,
	wireRounds: 41, callers: 32, calls: 200, messages: 1000,
	scaleRounds: 11, sizes: []int{1, 100, 10_000}, repeats: 7,
	rates: []float64{10, 1000, 100_000}, rateCallers: []int{1, 1000}, rateTime: 2 * time.Second, queueCallers: 500,
}

var sections = []struct {
	name string
	run  func(*report, settings)
}{{"hot", hotPath}, {"wire", endToEnd}, {"scale", scale}, {"accuracy", accuracy}}

func main() {
	if os.Getenv(childEnv) != "" {
		serveWires(os.Stdin, os.Stdout)
		return
	}
	run := flag.String("run", "", "measure the sections whose `name` matches: hot, wire, scale, accuracy")
	out := flag.String("o", "", "write the report to this `file` too")
	flag.Parse()
	pattern := must(regexp.Compile(*run))
	r := new(report)
	for _, s := range sections {
		if pattern.MatchString(s.name) {
			s.run(r, full)
		}
	}
	text := r.markdown()
	fmt.Print(text)
	if *out != "" {
		must(0, os.WriteFile(*out, []byte(text), 0o644))
	}
}

func progress(format string, args ...any) { log.Printf(format, args...) }
