package breaker

import (
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	metriccollector "github.com/afex/hystrix-go/hystrix/metric_collector"
	"github.com/afex/hystrix-go/hystrix/rolling"
)

// HystrixScope is the name space of a guard in hystrix-go's registry, which is
// the process's.
type HystrixScope uint64

var (
	scopes atomic.Uint64
	feeds  sync.Map // of *feed, by circuit; filled by hystrix-go under its locks, so no lock of ours
	listen = sync.OnceFunc(func() { metriccollector.Registry.Register(newFeed) })
)

// NewHystrixScope returns a name space that no other has. Circuits that are made
// from now on tell us what they apply.
func NewHystrixScope() HystrixScope {
	listen()
	return HystrixScope(scopes.Add(1))
}

const namePrefix = "grpc"

// Name is that of a method's circuit: "grpc.client/TARGET/pkg.Service/Method",
// "grpc.server/pkg.Service/Method", with grpc2 in place of grpc in the second
// scope, and so on.
func (s HystrixScope) Name(side, target, method string) string {
	number := ""
	if s > 1 {
		number = strconv.FormatUint(uint64(s), 10)
	}
	if target != "" {
		target = "/" + target
	}
	return namePrefix + number + "." + side + target + method
}

// feed hears what hystrix-go applies to a circuit, beside its own collector: the
// same numbers, which that one does not show.
type feed struct {
	applied, resets atomic.Uint64

	mu               sync.Mutex // guards the pointers
	requests, errors *rolling.Number
}

func newFeed(name string) metriccollector.MetricCollector {
	if !strings.HasPrefix(name, namePrefix) {
		return deaf{}
	}
	f := new(feed)
	f.Reset()
	feeds.Store(name, f)
	return f
}

func feedOf(name string) *feed {
	f, _ := feeds.Load(name)
	found, _ := f.(*feed)
	return found
}

// Update implements metriccollector.MetricCollector.
func (f *feed) Update(r metriccollector.MetricResult) {
	f.mu.Lock()
	f.requests.Increment(r.Attempts)
	f.errors.Increment(r.Errors)
	f.mu.Unlock()
	f.applied.Add(1)
}

// Reset implements metriccollector.MetricCollector.
func (f *feed) Reset() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.requests, f.errors = rolling.NewNumber(), rolling.NewNumber()
	f.resets.Add(1)
}

func (f *feed) sums() (requests, errors int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	return int(f.requests.Sum(now)), int(f.errors.Sum(now))
}

// deaf is for the circuits of others.
type deaf struct{}

func (deaf) Update(metriccollector.MetricResult) {}
func (deaf) Reset()                              {}
