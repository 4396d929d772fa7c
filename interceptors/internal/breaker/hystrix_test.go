package breaker_test

import (
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/afex/hystrix-go/hystrix"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
)

// circuit is a Hystrix under test. hystrix-go has its own clock and goroutines, so
// this is in real time: what takes time is waited for.
type circuit struct {
	*testing.T
	*breaker.Hystrix
	name  string
	epoch time.Time

	mu          sync.Mutex
	transitions []string
}

func hystrixConfig(name string) breaker.HystrixConfig {
	return breaker.HystrixConfig{Name: name, ErrorPercent: 50, RequestVolume: 20, SleepWindow: 30 * time.Millisecond, Epoch: time.Now(), OnPanic: func(any) { told.Add(1) }}
}

var (
	methods int
	told    atomic.Int64 // panics
)

func newCircuit(t *testing.T, sleep time.Duration) *circuit {
	t.Helper()
	methods++
	c := &circuit{T: t, name: breaker.NewHystrixScope().Name("client", "test", fmt.Sprintf("/a.B/C%d", methods))}
	cfg := hystrixConfig(c.name)
	cfg.SleepWindow = sleep
	h, err := breaker.NewHystrix(cfg, func(tr breaker.Transition) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.transitions = append(c.transitions, fmt.Sprintf("%v>%v %v", tr.From, tr.To, tr.Cause))
	})
	if err != nil {
		t.Fatal(err)
	}
	c.Hystrix, c.epoch = h, cfg.Epoch
	return c
}

func (c *circuit) now() time.Duration { return time.Since(c.epoch) }

func (c *circuit) until(what string, f func() bool) {
	c.Helper()
	for deadline := time.Now().Add(10 * time.Second); !f(); runtime.Gosched() {
		if time.Now().After(deadline) {
			c.Fatalf("not %s: %+v", what, c.Stats(c.now()))
		}
	}
}

// is waits until all is applied and expects a state, ours and hystrix-go's.
func (c *circuit) is(want breaker.State) {
	c.Helper()
	c.until("applied", c.Applied)
	if s := c.Stats(c.now()); s.State != want || c.foreign().IsOpen() != (want != closed) {
		c.Fatalf("%+v and hystrix-go open %v, want %v", s, c.foreign().IsOpen(), want)
	}
}

// foreign is the circuit as others find it.
func (c *circuit) foreign() *hystrix.CircuitBreaker {
	c.Helper()
	found, created, err := hystrix.GetCircuit(c.name)
	if created || err != nil {
		c.Fatalf("created %v: %v", created, err)
	}
	return found
}

func (c *circuit) begin(n int) []breaker.Ticket {
	c.Helper()
	tickets := make([]breaker.Ticket, n)
	for i := range tickets {
		t, _, ok := c.Acquire(c.now())
		if !ok {
			c.Fatal("rejected")
		}
		tickets[i] = t
	}
	return tickets
}

// end ends calls, no faster than hystrix-go takes it.
func (c *circuit) end(tickets []breaker.Ticket, r breaker.Result) {
	for i, t := range tickets {
		c.Done(t, c.now(), r, false)
		if i%100 == 99 {
			c.until("applied", c.Applied)
		}
	}
}

func (c *circuit) trip() {
	c.Helper()
	c.end(c.begin(20), failure)
	c.until("open", func() bool { return c.Stats(c.now()).State == open })
	c.is(open)
}

// probe waits for the sleep window to be over.
func (c *circuit) probe() breaker.Ticket {
	c.Helper()
	var t breaker.Ticket
	c.until("half-open", func() (ok bool) { t, _, ok = c.Acquire(c.now()); return ok })
	if !t.Probe() {
		c.Fatal("admitted without being a probe")
	}
	return t
}

func (c *circuit) saw(want ...string) {
	c.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if got := strings.Join(c.transitions, ", "); got != strings.Join(want, ", ") {
		c.Errorf("transitions %s, want %s", got, strings.Join(want, ", "))
	}
}

const (
	opens    = "closed>open error_percent"
	probes   = "open>half_open sleep_window"
	closes   = "half_open>closed probe_success"
	reopens  = "half_open>open probe_failure"
	thousand = 1000
)

