package main

import (
	"context"
	"errors"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/pprof/profile"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// The end-to-end section starts this program as its server.
func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		serveWires(os.Stdin, os.Stdout)
		return
	}
	os.Exit(m.Run())
}

// What is measured is a call that happens, behind gates that are real: each arm calls
// once a call, and is driven into each of its gates.
func TestArms(t *testing.T) {
	for _, a := range slices.Concat(unaryArms, streamArms) {
		t.Run(a.name, func(t *testing.T) {
			calls := 0
			call := a.make(wide, func() error {
				calls++
				return nil
			})
			for range 100 {
				if err := call(); err != nil {
					t.Fatal(err)
				}
			}
			if calls != 100 {
				t.Errorf("100 calls called %d times", calls)
			}
			for _, g := range a.gates {
				call, through, free := a.refusing(g)
				defer free()
				before := through.Load()
				for range 100 {
					if err := call(); err == nil && !a.sheds {
						t.Fatalf("%s: a call was admitted", g)
					}
				}
				if n := through.Load() - before; n > 0 && !a.sheds {
					t.Errorf("%s: %d of 100 calls went through", g, n)
				}
			}
		})
	}
}

func allRefusals() (list []refusal) {
	for _, a := range slices.Concat(unaryArms, streamArms) {
		list = append(list, a.refusals()...)
	}
	return append(list, moreRefusals()...)
}

// Of ours, a refusal is for the reason of its name.
func TestRefusals(t *testing.T) {
	for _, r := range allRefusals() {
		call, free := r.make()
		defer free()
		for range 3 {
			err := call()
			if err == nil {
				t.Errorf("%s: was admitted", r.name)
			}
			if rejected, ok := errors.AsType[*interceptors.RejectedError](err); r.reason != "" && (!ok || rejected.Reason != r.reason) {
				t.Errorf("%s: %v", r.name, err)
			}
		}
	}
}

// The budgets that no neighbour can blur; others are in interceptors/alloc_test.go.
func TestAllocations(t *testing.T) {
	check := func(what string, got, most float64) {
		if got > most {
			t.Errorf("%s: %v allocations, at most %v", what, got, most)
		}
	}
	of := func(arm string) float64 {
		call := armNamed(arm).make(wide, nothing)
		return testing.AllocsPerRun(100, func() { must(0, call()) })
	}
	check("a timeout to set, beyond context.WithDeadline", of(timeoutArm)-of(deadlineArm), 0)
	for _, r := range allRefusals() {
		if r.cheap() {
			call, free := r.make()
			defer free()
			check(r.name, testing.AllocsPerRun(100, func() { _ = call() }), 1)
		}
	}
	// A stream's life over TCP, one side guarded and then the other.
	stream := func(w wire) float64 {
		addr, stop := w.start(wide)
		defer stop()
		conn := w.connect(addr, wide)
		defer conn.Close()
		return testing.AllocsPerRun(100, func() {
			one, end := streamJob(w, conn, settings{}).open()
			must(0, one())
			end()
		})
	}
	bare, ours := wires[0], wires[2]
	check("a client's stream over bare", stream(wire{dial: ours.dial, serve: noServe})-stream(bare), 6)
	check("a server's stream over bare", stream(wire{dial: noDial, serve: ours.serve})-stream(bare), 6)
}

// Both sides of a wire do what its name says, for unary calls and for streams.
func TestWires(t *testing.T) {
	unary := func(conn *grpc.ClientConn) error {
		return conn.Invoke(t.Context(), method, message, new(wrapperspb.BytesValue))
	}
	stream := func(conn *grpc.ClientConn) error {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		s, err := conn.NewStream(ctx, bidi, streamMethod)
		if err != nil {
			return err
		}
		_ = s.SendMsg(message) // io.EOF, if it has ended
		return s.RecvMsg(new(wrapperspb.BytesValue))
	}
	for _, w := range wires {
		for name, call := range map[string]func(*grpc.ClientConn) error{"unary": unary, "stream": stream} {
			for _, side := range []string{"client", "server"} {
				dial, serve, guarded := wide, wide, len(w.dial(wide)) > 0
				if side == "client" {
					dial = wide.narrow(rateLimited)
				} else {
					serve, guarded = wide.narrow(rateLimited), len(w.serve(wide)) > 0
				}
				if name == "stream" && !w.streams {
					continue
				}
				addr, stop := w.start(serve)
				defer stop()
				conn := w.connect(addr, dial)
				defer conn.Close()
				if err := call(conn); err != nil {
					t.Errorf("%s, %s, %s: the first call: %v", w.name, name, side, err)
				}
				if err := call(conn); (err != nil) != guarded {
					t.Errorf("%s, %s, %s: guarded %v; beyond the limit: %v", w.name, name, side, guarded, err)
				}
			}
		}
	}
}

