package breaker_test

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	metriccollector "github.com/afex/hystrix-go/hystrix/metric_collector"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
)

// again makes another Hystrix of the circuit's name, with another sleep window.
func (c *circuit) again(sleep time.Duration) {
	c.Helper()
	cfg := hystrixConfig(c.name)
	cfg.SleepWindow = sleep
	if _, err := breaker.NewHystrix(cfg, nil); err != nil {
		c.Error(err)
	}
}

// Who comes back to the name sets the sleep window of a circuit that sleeps, also after
// a probe that failed.
func TestHystrixSleepsAsLongAsItIsToldLast(t *testing.T) {
	c := newCircuit(t, time.Hour)
	c.trip()
	c.again(time.Minute)
	if _, d, ok := c.Acquire(c.now()); ok || d > time.Minute || d < 30*time.Second {
		t.Errorf("admitted %v, retry after %v", ok, d)
	}
	c.again(time.Millisecond)
	c.until("granted", func() bool { _, ok := c.Ready(c.now()); return ok })
	c.again(time.Hour)
	c.Done(c.probe(), c.now(), failure, false)
	if _, d, ok := c.Acquire(c.now()); ok || d < 30*time.Minute {
		t.Errorf("admitted %v, retry after %v", ok, d)
	}
	c.again(time.Millisecond)
	if d := c.Stats(c.now()).RetryAfter; d > time.Millisecond {
		t.Errorf("retry after %v", d)
	}
	c.Done(c.probe(), c.now(), success, false)
	c.is(closed)
	c.saw(opens, probes, reopens, probes, closes)
}

// stuck is a circuit whose collector waits when it is reset, until it is released.
type stuck struct {
	name    string
	waits   atomic.Bool
	release chan struct{}
}

var (
	sticks        atomic.Pointer[stuck]
	registerStuck = sync.OnceFunc(func() {
		metriccollector.Registry.Register(func(name string) metriccollector.MetricCollector { return sticky(name) })
	})
)

// sticky is the collector of a circuit.
type sticky string

func (sticky) Update(metriccollector.MetricResult) {}

func (s sticky) Reset() {
	if at := sticks.Load(); at != nil && at.name == string(s) {
		at.waits.Store(true)
		<-at.release
	}
}

// Foreign code that hystrix-go waits for holds up nobody who comes back to the name,
// or to others: they may hold a lock that it wants.
func TestHystrixIsMadeAgainWhileForeignCodeRuns(t *testing.T) {
	registerStuck()
	c := newCircuit(t, time.Millisecond)
	c.trip()
	at := &stuck{name: c.name, release: make(chan struct{})}
	sticks.Store(at)
	ticket, ended := c.probe(), make(chan struct{})
	go func() {
		defer close(ended)
		c.Done(ticket, c.now(), success, false) // a timer closes it, if hystrix-go's queue is not empty
	}()
	c.until("stuck", at.waits.Load)
	made := make(chan struct{})
	go func() {
		defer close(made)
		c.again(time.Hour)
		newCircuit(t, time.Hour)
	}()
	select {
	case <-made:
	case <-time.After(10 * time.Second):
		t.Error("it waits")
	}
	sticks.Store(nil)
	close(at.release)
	<-ended
	<-made
	c.is(closed)
}