// A thousand late successes and a thousand late failures around each transition.
func TestCase14_HystrixStaleResults(t *testing.T) {
	late := func(c *circuit, successes, failures []breaker.Ticket, want breaker.State) {
		c.Helper()
		c.end(successes, success)
		c.is(want)
		c.end(failures, failure)
		c.is(want)
	}
	t.Run("opening", func(t *testing.T) {
		c := newCircuit(t, time.Hour)
		successes, failures := c.begin(thousand), c.begin(thousand)
		c.trip()
		late(c, successes, failures, open)
		c.saw(opens)
	})
	t.Run("half-open", func(t *testing.T) {
		c := newCircuit(t, 30*time.Millisecond)
		successes, failures := c.begin(thousand), c.begin(thousand)
		c.trip()
		probe := c.probe()
		late(c, successes, failures, halfOpen)
		c.Done(probe, c.now(), success, false)
		c.is(closed)
		if s := c.Stats(c.now()); s.Requests != 1 || s.Failures != 0 {
			t.Errorf("%+v, want the probe alone", s)
		}
		c.saw(opens, probes, closes)
	})
	t.Run("closing", func(t *testing.T) {
		c := newCircuit(t, 30*time.Millisecond)
		successes, failures := c.begin(thousand), c.begin(thousand)
		c.trip()
		c.Done(c.probe(), c.now(), success, false)
		late(c, successes, failures, closed)
		if s := c.Stats(c.now()); s.Requests != 1 || s.Failures != 0 {
			t.Errorf("%+v, want the probe alone", s)
		}
		c.saw(opens, probes, closes)
	})
	t.Run("reopening", func(t *testing.T) {
		c := newCircuit(t, time.Millisecond)
		c.trip()
		var successes, failures []breaker.Ticket // of probes whose leases have expired
		for range 50 {
			successes, failures = append(successes, c.probe()), append(failures, c.probe())
		}
		c.Done(c.probe(), c.now(), failure, false)
		late(c, successes, failures, open)
		c.saw(opens, probes, reopens)
	})
}

// A guard looks for idle breakers under a lock.
func TestHystrixIdleTellsNobody(t *testing.T) {
	c := newCircuit(t, time.Hour)
	if !c.Idle(c.now()) {
		t.Error("a new one is not idle")
	}
	c.end(c.begin(20), failure)
	c.until("applied", c.Applied)
	if c.Idle(c.now()) {
		t.Error("idle with 20 failures")
	}
	c.saw()
	c.is(open)
	if c.Idle(c.now()) {
		t.Error("idle while open")
	}
	c.saw(opens)
}

func TestHystrixKeepsTheProbeOfACallThatAnotherGateRefuses(t *testing.T) {
	c := newCircuit(t, 30*time.Millisecond)
	c.trip()
	c.until("ready", func() bool { _, ok := c.Ready(c.now()); return ok })
	for range 10 { // ready for all who ask
		if _, ok := c.Ready(c.now()); !ok {
			t.Fatal("the probe is lost")
		}
		if s := c.Stats(c.now()); s.State != open || s.RetryAfter != 0 {
			t.Fatalf("%+v, want open, and a probe at once", s)
		}
	}
	probe, _, ok := c.Acquire(c.now())
	if !ok || !probe.Probe() {
		t.Fatal("no probe")
	}
	c.Done(probe, c.now(), success, false)
	c.is(closed)
}

func TestHystrixSleepsAfterAProbeThatWasGrantedLongAgo(t *testing.T) {
	const sleep = 200 * time.Millisecond
	c := newCircuit(t, sleep)
	c.trip()
	c.until("ready", func() bool { _, ok := c.Ready(c.now()); return ok })
	granted := c.now()
	c.until("old", func() bool { return c.now() > granted+sleep+10*time.Millisecond })
	before := c.now()
	c.Done(c.probe(), c.now(), breaker.Timeout, false)
	if _, d, ok := c.Acquire(c.now()); (ok || d == time.Millisecond) && c.now() < before+sleep {
		t.Errorf("admitted %v, retry after %v", ok, d)
	}
	c.saw(opens, probes, reopens)
}

// The sleep window after a probe counts from the probe, not from its grant.
func TestHystrixSleepsAfterAProbeThatWasGrantedEarlier(t *testing.T) {
	const sleep = 200 * time.Millisecond
	c := newCircuit(t, sleep)
	c.trip()
	c.until("ready", func() bool { _, ok := c.Ready(c.now()); return ok })
	granted := c.now()
	c.until("older", func() bool { return c.now() > granted+sleep/2 })
	first := c.now()
	c.Done(c.probe(), c.now(), failure, false)
	c.probe()
	if second := c.now(); second < first+sleep {
		t.Errorf("two probes within %v, the sleep window is %v", second-first, sleep)
	}
	c.saw(opens, probes, reopens, probes)
}

