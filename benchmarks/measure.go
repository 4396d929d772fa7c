package main

import (
	"fmt"
	"log"
	"math"
	"math/rand/v2"
	"runtime"
	"runtime/metrics"
	"slices"
	"sync"
	"syscall"
	"time"
)

// A series has one value for each round.
type series []float64

// quantile is the value below which a share p of the series lies.
func (s series) quantile(p float64) float64 {
	sorted := slices.Sorted(slices.Values(s))
	at := p * float64(len(sorted)-1)
	low, high := sorted[int(math.Floor(at))], sorted[int(math.Ceil(at))]
	return low + (high-low)*(at-math.Floor(at))
}

func (s series) median() float64 { return s.quantile(0.5) }

// pairwise combines two series round by round, so that what disturbs a whole round
// disturbs no ratio.
func pairwise(a, b series, f func(a, b float64) float64) series {
	out := make(series, len(a))
	for i := range out {
		out[i] = f(a[i], b[i])
	}
	return out
}

func ratio(a, b series) series { return pairwise(a, b, func(a, b float64) float64 { return a / b }) }
func over(a, b series) series  { return pairwise(a, b, func(a, b float64) float64 { return a - b }) }

// A subject is what is measured: so many goroutines as it is wide make one call after
// the other. An error ends the program.
type subject struct {
	name  string
	width int
	calls func() func() error // what one goroutine calls
	paced bool                // hystrix-go catches up, off the clock
	many  int                 // calls that one call stands for; 0: one
}

// at is the subject with so many goroutines.
func (s subject) at(widths ...int) (list []subject) {
	for _, s.width = range slices.Compact(widths) {
		list = append(list, s)
	}
	return list
}

func (s subject) key() string { return fmt.Sprint(s.name, "/", s.width) }

// chunk is after how many calls a paced subject pauses: the queue of hystrix-go holds
// 2,000 results.
const chunk = 500

// batch makes n calls, and returns the time that they take together and the CPU time
// of the process.
func (s subject) batch(n int) (wall, cpu time.Duration) {
	before := cpuTime()
	for left := n; left > 0; left -= chunk {
		if !s.paced {
			return s.run(n), cpuTime() - before
		}
		wall += s.run(min(left, chunk))
		settle()
	}
	return wall, cpuTime() - before
}

// settle waits until no other goroutine has anything to do.
func settle() {
	busy := []metrics.Sample{{Name: "/sched/goroutines/runnable:goroutines"}, {Name: "/sched/goroutines/running:goroutines"}}
	for {
		time.Sleep(time.Millisecond)
		if metrics.Read(busy); busy[0].Value.Uint64()+busy[1].Value.Uint64() <= 1 {
			return
		}
	}
}

func (s subject) run(n int) time.Duration {
	loop := func(f func() error) {
		for range n / s.width {
			if err := f(); err != nil {
				log.Panicf("%s: %v", s.name, err)
			}
		}
	}
	if s.width == 1 {
		f := s.calls()
		start := time.Now()
		loop(f)
		return time.Since(start)
	}
	var ready, done sync.WaitGroup
	gun := make(chan struct{})
	ready.Add(s.width)
	for range s.width {
		done.Go(func() {
			f := s.calls()
			ready.Done()
			<-gun
			loop(f)
		})
	}
	ready.Wait()
	start := time.Now()
	close(gun)
	done.Wait()
	return time.Since(start)
}

// result is what a call of a subject takes.
type result struct {
	ns     series  // wall clock: n cores that do not disturb each other take an n-th
	cpu    series  // ns of the process, with what it does in the background
	allocs float64 // objects, to a hundredth: the runtime makes some too
}

// measure runs batches of all subjects in rounds, each round in a new order, and
// returns the results by the subjects' keys.
func measure(title string, subjects []subject, rounds int, batch time.Duration) map[string]*result {
	results, calls := map[string]*result{}, make([]int, len(subjects))
	for i, s := range subjects {
		n, wall := s.width, time.Duration(0)
		for wall < batch/4 {
			n *= 2
			wall = time.Hour
			for range 3 { // the best: a neighbour can make one look long
				once, _ := s.batch(n)
				wall = min(wall, once)
			}
		}
		calls[i] = max(20*s.width, int(float64(n)*float64(batch)/float64(wall)))
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		s.batch(calls[i])
		runtime.ReadMemStats(&after)
		allocs := float64(after.Mallocs-before.Mallocs) / float64(calls[i]*max(1, s.many))
		results[s.key()] = &result{allocs: math.Round(100*allocs) / 100}
	}
	for round := range rounds {
		progress("%s: round %d of %d", title, round+1, rounds)
		for _, i := range rand.Perm(len(subjects)) {
			s, r := subjects[i], results[subjects[i].key()]
			runtime.GC() // the garbage of others is not this one's
			wall, cpu := s.batch(calls[i])
			per := float64(calls[i] * max(1, s.many))
			r.ns, r.cpu = append(r.ns, float64(wall)/per), append(r.cpu, float64(cpu)/per)
		}
	}
	return results
}

// cpuTime is what the process has used of all cores.
func cpuTime() time.Duration {
	var r syscall.Rusage
	must(0, syscall.Getrusage(syscall.RUSAGE_SELF, &r))
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// must is for what fails only if this program or its machine is wrong.
func must[T any](v T, err error) T {
	if err != nil {
		log.Panic(err)
	}
	return v
}
