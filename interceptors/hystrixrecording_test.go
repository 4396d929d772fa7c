package interceptors_test

import (
	"context"
	"fmt"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
)

// Nothing is recorded until somebody wants to look, then at all methods, old and new.
func TestHystrixRecordsOnDemand(t *testing.T) {
	g := mustGuard(t, hotPolicy)
	_ = serveOn(g, "/p.S/Old", nil)
	h := g.HystrixStream()
	_ = serveOn(g, "/p.S/Old", nil)
	_ = serveOn(g, "/p.S/New", nil)
	_ = callOn(g, nil, "/p.S/New", nil)
	if g.HystrixStream() == nil || h == nil { // asking again forgets nothing
		t.Fatal("no handler")
	}
	all := look(t, g)
	for _, name := range []string{"p.S/Old", "p.S/New", "client p.S/New"} {
		if got := only(t, all, "HystrixCommand", name).number("rollingCountSuccess"); got != 1 {
			t.Errorf("%s: %d successes, want the one since", name, got)
		}
	}
}

// Methods that are first called while recording begins are not forgotten.
func TestHystrixBeginsAmidCalls(t *testing.T) {
	g := mustGuard(t, hotPolicy)
	const callers, methods = 4, 60
	var calls sync.WaitGroup
	for i := range callers {
		calls.Go(func() {
			for n := range methods {
				_ = serveOn(g, fmt.Sprintf("/p%d.S/M%d", i, n), nil)
			}
		})
	}
	g.HystrixStream()
	calls.Wait()
	if n := len(look(t, g)); n != callers*methods*2 {
		t.Errorf("%d events, want a breaker and a pool for each of %d methods", n, callers*methods)
	}
}

func TestHystrixRecordingDoesNotAllocate(t *testing.T) {
	g := mustGuard(t, hotPolicy)
	g.HystrixStream()
	for name, call := range map[string]callOnce{"client": unaryClient(g), "server": unaryServer(g)} {
		if got := testing.AllocsPerRun(1000, func() {
			if err := call(); err != nil {
				t.Fatal(err)
			}
		}); got != 0 {
			t.Errorf("an admitted unary call on the %s: %v allocations, want 0", name, got)
		}
	}
}

// Every name that a guard keeps, and what overflows, which is not shown.
func TestHystrixOfManyMethods(t *testing.T) {
	g := mustGuard(t, "server: {"+everything+"}")
	g.HystrixStream()
	for i := range maxStates + 50 {
		if err := serve(g, fmt.Sprintf("/s%d.v1.S/M", i)); err != nil {
			t.Fatal(err)
		}
	}
	commands := 0
	for _, e := range look(t, g) {
		if e["type"] == "HystrixCommand" {
			commands++
		}
		if strings.Contains(e["name"].(string), "OTHER") {
			t.Errorf("overflow: %v", e)
		}
	}
	if commands != maxStates {
		t.Errorf("%d commands, want %d", commands, maxStates)
	}
}

// What it costs a call to be recorded: compare with BenchmarkUnaryClient and
// BenchmarkUnaryServer.
func BenchmarkUnaryClientRecorded(b *testing.B) {
	g := mustGuard(b, hotPolicy)
	g.HystrixStream()
	serialAndParallel(b, unaryClient(g))
}

func BenchmarkUnaryServerRecorded(b *testing.B) {
	g := mustGuard(b, hotPolicy)
	g.HystrixStream()
	serialAndParallel(b, unaryServer(g))
}

// What a set of events costs, by the number of methods, each with all its samples.
func BenchmarkHystrixEvents(b *testing.B) {
	for _, methods := range []int{1, 100, maxStates} {
		b.Run(fmt.Sprint(methods), func(b *testing.B) {
			g := mustGuard(b, "server: {"+everything+"}")
			h := g.HystrixStream()
			for i := range methods {
				for range 100 {
					if err := serve(g, fmt.Sprintf("/s%d.v1.S/M", i)); err != nil {
						b.Fatal(err)
					}
				}
			}
			ctx, cancel := context.WithCancel(context.Background())
			cancel() // after one set
			r := httptest.NewRequestWithContext(ctx, "GET", "/", nil)
			b.ReportAllocs()
			for b.Loop() {
				w := httptest.NewRecorder()
				w.Body = nil
				h.ServeHTTP(w, r)
			}
		})
	}
}
