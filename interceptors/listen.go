package interceptors

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"google.golang.org/grpc"

	"github.com/grpc-resilience/grpc-resilience/interceptors/supervise"
)

// acceptBackoff is how long a listener whose Accept failed is left alone. Meanwhile
// the system lets clients connect, and nobody talks to them: so it is short, and one
// that fails at once is given up after 1.3 to 3.8 s (supervise's 5 restarts).
var acceptBackoff = supervise.Backoff{Initial: 100 * time.Millisecond, Max: time.Second}

// errAcceptPanicked stands for what an Accept that panicked would have returned.
var errAcceptPanicked = errors.New("Accept panicked")

// listeners are those of one Serve. Each has a worker, in which gRPC serves it: if
// Accept fails it is tried again; if it was closed, which is for good, or fails on and
// on, it is given up.
type listeners struct {
	srv     *grpc.Server
	all     []*listener
	journal *journal
	workers *supervise.Supervisor
	asked   <-chan struct{} // closed when a drain begins: nothing is tried again
	failed  chan error      // gets why the first listener was given up
	stopped chan error      // gets what gRPC returns when somebody else has stopped srv
	closing atomic.Bool     // the drain closes them: what they say is no failure
}

// listener is a listener as gRPC sees it.
type listener struct {
	net.Listener
	name string

	broken atomic.Bool // the last Accept has failed
	closed atomic.Bool // by the drain, or by gRPC for a stop

	mu  sync.Mutex
	err error // of the last run; nil while it is served; guarded by mu
}

// newListeners returns a server's listeners, which are not served yet.
func (g *Guard) newListeners(srv *grpc.Server, lis []net.Listener) (*listeners, error) {
	ls := &listeners{srv: srv, journal: g.newJournal(), asked: g.drain.asked, failed: make(chan error, 1), stopped: make(chan error, len(lis))}
	var err error
	ls.workers, err = supervise.New(
		supervise.WithLogger(ls.journal.logger()),
		supervise.WithMeterProvider(g.opts.meter),
		supervise.WithBackoff(acceptBackoff),
		supervise.WithDraining(ls.asked),
		supervise.WithEscalation(ls.giveUp),
	)
	if err != nil {
		ls.journal.close()
		return nil, fmt.Errorf("interceptors: Serve: %w", err)
	}
	for _, l := range lis {
		ls.all = append(ls.all, &listener{Listener: l, name: ls.nameOf(l)})
	}
	return ls, nil
}

// nameOf names a listener's worker, so that supervise takes the name.
func (ls *listeners) nameOf(l net.Listener) string {
	const most = 90
	name := fmt.Sprintf("listener %s %s", l.Addr().Network(), l.Addr())
	runes := []rune(strings.ToValidUTF8(name, "?"))
	for i, r := range runes {
		if !unicode.IsPrint(r) {
			runes[i] = '?'
		}
	}
	base := string(runes[:min(len(runes), most)])
	name = base
	for n := 2; slices.ContainsFunc(ls.all, func(other *listener) bool { return other.name == name }); n++ {
		name = fmt.Sprintf("%s #%d", base, n)
	}
	return name
}

// start serves them.
func (ls *listeners) start() {
	for _, l := range ls.all {
		err := ls.workers.Add(supervise.Worker{
			Name: l.name,
			Kind: supervise.Transient,
			Run:  func(context.Context) error { return ls.serve(l) },
			// As long as the context of stop: gRPC's Serve may wait for handlers.
			StopTimeout: 1<<63 - 1,
		})
		if err != nil {
			ls.giveUp(err)
		}
	}
}

func (ls *listeners) giveUp(err error) {
	select {
	case ls.failed <- err:
	default: // not the first
	}
}

// serve is one run of a listener's worker.
func (ls *listeners) serve(l *listener) (err error) {
	l.ended(nil)
	err = errAcceptPanicked
	defer func() {
		l.ended(err)
		if err != nil && ls.draining() {
			_ = l.close() // clients are to be refused, not to wait
		}
	}()
	switch err := ls.srv.Serve(l); {
	case err == nil, errors.Is(err, grpc.ErrServerStopped), ls.closing.Load():
		ls.stopped <- err
		return nil
	case errors.Is(err, net.ErrClosed):
		return final{err}
	default:
		return err
	}
}

// final is an error that a restart cannot help.
type final struct{ error }

func (f final) Unwrap() []error { return []error{supervise.ErrEscalate, f.error} }

// serving is the number of listeners that are being served.
func (ls *listeners) serving() int {
	n := 0
	for _, w := range ls.workers.Snapshot() {
		if w.State == supervise.Running {
			n++
		}
	}
	return n
}

func (ls *listeners) draining() bool {
	select {
	case <-ls.asked:
		return true
	default:
		return false
	}
}

// closeFailed closes those that wait to be tried again, when a drain has begun.
func (ls *listeners) closeFailed() {
	for _, l := range ls.all {
		if l.failure() != nil {
			_ = l.close()
		}
	}
}

// stop closes them, and waits until nothing is accepted any more: at once, or up to 1s
// later if gRPC waits after a temporary error; or, when somebody else stops srv at the
// same time, until that has ended. The end of ctx ends the wait.
func (ls *listeners) stop(ctx context.Context) {
	ls.closing.Store(true)
	for _, l := range ls.all {
		_ = l.close() // fails if it was closed
	}
	_ = ls.workers.Stop(ctx) // what there is to tell is in err
}

// err is what was wrong with the listeners at the end.
func (ls *listeners) err() error {
	var errs []error
	for _, l := range ls.all {
		if err := l.failure(); err != nil {
			errs = append(errs, fmt.Errorf("interceptors: Serve: %s: %w", l.name, err))
		}
	}
	return errors.Join(errs...)
}

// Accept notes whether it fails, also by a panic.
func (l *listener) Accept() (net.Conn, error) {
	l.broken.Store(false) // a Close meanwhile must end it
	failed := true
	defer func() { l.broken.Store(failed) }()
	c, err := l.Listener.Accept()
	failed = err != nil
	return c, err
}

// Close is called by gRPC when its server is stopped, and when Accept has failed:
// then it does nothing, because the listener may be tried again.
func (l *listener) Close() error {
	if l.broken.Load() {
		return nil
	}
	return l.close()
}

// close closes the listener, once.
func (l *listener) close() error {
	if l.closed.Swap(true) {
		return nil
	}
	return l.Listener.Close()
}

// ended notes how a run ended.
func (l *listener) ended(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = err
}

func (l *listener) failure() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}
