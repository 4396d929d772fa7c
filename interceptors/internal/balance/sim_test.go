package balance

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/balancer/endpointsharding"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/resolver"
)

var (
	errDown = errors.New("down")
	errFull = errors.New("full")
	errLate = errors.New("late")
)

// sim makes calls through a real pool and picker, in a time of its own and without gRPC.
type sim struct {
	testing.TB
	now    time.Duration
	group  *Group
	pool   *pool
	picker *picker
	server map[string]server // who is READY
	list   []string
	last   string // who was picked last
	took   map[string]int
	errs   int
	calls  int
	ends   ends
	news   []string
}

type limitedError struct{ retryAfter time.Duration }

func (*limitedError) Error() string { return "limited" }

// server answers an attempt after a time.
type server func(now time.Duration) (time.Duration, error)

func takes(d time.Duration) server {
	return func(time.Duration) (time.Duration, error) { return d, nil }
}
func fails(err error) server {
	return func(time.Duration) (time.Duration, error) { return 100 * time.Microsecond, err }
}

type ending struct {
	at   time.Duration
	done func(balancer.DoneInfo)
	err  error
}

type ends []ending

func (e ends) Len() int           { return len(e) }
func (e ends) Less(i, j int) bool { return e[i].at < e[j].at }
func (e ends) Swap(i, j int)      { e[i], e[j] = e[j], e[i] }
func (e *ends) Push(x any)        { *e = append(*e, x.(ending)) }
func (e *ends) Pop() any {
	old := *e
	last := old[len(old)-1]
	*e = old[:len(old)-1]
	return last
}

// child is the pick_first of an endpoint.
type child struct {
	name string
	last *string
}

func (c child) Pick(balancer.PickInfo) (balancer.PickResult, error) {
	*c.last = c.name
	return balancer.PickResult{}, nil
}

func newSim(tb testing.TB, settings Settings, n int, s server) *sim {
	m := &sim{TB: tb, server: map[string]server{}, took: map[string]int{}}
	m.group = NewGroup(settings, Hooks{
		Now: func() time.Duration { return m.now },
		Judge: func(_ context.Context, _ string, err error, _ time.Duration) Verdict {
			switch err {
			case errDown, context.DeadlineExceeded:
				return Failure
			case errFull:
				return Shed
			case errLate:
				return Expired
			}
			return Neutral
		},
		Ejected: func(e Ejection) { m.news = append(m.news, fmt.Sprintf("%s %v %v", e.Address, e.Ejected, e.For)) },
		Limited: func(_ string, retryAfter time.Duration) error { return &limitedError{retryAfter} },
		Closed:  func() {},
	})
	m.pool = newPool(m.group, "sim")
	for i := range n {
		name := fmt.Sprintf("e%03d", i)
		m.list = append(m.list, name)
		m.server[name] = s
	}
	m.resolve(m.list...)
	return m
}

func (m *sim) resolve(names ...string) {
	m.list = names
	var es []resolver.Endpoint
	for _, name := range names {
		es = append(es, resolver.Endpoint{Addresses: []resolver.Address{{Addr: name}}})
	}
	m.pool.resolved(es)
	m.connect()
}

// connect makes a picker of who is in the list and has a server.
func (m *sim) connect() {
	var children []endpointsharding.ChildState
	for _, name := range m.list {
		if m.server[name] != nil {
			children = append(children, endpointsharding.ChildState{
				Endpoint: resolver.Endpoint{Addresses: []resolver.Address{{Addr: name}}},
				State:    balancer.State{ConnectivityState: connectivity.Ready, Picker: child{name: name, last: &m.last}},
			})
		}
	}
	m.picker = m.pool.connected(children)
}

func (m *sim) endpoint(name string) *endpoint {
	e, _ := m.pool.endpoints.Get(resolver.Endpoint{Addresses: []resolver.Address{{Addr: name}}})
	return e
}

// call makes one, which ends later.
func (m *sim) call(ctx context.Context) (name string, err error) {
	m.calls++
	r, err := m.picker.Pick(balancer.PickInfo{Ctx: ctx, FullMethodName: "/s/m"})
	if err != nil {
		m.errs++
		return "", err
	}
	name = m.last
	m.took[name]++
	d, err := m.server[name](m.now)
	if d >= time.Second { // the caller's deadline
		d, err = time.Second, context.DeadlineExceeded
	}
	heap.Push(&m.ends, ending{at: m.now + d, done: r.Done, err: err})
	return name, nil
}

// run makes calls for a time.
func (m *sim) run(every, during time.Duration) {
	for end := m.now + during; m.now < end; {
		m.until(m.now + every)
		_, _ = m.call(context.Background())
	}
}

// until lets time pass.
func (m *sim) until(t time.Duration) {
	for len(m.ends) > 0 && m.ends[0].at <= t {
		e := heap.Pop(&m.ends).(ending)
		m.now = e.at
		if e.err != nil {
			m.errs++
		}
		e.done(balancer.DoneInfo{Err: e.err, BytesSent: true, BytesReceived: true})
	}
	m.now = t
}

// reset begins to count anew.
func (m *sim) reset() { m.took, m.errs, m.calls = map[string]int{}, 0, 0 }

func (m *sim) share(name string) float64 { return float64(m.took[name]) / float64(m.calls) }

func (m *sim) wantShare(name string, least, most float64) {
	m.Helper()
	if got := m.share(name); got < least || got > most {
		m.Errorf("at %v %s had %.4f of the calls, want %v to %v", m.now, name, got, least, most)
	}
}
