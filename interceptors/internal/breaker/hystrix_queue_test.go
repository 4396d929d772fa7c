package breaker_test

import (
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/afex/hystrix-go/hystrix"
	metriccollector "github.com/afex/hystrix-go/hystrix/metric_collector"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
)

// gate is a collector of another's that can hold hystrix-go's queue up.
type gate struct {
	mu   sync.Mutex
	seen []metriccollector.MetricResult
}

func (g *gate) Update(r metriccollector.MetricResult) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.seen = append(g.seen, r)
}
func (g *gate) Reset() {}

// hold waits until the gate has seen n updates and lets no other pass, which holds
// hystrix-go's queue up, until it is released or the test ends.
func (g *gate) hold(c *circuit, n int) (release func()) {
	c.Helper()
	c.until("seen by the gate", func() bool { return g.count() >= n })
	g.mu.Lock()
	release = sync.OnceFunc(g.mu.Unlock)
	c.Cleanup(release)
	return release
}

func (g *gate) count() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.seen)
}

// holding has a gate for each circuit that is made while it is set. For one name,
// no collector is made, but a panic.
var holding struct {
	sync.Mutex
	gates  map[string]*gate
	panics string
}

var register = sync.OnceFunc(func() {
	metriccollector.Registry.Register(func(name string) metriccollector.MetricCollector {
		holding.Lock()
		defer holding.Unlock()
		if name == holding.panics {
			panic("no collector of " + name)
		}
		g := new(gate)
		if holding.gates != nil {
			holding.gates[name] = g
		}
		return g
	})
})

// gateOf makes the circuits of f with gates and returns that of a name.
func gated(t *testing.T, f func() *circuit) (*circuit, *gate) {
	t.Helper()
	register()
	holding.Lock()
	holding.gates = map[string]*gate{}
	holding.Unlock()
	c := f()
	holding.Lock()
	defer holding.Unlock()
	g := holding.gates[c.name]
	holding.gates = nil
	return c, g
}

func TestHystrixClosesWhenItsQueueIsEmpty(t *testing.T) {
	c, g := gated(t, func() *circuit { return newCircuit(t, 30*time.Millisecond) })
	for range 5 { // what others reported earlier makes no difference
		if err := c.foreign().ReportEvent([]string{"timeout"}, time.Now(), 0); err != nil {
			t.Fatal(err)
		}
	}
	c.until("applied", func() bool { return g.count() == 5 })
	c.end(c.begin(15), failure)
	c.until("open", func() bool { return c.Stats(c.now()).State == open })
	c.is(open)
	release := g.hold(c, 20)
	refused, slept := 0, c.now()+40*time.Millisecond
	var probe breaker.Ticket
	c.until("half-open", func() (ok bool) {
		if refused > 0 && c.now() < slept {
			return false // few refusals: the queue is bounded
		}
		if probe, _, ok = c.Acquire(c.now()); !ok {
			refused++
		}
		return ok
	})
	if _, _, ok := c.Acquire(c.now()); ok || c.Applied() {
		t.Fatal("nothing is queued")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.Done(probe, c.now(), success, false)
	}()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("Done waits for the queue") // hystrix-go's reset does
	}
	if s := c.Stats(c.now()); s.State != closed || !c.foreign().IsOpen() {
		t.Errorf("%+v, hystrix-go open %v", s, c.foreign().IsOpen())
	}
	// Until hystrix-go closes too, calls pass and are not counted.
	c.end(c.begin(50), failure)
	if c.Idle(c.now()) {
		t.Error("idle while closing")
	}
	release()
	c.until("closed by the probe alone", func() bool { s := c.Stats(c.now()); return s.Requests == 1 && s.Failures == 0 })
	c.is(closed)
	told := 20 + refused + 1 + 1 // what opened it, the refusals, the probe
	if c.until("seen by the gate", func() bool { return g.count() >= told }); g.count() != told {
		t.Errorf("%d updates, want %d: calls while closing are not to be queued", g.count(), told)
	}
	c.end(c.begin(100), success)
	c.is(closed)
	c.saw(opens, probes, closes)
}

// Nobody calls after the probe: others find the circuit closed all the same. If
// hystrix-go's logger panics meanwhile, it has not closed, and is open for us too.
func TestHystrixClosesWithoutAnotherCall(t *testing.T) {
	defer logger.at.Store(nil)
	for _, at := range []string{"nothing", "closing"} {
		c, g := gated(t, func() *circuit { return newCircuit(t, 30*time.Millisecond) })
		c.trip()
		release := g.hold(c, 20)
		if _, _, ok := c.Acquire(c.now()); ok {
			t.Fatal("admitted")
		}
		probe, before := c.probe(), logger.panics.Load()
		logger.at.Store(&at)
		c.Done(probe, c.now(), success, false)
		if !c.foreign().IsOpen() {
			t.Error("closed before its queue was empty")
		}
		time.AfterFunc(10*time.Millisecond, release) // the first look is too early
		if at == "closing" {
			c.until("tried", func() bool { return logger.panics.Load() > before })
			c.is(open)
			c.saw(opens, probes, closes, opens)
			continue
		}
		c.until("closed", func() bool { return !c.foreign().IsOpen() })
		c.until("applied", c.Applied)
		if s := c.Stats(c.now()); s.State != closed || s.Requests != 1 {
			t.Errorf("%+v, want the probe alone", s)
		}
		c.saw(opens, probes, closes)
	}
}

