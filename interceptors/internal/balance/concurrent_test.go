package balance

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/balancer/endpointsharding"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/resolver"
)

// Calls, streams and retries go on while addresses, connections and settings change. Every
// pick succeeds or is limited, and at the end nothing is in flight.
func TestConcurrent(t *testing.T) {
	m := newSim(t, ejecting(), 0, nil)
	began := time.Now()
	m.group.hooks.Now = func() time.Duration { return 20 * time.Since(began) } // windows and sleeps pass
	m.group.hooks.Ejected = func(Ejection) {}
	var all []*endpoint
	seen := map[*endpoint]bool{}
	var current atomic.Pointer[picker]
	change := func() {
		var list []resolver.Endpoint
		var children []endpointsharding.ChildState
		for i := range 12 {
			r := resolver.Endpoint{Addresses: []resolver.Address{{Addr: fmt.Sprintf("e%d", i)}}}
			if i > 0 && rand.IntN(4) == 0 {
				continue
			}
			if list = append(list, r); i == 0 || rand.IntN(4) > 0 {
				children = append(children, endpointsharding.ChildState{Endpoint: r, State: balancer.State{ConnectivityState: connectivity.Ready, Picker: anyone{}}})
			}
		}
		m.pool.resolved(list)
		current.Store(m.pool.connected(children))
		for _, e := range m.pool.endpoints.All() {
			if !seen[e] {
				seen[e], all = true, append(all, e)
			}
		}
	}
	change()
	stop := make(chan struct{})
	var calls, changes sync.WaitGroup
	changes.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			change()
			s := ejecting()
			switch rand.IntN(4) {
			case 0:
				s.Breaker = nil
			case 1:
				s.Rate = &Rate{PerSecond: float64(1 + rand.IntN(100_000)), Burst: 1 + rand.IntN(100)}
			case 2:
				s.MaxEjectionPercent, s.PanicThreshold, s.Breaker.Consecutive = 100, 0, 1
			}
			m.group.Set(s)
			m.group.Stats()
			time.Sleep(time.Millisecond)
		}
	})
	for range 4 {
		calls.Go(func() {
			var open []func(balancer.DoneInfo)
			end := func() {
				i := rand.IntN(len(open))
				info := balancer.DoneInfo{BytesSent: true, BytesReceived: true}
				switch rand.IntN(4) {
				case 0:
					info.Err = errDown
				case 1:
					info.Err = errFull
				case 2:
					info.Err = context.Canceled
				}
				open[i](info)
				open[i] = open[len(open)-1]
				open = open[:len(open)-1]
			}
			for range 20_000 {
				ctx := context.Background()
				switch rand.IntN(3) {
				case 0:
					ctx = NewRetried(ctx)
				case 1:
					ctx = NewStream(ctx, rand.IntN(2) == 0)
				}
				r, err := current.Load().Pick(balancer.PickInfo{Ctx: ctx})
				if _, limited := err.(*limitedError); err != nil && !limited {
					t.Error(err)
				}
				if err == nil {
					open = append(open, r.Done)
				}
				for len(open) > 20 {
					end()
				}
				if c := callOf(ctx); c != nil && rand.IntN(2) == 0 {
					c.Ended(errDown)
				}
			}
			for len(open) > 0 {
				end()
			}
		})
	}
	calls.Wait()
	close(stop)
	changes.Wait()
	for _, e := range all {
		if n := e.inFlight.Load(); n != 0 {
			t.Errorf("%s has %d in flight", e.address, n)
		}
	}
	m.group.Set(ejecting())
	if n, most := len(m.ejected()), m.pool.endpoints.Len()/2; n > most {
		t.Errorf("%d are ejected, want at most %d", n, most)
	}
}

// anyone is the picker of an endpoint, for several goroutines.
type anyone struct{}

func (anyone) Pick(balancer.PickInfo) (balancer.PickResult, error) {
	return balancer.PickResult{}, nil
}