func TestCase11_HystrixProbeCancelledByItsCaller(t *testing.T) {
	c := newCircuit(t, 30*time.Millisecond)
	c.trip()
	c.Done(c.probe(), c.now(), breaker.Canceled, false)
	c.is(halfOpen)
	c.Done(c.probe(), c.now(), success, false) // after a sleep window
	c.is(closed)
	c.saw(opens, probes, closes)
}

func TestHystrixRejectionsSayWhenToComeBack(t *testing.T) {
	c := newCircuit(t, time.Hour)
	c.trip()
	for range 2 {
		ready, ok1 := c.Ready(c.now())
		acquire, _, ok2 := func() (time.Duration, breaker.Ticket, bool) { t, d, ok := c.Acquire(c.now()); return d, t, ok }()
		stats := c.Stats(c.now()).RetryAfter
		for _, d := range []time.Duration{ready, acquire, stats} {
			if ok1 || ok2 || d <= 59*time.Minute || d > time.Hour {
				t.Errorf("retry after %v, %v, %v; ready %v, acquired %v", ready, acquire, stats, ok1, ok2)
			}
		}
	}
}

func TestHystrixOthersChangeTheCircuit(t *testing.T) {
	t.Run("close", func(t *testing.T) {
		c := newCircuit(t, time.Hour)
		stale := c.begin(10)
		c.trip()
		if err := c.foreign().ReportEvent([]string{"success"}, time.Now(), 0); err != nil {
			t.Fatal(err)
		}
		if _, ok := c.Ready(c.now()); !ok {
			t.Error("rejected by a closed circuit")
		}
		c.end(stale, failure)
		c.is(closed)
	})
	t.Run("take the probe", func(t *testing.T) {
		c := newCircuit(t, 30*time.Millisecond)
		c.trip()
		c.until("granted", c.foreign().AllowRequest)
		if d, ok := c.Ready(c.now()); ok || d <= 0 {
			t.Errorf("ready %v, retry after %v", ok, d)
		}
		c.Done(c.probe(), c.now(), success, false)
		c.is(closed)
	})
	t.Run("open", func(t *testing.T) {
		c := newCircuit(t, time.Millisecond)
		c.end(c.begin(20), failure)
		c.until("open for others", c.foreign().IsOpen)
		before := c.now()
		c.until("a sleep window later", func() bool { return c.now() > before+3*time.Millisecond })
		c.Done(c.probe(), c.now(), success, false) // opens and probes at once
		c.is(closed)
		c.saw(opens, probes, closes)
	})
	t.Run("open before a success", func(t *testing.T) {
		c := newCircuit(t, time.Hour)
		stale := c.begin(1)[0]
		c.end(c.begin(20), failure)
		c.until("open for others", c.foreign().IsOpen)
		c.Done(stale, c.now(), success, false)
		c.is(open)
	})
	t.Run("flush", func(t *testing.T) {
		c := newCircuit(t, time.Hour)
		stale := c.begin(100)
		c.trip()
		hystrix.Flush()
		c.begin(1)
		c.is(closed)
		c.end(stale, failure)
		c.is(closed)
		c.trip()
		hystrix.Flush()
		if s := c.Stats(c.now()); s.State != closed {
			t.Errorf("%+v", s)
		}
	})
	t.Run("flush under way", func(t *testing.T) {
		c := newCircuit(t, time.Hour)
		stale := c.begin(100)
		hystrix.Flush()
		c.end(stale[:50], failure)
		c.is(closed)
		c.end(stale[50:], failure)
		c.is(closed)
		if s := c.Stats(c.now()); s.Requests != 0 {
			t.Errorf("%+v, want an empty window", s)
		}
		c.saw()
	})
}

// panicky is a logger of hystrix-go's that panics at a message. It is never
// replaced: hystrix-go reads its logger without a lock.
type panicky struct {
	at     atomic.Pointer[string]
	panics atomic.Int64
}

func (p *panicky) Printf(format string, _ ...any) {
	if at := p.at.Load(); at != nil && strings.Contains(format, *at) {
		p.panics.Add(1)
		panic(format)
	}
}

var logger = func() *panicky {
	p := new(panicky)
	hystrix.SetLogger(p)
	return p
}()

