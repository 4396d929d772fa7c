package interceptors_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/afex/hystrix-go/hystrix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

const hystrixProcess = "GRPC_RESILIENCE_TEST_HYSTRIX" // set: be the process

// TestHystrixProcess is what concerns the whole process, in one of its own: what
// comes before the first guard, hystrix-go's logger, its dashboard (which drops what
// more than a few circuits have to say) and Flush, and the most circuits there can
// be.
func TestHystrixProcess(t *testing.T) {
	if _, ok := os.LookupEnv(hystrixProcess); !ok {
		t.Parallel()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestHystrixProcess$", "-test.v", "-test.timeout=100s")
		cmd.Env = append(os.Environ(), hystrixProcess+"=1")
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--- PASS: TestHystrixProcess/too_many") {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	t.Run("foreign circuit", foreignCircuit) // the first: there must be no guard yet
	t.Run("dashboard", dashboard)
	t.Run("logger panics", hystrixLoggerPanics)
	t.Run("logger waits", hystrixLoggerWaits)
	t.Run("flush", flushed)
	t.Run("stress", hystrixStress)
	t.Run("too many", tooManyCircuits) // the last: there is no circuit left
}

// warned is a slog.Handler that keeps warnings, and looks at the guard meanwhile.
type warned struct {
	slog.Handler
	guard *interceptors.Guard
	mu    sync.Mutex
	said  []string
}

func (*warned) Enabled(context.Context, slog.Level) bool { return true }

func (w *warned) Handle(_ context.Context, r slog.Record) error {
	if r.Level == slog.LevelWarn {
		w.guard.Snapshot()
		said := r.Message
		r.Attrs(func(a slog.Attr) bool { said += " " + a.String(); return true })
		w.mu.Lock()
		w.said = append(w.said, said)
		w.mu.Unlock()
	}
	return nil
}

// wantWindow checks that the window engine protects a method.
func wantWindow(t *testing.T, g *interceptors.Guard, method string) {
	t.Helper()
	for range 2 {
		_ = serveOn(g, method, errDown)
	}
	if err := serveOn(g, method, nil); reasonOf(err) != interceptors.ReasonBreakerOpen {
		t.Errorf("%s is not protected: %v", method, err)
	}
	if b := gatesOf(t, g, interceptors.Server, method).Breaker; b.Engine != "window" {
		t.Errorf("%s: %+v", method, *b)
	}
}

func foreignCircuit(t *testing.T) {
	const method, name = "/pre.Existing/M", "grpc.server/pre.Existing/M"
	if _, created, err := hystrix.GetCircuit(name); !created || err != nil {
		t.Fatal("the process has circuits already", err)
	}
	w := new(warned)
	g := mustGuard(t, "server: {rules: [{methods: ['*'], breaker: {engine: hystrix, request_volume_threshold: 2}}]}", interceptors.WithLogger(slog.New(w)))
	w.guard = g
	if got := g.HystrixName(interceptors.Server, "", method); got != name {
		t.Fatalf("the first guard's name is %s, want %s", got, name)
	}
	wantWindow(t, g, method)
	if len(w.said) != 2 || !strings.Contains(w.said[0], "circuit="+name) || !strings.Contains(w.said[0], "before the guard was made") {
		t.Errorf("warned of %q", w.said)
	}
	checkIdle(t, g)
}

func dashboard(t *testing.T) {
	stream := hystrix.NewStreamHandler()
	stream.Start()
	defer stream.Stop()
	srv := httptest.NewServer(stream)
	defer srv.Close()
	ctx, cancel := context.WithTimeout(t.Context(), hystrixPatience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, srv.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	defer cancel()

	r := newRig(t, arms[0], touchyHystrix, script())
	r.fresh()
	r.must("")
	r.must("")
	slow, release := holdWord(t)
	running := r.begin(t.Context(), slow)
	began := time.Now()
	eventually(t, "some time goes by", func() bool { return time.Since(began) > 30*time.Millisecond })
	release()
	r.ends(running, codes.OK)
	r.fail(3)
	r.heard(words{success: 3, failure: 3})
	type event struct {
		Name     string `json:"name"`
		Type     string `json:"type"`
		Open     bool   `json:"isCircuitBreakerOpen"`
		Requests int    `json:"requestCount"`
		Errors   int    `json:"errorCount"`
		Percent  int    `json:"errorPercentage"`
		Success  int    `json:"rollingCountSuccess"`
		Failure  int    `json:"rollingCountFailure"`
		Short    int    `json:"rollingCountShortCircuited"`
		Volume   int    `json:"propertyValue_circuitBreakerRequestVolumeThreshold"`
		Sleep    int    `json:"propertyValue_circuitBreakerSleepWindowInMilliseconds"`
		Latency  struct {
			Most int `json:"100"`
		} `json:"latencyExecute"`
	}
	lines := bufio.NewScanner(resp.Body)
	until := func(what string, cond func(event) bool) event {
		t.Helper()
		for lines.Scan() {
			data, ok := strings.CutPrefix(lines.Text(), "data:")
			if !ok {
				continue
			}
			var e event
			if err := json.Unmarshal([]byte(data), &e); err != nil {
				t.Fatal(err)
			}
			if e.Name == r.name && e.Type == "HystrixCommand" && cond(e) {
				return e
			}
		}
		t.Fatalf("%s: %v", what, lines.Err())
		return event{}
	}
	e := until("six calls more than the one that closed it", func(e event) bool { return e.Requests == 7 })
	if e.Success != 4 || e.Failure != 3 || e.Errors != 3 || e.Percent != 43 || e.Short != 0 || e.Open || e.Volume != 4 || e.Sleep != 3_600_000 || e.Latency.Most < 30 {
		t.Errorf("%+v", e)
	}
	r.fail(1)
	r.is("open")
	r.mustNot()
	e = until("open", func(e event) bool { return e.Open && e.Short == 1 })
	if e.Success != 4 || e.Failure != 4 || e.Errors != 5 {
		t.Errorf("%+v", e)
	}
	r.heal()
	e = until("closed", func(e event) bool { return !e.Open && e.Requests == 1 })
	if e.Success != 1 || e.Errors != 0 {
		t.Errorf("%+v", e)
	}
}

// minedPrinter is a logger of hystrix-go's that panics when it is told to.
type minedPrinter struct{ armed atomic.Bool }

func (m *minedPrinter) Printf(string, ...any) {
	if m.armed.Load() {
		panic("boom")
	}
}

// hystrix-go's logger is called under its locks, and ours. Its panics are kept from
// the calls, and the circuit goes on when they are over.
func hystrixLoggerPanics(t *testing.T) {
	m := new(minedPrinter)
	hystrix.SetLogger(m)
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		r := newRig(t, a, strictHystrix, script())
		call := func(text string) {
			if code := status.Code(r.do(t.Context(), text)); code != codes.OK && code != codes.Unavailable {
				t.Errorf("a call ended %v", code)
			}
		}
		r.fresh()
		m.armed.Store(true)
		for range 5 {
			call("UNAVAILABLE")
		}
		eventually(t, "it opens all the same", func() bool { return r.state() == "open" })
		m.armed.Store(false)
		eventually(t, "hystrix-go opens", r.circuit().IsOpen)
		checkIdle(t, r.guard.Guard)
		r.wake()
		m.armed.Store(true)
		for range 5 { // neither probed nor closed
			call("")
		}
		m.armed.Store(false)
		r.heal()
		r.must("")
		r.heard(words{success: 2})
		checkIdle(t, r.guard.Guard)
	})
}