// A limit that gives too much, or to the last who came, is found out.
func TestAccuracyIsNotGivenAway(t *testing.T) {
	for factor, wrong := range map[float64]bool{1: false, 2: true} {
		told, real := limits{rate: 1000, burst: 1000}, limits{rate: 1000 * factor, burst: 1000}
		limiter := newXRate(real)
		o := offer(func() error { return limiter.Limit(t.Context()) }, 1, false, 200*time.Millisecond)
		if n, right, off := o.deviation(told); off > 0 != wrong {
			t.Errorf("%v times the rate: %v calls, right is %v, off by %v", factor, n, right, off)
		}
		if excess := o.excess(told); excess > 0 != wrong {
			t.Errorf("%v times the rate: an excess of %v", factor, excess)
		}
	}
	all := offer(nothing, 1, false, 20*time.Millisecond)
	if n, right, off := all.deviation(limits{rate: 1, burst: 1}); n != float64(len(all.admitted)) || off < n-3 {
		t.Errorf("of %d, none refused: %v calls, right is %v, off by %v", len(all.admitted), n, right, off)
	}
	var mu sync.Mutex
	var stack []chan struct{}
	lastComeFirst := func(do func() error) error {
		mu.Lock()
		turn := make(chan struct{})
		stack = append(stack, turn)
		first := len(stack) == 1
		mu.Unlock()
		if !first {
			<-turn
		}
		err := do()
		mu.Lock()
		defer mu.Unlock()
		if last := len(stack) - 1; last > 0 {
			close(stack[last])
			stack = stack[:last]
		}
		return err
	}
	if share := overtaken(lastComeFirst, 20); share < 0.5 {
		t.Errorf("last come, first served: %v overtaken", share)
	}
}

func TestFigures(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.0956: "0.096", 1.005: "1", 1.031: "1.03", 12.34: "12.3", -97: "-97", 123456.7: "123,457"} {
		if got := number(v); got != want {
			t.Errorf("number(%v) = %s, want %s", v, got, want)
		}
	}
	if s := (series{4, 1, 3, 2}); s.quantile(0) != 1 || s.median() != 2.5 || s.quantile(1) != 4 {
		t.Errorf("the quantiles of %v: %v, %v, %v", s, s.quantile(0), s.median(), s.quantile(1))
	}
	for function, want := range map[string]string{
		"runtime.mallocgc": "runtime", "interceptors/internal/limiter.(*bucket).take": "interceptors/internal/limiter",
		"internal/sync.(*HashTrieMap[go.shape.interface {},a/b.C]).Load": "internal/sync", "go.yaml.in/yaml/v3.(*parser).node": "go.yaml.in/yaml/v3",
	} {
		if got := packageOf(function); got != want {
			t.Errorf("packageOf(%s) = %s, want %s", function, got, want)
		}
	}
}

func TestTakes(t *testing.T) {
	const guard, middleware = "github.com/grpc-resilience/grpc-resilience/interceptors.(*Guard).unaryClient", "github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery.f"
	p := new(profile.Profile)
	for _, s := range []struct {
		ns    int64
		stack []string // the innermost first
	}{
		{10, []string{"runtime.nanotime", "time.Since", guard, "google.golang.org/grpc.(*ClientConn).Invoke", "main.main"}},
		{20, []string{middleware, guard, "main.main"}},
		{40, []string{"runtime.mallocgc", "google.golang.org/grpc.invoke", guard, "main.main"}},
		{80, []string{"main.handler", middleware, guard, "google.golang.org/grpc.(*Server).handleStream"}},
		{150, []string{"runtime.gcBgMarkWorker"}},
	} {
		sample := &profile.Sample{Value: []int64{1, s.ns}}
		for _, f := range s.stack {
			sample.Location = append(sample.Location, &profile.Location{Line: []profile.Line{{Function: &profile.Function{Name: f}}}})
		}
		p.Sample = append(p.Sample, sample)
	}
	if guard, program := takes(p); math.Abs(guard-0.1) > 0.001 || math.Abs(program-80.0/300) > 0.001 {
		t.Errorf("%v and %v: of 300 ns 30 are the guard's and 80 the program's", guard, program)
	}
}

// Everything runs, and each budget has a figure.
func TestReport(t *testing.T) {
	r := new(report)
	for _, s := range sections {
		s.run(r, settings{
			rounds: 2, batch: 50 * time.Microsecond, profile: time.Millisecond,
			wireRounds: 2, callers: 4, calls: 5, messages: 5,
			scaleRounds: 1, sizes: []int{1, 10, 50}, repeats: 2,
			rates: []float64{1000}, rateCallers: []int{1, 10}, rateTime: 50 * time.Millisecond, queueCallers: 20,
		})
	}
	for _, b := range r.budgets {
		if m := b.got.median(); math.IsNaN(m) || math.IsInf(m, 0) {
			t.Errorf("%s: %v", b.what, m)
		}
	}
	if n := len(r.budgets); n < 30 {
		t.Errorf("%d budgets", n)
	}
	text := r.markdown()
	for _, want := range []string{"## Budgets", "## Hot path", "## Streams", "## Refused calls", "## End to end", "## Scale", "## Memory", "## Accuracy", "## Waiting", "## Not reached", "google.golang.org/grpc v1."} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in the report", want)
		}
	}
}