// A collector that is slow does not keep the circuit from closing for long.
func TestHystrixQueuesFewRefusals(t *testing.T) {
	c, g := gated(t, func() *circuit { return newCircuit(t, time.Hour) })
	c.trip()
	release := g.hold(c, 20)
	for range 1000 {
		if _, _, ok := c.Acquire(c.now()); ok {
			t.Fatal("admitted")
		}
	}
	release()
	c.until("applied", c.Applied)
	c.until("seen by the gate", func() bool { return g.count() >= 20+200 })
	if n := g.count(); n > 20+201 { // one is not in the queue but under way
		t.Errorf("%d updates, want 20 failures and 200 refusals", n)
	}
}

// What hystrix-go does alone.
func TestHystrixPlainReopensFromItsQueue(t *testing.T) {
	c, g := gated(t, func() *circuit { return newCircuit(t, 30*time.Millisecond) })
	plain := c.foreign()
	report := func(event string, n int) {
		for range n {
			if err := plain.ReportEvent([]string{event}, time.Now(), 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	report("failure", 20)
	c.until("open", plain.IsOpen)
	release := g.hold(c, 20)
	report("short-circuit", 1) // is being applied
	report("short-circuit", 500)
	release()
	report("success", 1)
	c.until("reopened", plain.IsOpen)
}

func TestHystrixTellsItsCollectors(t *testing.T) {
	c, g := gated(t, func() *circuit { return newCircuit(t, time.Hour) })
	volume := hystrixConfig(c.name)
	volume.SleepWindow, volume.RequestVolume, volume.ErrorPercent = time.Hour, 41, 60 // not before the last
	if _, err := breaker.NewHystrix(volume, nil); err != nil {
		t.Fatal(err)
	}
	results := []breaker.Result{breaker.Ignored, success, failure, breaker.Timeout, breaker.Canceled, breaker.Expired}
	for i, r := range results {
		for range i + 1 {
			ticket, _, _ := c.Acquire(0)
			c.Done(ticket, time.Second, r, false)
		}
	}
	c.until("applied", c.Applied)
	c.Done(breaker.Ticket{}, 0, failure, false) // belongs to no call
	c.trip()
	if _, ok := c.Ready(c.now()); ok {
		t.Error("ready")
	}
	c.until("applied", func() bool { return g.count() == 21+20+1 })
	var sum metriccollector.MetricResult
	for i, r := range g.seen {
		sum.Attempts += r.Attempts
		sum.Successes += r.Successes
		sum.Failures += r.Failures
		sum.Timeouts += r.Timeouts
		sum.ContextCanceled += r.ContextCanceled
		sum.ContextDeadlineExceeded += r.ContextDeadlineExceeded
		sum.ShortCircuits += r.ShortCircuits
		if i < 21 && r.RunDuration != time.Second {
			t.Errorf("took %v, want 1s", r.RunDuration)
		}
	}
	want := metriccollector.MetricResult{Attempts: 42, Successes: 2, Failures: 3 + 20, Timeouts: 4, ContextCanceled: 5, ContextDeadlineExceeded: 6, ShortCircuits: 1}
	if sum != want {
		t.Errorf("%+v, want %+v", sum, want)
	}
}

func TestCase17_HystrixCollectorPanics(t *testing.T) {
	register()
	cfg := hystrixConfig(breaker.NewHystrixScope().Name("server", "", "/a.B/Collector"))
	panics := func(name string) {
		holding.Lock()
		defer holding.Unlock()
		holding.panics = name
	}
	panics(cfg.Name)
	if _, err := breaker.NewHystrix(cfg, nil); err == nil || !strings.Contains(err.Error(), "no collector of "+cfg.Name) {
		t.Errorf("%v, want an error with what the collector said", err)
	}
	panics("")
	h, err := breaker.NewHystrix(cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	panics(cfg.Name) // once it is flushed, the old circuit goes on
	told.Store(0)
	hystrix.Flush()
	if ticket, _, ok := h.Acquire(0); !ok || told.Load() == 0 {
		t.Errorf("admitted %v, told of %d panics", ok, told.Load())
	} else {
		h.Done(ticket, 0, success, false)
	}
	panics("")
	h.Stats(0)
	if _, created, _ := hystrix.GetCircuit(cfg.Name); created {
		t.Error("no new circuit")
	}
}