// hystrix.Flush forgets every circuit: the guard goes on with a new one.
func flushed(t *testing.T) {
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		r := newRig(t, a, touchyHystrix, script())
		word, release := holdWord(t)
		for _, state := range []string{"closed", "open", "half_open"} {
			r.fresh()
			var stale *pending
			switch state {
			case "open":
				r.trip()
			case "half_open":
				r.trip()
				stale = r.probe(t.Context(), word+" UNAVAILABLE")
			}
			r.is(state)
			old := r.circuit()
			hystrix.Flush()
			r.must("")
			r.is("closed")
			if r.circuit() == old {
				t.Error("the circuit was not flushed")
			}
			if stale != nil {
				release()
				r.ends(stale, codes.Unavailable)
			}
			r.words, r.rejected = words{}, r.snapshot().Counts.Rejected[interceptors.ReasonBreakerOpen]
			r.heard(words{success: 1})
			r.fail(2)
			r.is("closed")
			r.fail(1)
			r.is("open") // and protects
			r.heal()
		}
		checkIdle(t, r.guard.Guard)
	})
}

// hystrixStress is everything at once, others that use our circuits included. What
// they do may open and close them at any time; when they are gone, all is well.
func hystrixStress(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		r := handRig(t, a, "breaker: {engine: hystrix, request_volume_threshold: 4, sleep_window: 1ms}, concurrency_limit: {max_in_flight: 20, max_streams: 20} # stress")
		_ = r.do(t.Context(), "")
		ctx, stop := context.WithTimeout(t.Context(), 400*time.Millisecond)
		defer stop()
		var working sync.WaitGroup
		work := func(n int, f func(rnd *rand.Rand)) {
			for i := range n {
				working.Go(func() {
					for rnd := rand.New(rand.NewPCG(seed, uint64(i))); ctx.Err() == nil; {
						f(rnd)
					}
				})
			}
		}
		work(6, func(rnd *rand.Rand) {
			text := []string{"", "", "UNAVAILABLE", "UNAVAILABLE", "NOT_FOUND", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "100us", "1ms UNAVAILABLE", "hang"}[rnd.IntN(10)]
			ctx, cancel := context.WithTimeout(context.Background(), time.Duration(1+rnd.IntN(3))*time.Millisecond)
			defer cancel()
			if rnd.IntN(20) == 0 {
				survive(func() { _ = r.byHand(ctx, r.guard.Guard, func(context.Context) error { panic("boom") }) })
				return
			}
			_ = r.do(ctx, text)
		})
		work(2, func(*rand.Rand) { r.guard.Snapshot() })
		work(2, func(rnd *rand.Rand) {
			c, _, _ := hystrix.GetCircuit(r.name)
			switch rnd.IntN(4) {
			case 0:
				c.IsOpen()
			case 1:
				if c.AllowRequest() {
					time.Sleep(100 * time.Microsecond)
				}
			default:
				word := []string{"success", "failure", "timeout", "rejected", "short-circuit", "strange"}[rnd.IntN(6)]
				_ = c.ReportEvent([]string{word}, time.Now(), 0)
			}
		})
		work(1, func(*rand.Rand) { time.Sleep(10 * time.Millisecond); hystrix.Flush() })
		done := make(chan struct{})
		go func() { working.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(hystrixPatience):
			t.Fatal("deadlock")
		}
		hystrix.Flush() // what others have said
		r.must("")      // it is never closed to calls for ever
		for range 3 {
			r.fresh()
			r.must("")
			r.fail(2)
			r.is("open")
			r.mustNot()
			r.heard(words{success: 1, failure: 2})
			r.heal()
			r.heard(words{success: 1})
		}
		r.ended(ended{success: 2, failure: 2})
	})
}

