package migration

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/afex/hystrix-go/hystrix"
	metricCollector "github.com/afex/hystrix-go/hystrix/metric_collector"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/ratelimit"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// minute is a hystrix-go timeout or sleep window that no test outlives, in its
// milliseconds.
const minute = 60_000

var commands atomic.Int64

// command configures a hystrix-go command of a name that no other test has. A
// timeout of 0 is a minute.
func command(t *testing.T, cfg hystrix.CommandConfig) string {
	t.Helper()
	if cfg.Timeout == 0 {
		cfg.Timeout = minute
	}
	name := fmt.Sprintf("command-%d", commands.Add(1))
	hystrix.ConfigureCommand(name, cfg)
	return name
}

// openCircuit returns the name of a circuit that stays open.
func openCircuit(t *testing.T) string {
	t.Helper()
	name := command(t, hystrix.CommandConfig{RequestVolumeThreshold: 1, ErrorPercentThreshold: 1, SleepWindow: minute})
	want(t, "the failure", hystrix.DoC(t.Context(), name, fail, nil), errDown)
	opened(t, name)
	return name
}

// opened waits until hystrix-go has digested what opens a circuit.
func opened(t *testing.T, name string) *hystrix.CircuitBreaker {
	t.Helper()
	circuit, _, err := hystrix.GetCircuit(name)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the circuit opens", circuit.IsOpen)
	return circuit
}

// results are what hystrix-go has told its metric collectors.
var results struct {
	sync.Mutex
	of map[string][]metricCollector.MetricResult
}

// collector is a metric collector of one circuit.
type collector string

var _ = func() bool {
	metricCollector.Registry.Register(func(name string) metricCollector.MetricCollector { return collector(name) })
	return true
}()

// held is by the name of a circuit what its Update waits for, a chan struct{}.
var held sync.Map

func (c collector) Update(r metricCollector.MetricResult) {
	if end, ok := held.Load(string(c)); ok {
		<-end.(chan struct{})
	}
	results.Lock()
	defer results.Unlock()
	if results.of == nil {
		results.of = map[string][]metricCollector.MetricResult{}
	}
	results.of[string(c)] = append(results.of[string(c)], r)
}

func (collector) Reset() {}

// reported returns what hystrix-go has made of the one call of a command.
func reported(t *testing.T, name string) (r metricCollector.MetricResult) {
	t.Helper()
	eventually(t, "hystrix-go reports the call", func() bool {
		results.Lock()
		defer results.Unlock()
		if len(results.of[name]) == 0 {
			return false
		}
		r = results.of[name][0]
		return true
	})
	return r
}

// quota is a limiter for go-grpc-middleware: so many calls, then no more.
type quota struct{ left atomic.Int64 }

var (
	_        ratelimit.Limiter = (*quota)(nil)
	errQuota                   = errors.New("the day's quota is spent")
)

// externalQuota is the limiter of the policies that name one.
func externalQuota(n int64) interceptors.Option {
	return interceptors.WithLimiter("quota", newQuota(n))
}

func newQuota(n int64) *quota {
	q := new(quota)
	q.left.Store(n)
	return q
}

func (q *quota) Limit(context.Context) error {
	if q.left.Add(-1) < 0 {
		return errQuota
	}
	return nil
}