// A panic of hystrix-go's logger is kept from the calls, told, and does not wedge
// the circuit.
func TestCase17_HystrixLoggerPanics(t *testing.T) {
	defer logger.at.Store(nil)
	for _, at := range []string{"opening", "allowing", "closing"} {
		c, before := newCircuit(t, 30*time.Millisecond), logger.panics.Load()
		logger.at.Store(&at)
		told.Store(0)
		c.end(c.begin(20), failure)
		c.until("open", func() bool { return c.Stats(c.now()).State == open })
		c.until("closed", func() bool {
			if !c.Applied() {
				return false // calls are not to come faster than they are applied
			}
			if ticket, _, ok := c.Acquire(c.now()); ok {
				c.Done(ticket, c.now(), success, false)
			}
			if logger.panics.Load() > before {
				logger.at.Store(nil)
			}
			return c.Stats(c.now()).State == closed && !c.foreign().IsOpen()
		})
		if n := logger.panics.Load() - before; n == 0 || told.Load() == 0 || told.Load() > n { // at most one a section
			t.Errorf("%s: %d panics, told of %d", at, n, told.Load())
		}
		c.end(c.begin(1), success)
		c.is(closed)
	}
}

func TestHystrixOfOneNameIsOneCircuit(t *testing.T) {
	c := newCircuit(t, time.Hour)
	c.trip()
	again, err := breaker.NewHystrix(hystrixConfig(c.name), nil)
	if err != nil {
		t.Fatal(err)
	}
	if s := again.Stats(c.now()); s.State != open {
		t.Errorf("%+v, want what the other knows", s)
	}
}

func TestHystrixNames(t *testing.T) {
	a, b := breaker.NewHystrixScope(), breaker.NewHystrixScope()
	if a == b || b.Name("server", "", "/p.S/M") == a.Name("server", "", "/p.S/M") {
		t.Errorf("%v and %v are the same", a, b)
	}
	if got := breaker.HystrixScope(1).Name("client", "dns:///shop:443", "/p.S/M"); got != "grpc.client/dns:///shop:443/p.S/M" {
		t.Error(got)
	}
	if got := breaker.HystrixScope(2).Name("server", "", "/p.S/M"); got != "grpc2.server/p.S/M" {
		t.Error(got)
	}
}

// errMade is what becomes of a circuit that others have made before anybody
// listened to new ones.
var errMade = func() error {
	const name = "grpc.client/made/a.B/First"
	if _, _, err := hystrix.GetCircuit(name); err != nil {
		return nil
	}
	breaker.NewHystrixScope()
	_, err := breaker.NewHystrix(hystrixConfig(name), nil)
	return err
}()

func TestHystrixCircuitOfOthers(t *testing.T) {
	if errMade == nil {
		t.Error("no error: what hystrix-go applies to it is not heard")
	}
	late, _, _ := hystrix.GetCircuit("grpc.client/made/a.B/Second")
	if _, err := breaker.NewHystrix(hystrixConfig(late.Name), nil); err != nil {
		t.Error(err)
	}
}

// All at once, hystrix-go's other users too: nothing is stuck, and both agree.
func TestHystrixAllAtOnce(t *testing.T) {
	c := newCircuit(t, 2*time.Millisecond)
	stop, healthy := time.Now().Add(500*time.Millisecond), time.Now().Add(250*time.Millisecond)
	together(5, func(i int) {
		foreign := c.foreign()
		for n := 0; time.Now().Before(stop); n++ {
			if i == 0 {
				foreign.IsOpen()
				c.Idle(c.now())
				runtime.Gosched()
				continue
			}
			if _, ok := c.Ready(c.now()); !ok && n%3 == 0 {
				continue
			}
			ticket, _, ok := c.Acquire(c.now())
			if !ok {
				continue
			}
			r := []breaker.Result{success, breaker.Ignored, breaker.Canceled, breaker.Expired}[n%4]
			if time.Now().Before(healthy) && n%2 == 0 {
				r = []breaker.Result{failure, breaker.Timeout}[n/2%2]
			}
			c.Done(ticket, c.now(), r, false)
		}
	})
	c.until("closed", func() bool {
		if c.Stats(c.now()).State == closed && c.Applied() {
			return !c.foreign().IsOpen()
		}
		if ticket, _, ok := c.Acquire(c.now()); ok && ticket.Probe() {
			c.Done(ticket, c.now(), success, false)
		}
		return false
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.transitions) < 3 {
		t.Errorf("transitions %v: not all was tried", c.transitions)
	}
}