func tooManyCircuits(t *testing.T) {
	w := new(warned)
	g := mustGuard(t, "server: {rules: [{methods: ['*'], breaker: {engine: hystrix, request_volume_threshold: 2}, concurrency_limit: {max_in_flight: 1}}]}", interceptors.WithLogger(slog.New(w)))
	w.guard = g
	method := func(i int) string { return fmt.Sprintf("/too.Many/%d", i) }
	const methods = 300
	for i := range methods {
		if err := serveOn(g, method(i), nil); err != nil {
			t.Fatal(err)
		}
	}
	engines := map[string]int{}
	for _, m := range g.Snapshot().Methods {
		engines[m.Breaker.Engine]++
	}
	others := 0 // circuits of the tests before
	for name := range hystrix.GetCircuitSettings() {
		if !strings.Contains(name, "/too.Many/") && !strings.HasSuffix(name, "/pre.Existing/M") {
			others++
		}
	}
	if engines["hystrix"]+others != 256 || engines["hystrix"]+engines["window"] != methods {
		t.Errorf("%v and %d circuits before", engines, others)
	}
	if len(w.said) != engines["window"] || !strings.Contains(w.said[0], fmt.Sprintf("/too.Many/%d", engines["hystrix"])) || !strings.Contains(w.said[0], "256") {
		t.Errorf("%d warnings, the first is %q", len(w.said), w.said[0])
	}
	wantWindow(t, g, method(methods-1))
	// What was there before stays.
	for range 2 {
		_ = serveOn(g, method(0), errDown)
	}
	eventually(t, "the first method opens", func() bool {
		b := gatesOf(t, g, interceptors.Server, method(0)).Breaker
		return b.Engine == "hystrix" && b.State == "open"
	})
	checkIdle(t, g)
}
