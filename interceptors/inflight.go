package interceptors

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// inflight knows the calls that a server is handling, so that a drain can name
// and end those it cuts. A call takes a record from a pool and gives it back: no lock
// and no allocation. Each record is entered once, when it is allocated, in a
// list of weak pointers, so the collector may still empty the pool.
type inflight struct {
	pool sync.Pool

	mu  sync.Mutex
	all []weak.Pointer[record] // guarded by mu
}

// record is one call in flight, or none. Its plain fields belong to the call
// while idle, and to a drain while taken; between the two they do not change.
type record struct {
	pool   *sync.Pool
	state  atomic.Int32
	held   sync.Mutex    // by the drain that has taken it
	start  time.Duration // on the guard's clock
	method *string
	ctx    context.Context
	wire   *wire // of a stream
	cut    bool  // by a drain, which has named it
}

// The states of a record. A call goes from idle to active and back, two atomic
// operations; a drain from active to taken and back. While it is taken, the call
// cannot end: a unary one that did would send its answer.
const (
	idle int32 = iota
	active
	taken
)

// runningCall is a call in flight as a drain reports it.
type runningCall struct {
	method string
	age    time.Duration
	peer   string
}

// begin enters a call; w is nil for a unary one.
func (f *inflight) begin(ctx context.Context, method *string, now time.Duration, w *wire) *record {
	r, _ := f.pool.Get().(*record)
	if r == nil {
		r = &record{pool: &f.pool}
		f.enter(r)
	}
	r.ctx, r.method, r.start, r.wire, r.cut = ctx, method, now, w, false
	r.state.Store(active)
	return r
}

func (r *record) end() {
	if !r.state.CompareAndSwap(active, idle) {
		r.held.Lock() // a drain reads it, or writes its status
		r.state.Store(idle)
		r.held.Unlock()
	}
	r.ctx, r.wire = nil, nil // which the pool would keep
	r.pool.Put(r)
}

// call describes the call of a record that is taken.
func (r *record) call(now time.Duration) runningCall {
	c := runningCall{method: *r.method, age: now - r.start, peer: "unknown"}
	if p, ok := peer.FromContext(r.ctx); ok && p.Addr != nil {
		c.peer = p.Addr.String()
	}
	return c
}

// writeStatus writes the status of a call whose record is taken.
func (r *record) writeStatus(st *status.Status) {
	if r.wire != nil {
		r.wire.end(r.ctx, st)
	} else {
		writeStatus(r.ctx, st)
	}
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

// take reports whether a record is of a call in flight which is now the drain's.
func (r *record) take() bool {
	if !r.held.TryLock() {
		return false // it is another drain's, or has just been
	}
	if !r.state.CompareAndSwap(active, taken) {
		r.held.Unlock()
		return false
	}
	return true
}

func (r *record) giveBack() {
	r.state.Store(active)
	r.held.Unlock()
}

// each takes the records of the calls in flight, one after the other, in no order.
// If visit keeps one, it has to give it back later; it must not block.
func (f *inflight) each(visit func(r *record) (keep bool)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.all {
		if r := p.Value(); r != nil && r.take() && !visit(r) {
			r.giveBack()
		}
	}
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
