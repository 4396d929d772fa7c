package interceptors

import (
	"context"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	"google.golang.org/grpc/peer"
)

// inflight knows the calls that a server is handling, so that a drain can name
// those it cuts. A call takes a record from a pool and gives it back: no lock
// and no allocation. Each record is entered once, when it is allocated, in a
// list of weak pointers, so the collector may still empty the pool.
type inflight struct {
	pool sync.Pool

	mu  sync.Mutex
	all []weak.Pointer[record] // guarded by mu
}

// record is one call in flight, or none. Its plain fields belong to the call
// while idle, and to a drain while reading; between the two they do not change.
type record struct {
	pool   *sync.Pool
	state  atomic.Int32
	start  time.Duration // on the guard's clock
	method *string
	peer   *peer.Peer
}

// The states of a record. A call goes from idle to active and back, two atomic
// operations; a drain from active to reading and back.
const (
	idle int32 = iota
	active
	reading
)

// runningCall is a call in flight as a drain reports it.
type runningCall struct {
	method string
	age    time.Duration
	peer   string
}

func (f *inflight) begin(ctx context.Context, method *string, now time.Duration) *record {
	r, _ := f.pool.Get().(*record)
	if r == nil {
		r = &record{pool: &f.pool}
		f.enter(r)
	}
	r.peer, _ = peer.FromContext(ctx)
	r.method, r.start = method, now
	r.state.Store(active)
	return r
}

func (r *record) end() {
	for !r.state.CompareAndSwap(active, idle) {
		runtime.Gosched() // a drain is reading: a matter of nanoseconds
	}
	r.pool.Put(r)
}

// read returns the call that a record is of, if it is of one.
func (r *record) read(now time.Duration) (runningCall, bool) {
	if !r.state.CompareAndSwap(active, reading) {
		return runningCall{}, false
	}
	c := runningCall{method: *r.method, age: now - r.start, peer: "unknown"}
	p := r.peer
	r.state.Store(active)
	if p != nil && p.Addr != nil {
		c.peer = p.Addr.String()
	}
	return c, true
}

// enter appends a new record, and drops those that were collected whenever the
// list would have to grow.
func (f *inflight) enter(r *record) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.all) == cap(f.all) {
		f.all = slices.DeleteFunc(f.all, func(p weak.Pointer[record]) bool { return p.Value() == nil })
	}
	f.all = append(f.all, weak.Make(r))
}

// running lists the calls in flight, in no order.
func (f *inflight) running(now time.Duration) []runningCall {
	f.mu.Lock()
	defer f.mu.Unlock()
	var calls []runningCall
	for _, p := range f.all {
		if r := p.Value(); r != nil {
			if c, ok := r.read(now); ok {
				calls = append(calls, c)
			}
		}
	}
	return calls
}

// count is the number of calls in flight.
func (f *inflight) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, p := range f.all {
		if r := p.Value(); r != nil && r.state.Load() != idle {
			n++
		}
	}
	return n
}
