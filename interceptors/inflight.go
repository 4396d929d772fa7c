package interceptors

import (
	"context"
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

// record is one call in flight, or none. Its fields are atomic because a drain
// reads them while calls come and go; a reader that meets a record between two
// calls may see the peer of the one with the method of the other.
type record struct {
	pool   *sync.Pool
	active atomic.Bool
	start  atomic.Int64 // time.Duration on the guard's clock
	method atomic.Pointer[string]
	peer   atomic.Pointer[peer.Peer]
}

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
	p, _ := peer.FromContext(ctx)
	r.peer.Store(p)
	r.method.Store(method)
	r.start.Store(int64(now))
	r.active.Store(true)
	return r
}

func (r *record) end() {
	r.active.Store(false)
	r.pool.Put(r)
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
		r := p.Value()
		if r == nil || !r.active.Load() {
			continue
		}
		c := runningCall{method: *r.method.Load(), age: now - time.Duration(r.start.Load()), peer: "unknown"}
		if p := r.peer.Load(); p != nil && p.Addr != nil {
			c.peer = p.Addr.String()
		}
		calls = append(calls, c)
	}
	return calls
}

// count is the number of calls in flight.
func (f *inflight) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, p := range f.all {
		if r := p.Value(); r != nil && r.active.Load() {
			n++
		}
	}
	return n
}
