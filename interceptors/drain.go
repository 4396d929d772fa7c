package interceptors

import (
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/policy"
	"github.com/grpc-resilience/grpc-resilience/interceptors/supervise"
)

// phase is how far a drain has come. It only ever grows.
type phase int32

const (
	serving    phase = iota
	announcing       // health says NOT_SERVING, everything is served
	graceful         // GOAWAY is out, streams are asked to end
	cutting          // what still runs is cancelled
	stopped
)

// String returns the name that Snapshot shows.
func (p phase) String() string {
	return [...]string{"serving", "announce", "grace", "cut", "stopped"}[p]
}

// drain is the state of a guard's drain. The steps themselves are in serve.go.
type drain struct {
	policy   atomic.Pointer[policy.Drain]
	current  atomic.Int32
	asked    chan struct{} // closed by Drain, and when a drain begins
	draining chan struct{} // closed when grace begins
	askOnce  sync.Once

	mu        sync.Mutex              // guards the fields below, and changes of current
	began     time.Duration           // when announcing was entered
	watches   map[*watchStream]bool   // health Watch streams
	listeners []listening             // of Serve
	workers   []*supervise.Supervisor // of Serve's listeners

	servers atomic.Int32 // that Serve or Shutdown has not ended
	told    sync.Map     // of servers: those with calls whose status a cut has begun to write
}

func (d *drain) init(p policy.Drain) {
	d.policy.Store(&p)
	d.asked = make(chan struct{})
	d.draining = make(chan struct{})
	d.watches = map[*watchStream]bool{}
}

// Drain asks Serve to drain and returns at once. It may be called from a
// handler, before Serve (which then drains as soon as it serves), and again.
func (g *Guard) Drain() {
	if g != nil {
		g.drain.ask()
	}
}

func (d *drain) ask() { d.askOnce.Do(func() { close(d.asked) }) }

// Draining returns a channel that is closed when the grace phase begins: the
// sign for long streams to end themselves. On a nil guard it is nil.
func (g *Guard) Draining() <-chan struct{} {
	if g == nil {
		return nil
	}
	return g.drain.draining
}

func (d *drain) phase() phase { return phase(d.current.Load()) }

// supervisors are those of Serve's listeners.
func (d *drain) supervisors() []*supervise.Supervisor {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.workers)
}

// age is how long ago the drain began: with another server, perhaps.
func (d *drain) age(now time.Duration) time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	return now - d.began
}

// advance enters a phase, tells the health watchers of it, and reports whether
// it was news: several servers may be drained on one guard.
func (d *drain) advance(to phase, now time.Duration) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	from := d.phase()
	if to <= from {
		return false
	}
	d.current.Store(int32(to))
	d.ask()
	if from == serving {
		d.began = now
	}
	if from < graceful && to >= graceful {
		close(d.draining)
	}
	for w := range d.watches {
		// Not in line: a watcher that does not read must not hold the others up.
		if to == announcing {
			go w.tell()
		} else {
			go w.end()
		}
	}
	return true
}

// watch wraps a health Watch stream so that it learns of the drain.
func (d *drain) watch(s *serverStream) *watchStream {
	w := &watchStream{serverStream: s, drain: d, sending: make(chan struct{}, 1)}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.watches[w] = true
	if d.phase() >= graceful {
		go w.end()
	}
	return w
}

func (d *drain) unwatch(w *watchStream) {
	d.mu.Lock()
	delete(d.watches, w)
	telling := d.phase() > serving
	d.mu.Unlock()
	if telling {
		_ = w.lock() // for good: the stream must not be used once its handler has ended
	}
}

// watchStream is a health Watch. Whatever health service is registered, a drain
// makes it say NOT_SERVING, and ends it when grace begins: one that stays open
// would block GracefulStop.
type watchStream struct {
	*serverStream
	drain *drain

	// sending holds a value while SendMsg runs, which is not safe for concurrent
	// use. Not a mutex: it may take as long as the watcher does not read.
	sending chan struct{}
	told    bool // guarded by sending: NOT_SERVING has been sent for the drain
}

// SendMsg sends the service's own answer, in a drain NOT_SERVING, once.
func (w *watchStream) SendMsg(m any) error {
	if err := w.lock(); err != nil {
		return err
	}
	defer w.unlock()
	if w.drain.phase() == serving {
		return w.serverStream.SendMsg(m)
	}
	if _, ok := m.(*healthpb.HealthCheckResponse); !ok {
		return w.serverStream.SendMsg(m) // not the health service we know
	}
	return w.tellLocked()
}

func (w *watchStream) tell() {
	defer func() { _ = recover() }() // of a codec, or an interceptor further out
	if w.lock() == nil {
		defer w.unlock()
		_ = w.tellLocked() // fails only if the watcher is gone
	}
}

func (w *watchStream) lock() error {
	select {
	case w.sending <- struct{}{}:
		return nil
	case <-w.Context().Done():
		return status.FromContextError(w.Context().Err()).Err()
	}
}

func (w *watchStream) unlock() { <-w.sending }

func (w *watchStream) tellLocked() error {
	if w.told {
		return status.FromContextError(w.Context().Err()).Err() // nil while the stream lives
	}
	w.told = true
	return w.serverStream.SendMsg(&healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_NOT_SERVING})
}

func (w *watchStream) end() {
	w.wire.end(w.ServerStream.Context(), status.New(codes.Unavailable, "the server is draining"))
}

const (
	healthService = "grpc.health.v1.Health"
	healthWatch   = "/" + healthService + "/Watch"
)

func isHealth(method string) bool { return strings.HasPrefix(method, "/"+healthService+"/") }

// answer returns what the client gets for a handler's response: in a drain,
// health is NOT_SERVING.
func (g *Guard) answer(method string, resp any) any {
	if g.drain.phase() == serving || !isHealth(method) {
		return resp
	}
	const down = healthpb.HealthCheckResponse_NOT_SERVING
	switch r := resp.(type) {
	case *healthpb.HealthCheckResponse:
		return &healthpb.HealthCheckResponse{Status: down}
	case *healthpb.HealthListResponse:
		all := &healthpb.HealthListResponse{Statuses: map[string]*healthpb.HealthCheckResponse{}}
		for service := range r.GetStatuses() {
			all.Statuses[service] = &healthpb.HealthCheckResponse{Status: down}
		}
		return all
	}
	return resp
}
