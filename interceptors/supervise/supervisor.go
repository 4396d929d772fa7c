package supervise

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"go.opentelemetry.io/otel/metric"
)

// Supervisor runs workers. Make it with New and end it with Stop or Run; all
// methods are safe for concurrent use. It has one goroutine for each worker that
// runs and none besides, not for a worker that backs off either.
//
// On a nil *Supervisor (the error of New was ignored) methods return an error or
// do nothing.
type Supervisor struct {
	opts         *options
	registration metric.Registration // of the metrics

	escalated  chan struct{} // closed by the first escalation
	escalation error         // what it was
	once       sync.Once     // closes escalated

	stopped chan struct{} // closed when Stop has ended
	stopErr error         // what it returned

	mu       sync.Mutex
	stopping bool
	workers  []*worker // in the order of Add; no more come when stopping
}

// ErrStopped is returned by Add when Stop has begun.
var ErrStopped = errors.New("supervise: the supervisor has been stopped")

var errNilSupervisor = errors.New("supervise: nil *Supervisor (was the error of New ignored?)")

// New returns a supervisor without workers, whose metrics are registered until it
// is stopped. The error lists every mistake of the options.
func New(opts ...Option) (*Supervisor, error) {
	o, err := newOptions(opts)
	if err != nil {
		return nil, fmt.Errorf("supervise: %w", err)
	}
	s := &Supervisor{opts: o, escalated: make(chan struct{}), stopped: make(chan struct{})}
	if s.registration, err = s.register(); err != nil {
		return nil, fmt.Errorf("supervise: metrics: %w", err)
	}
	return s, nil
}

// Add starts a worker. The error lists what is wrong with it; it is ErrStopped
// when Stop has begun. A worker may add others. While the supervisor drains, a
// worker is started but not restarted.
//
// A worker that has ended stays in Snapshot until one of the same name is added,
// which takes its counts over and nothing else.
func (s *Supervisor) Add(w Worker) error {
	if s == nil {
		return errNilSupervisor
	}
	w, err := w.complete()
	if err != nil {
		return fmt.Errorf("supervise: worker %.100q: %w", w.Name, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return ErrStopped
	}
	added := &worker{Worker: w, supervisor: s, done: make(chan struct{}), pace: newPace(s.opts)}
	if i := slices.IndexFunc(s.workers, func(old *worker) bool { return old.Name == w.Name }); i >= 0 {
		old := s.workers[i]
		if old.settleLocked(); !old.ended() {
			return fmt.Errorf("supervise: worker %q: one of that name has not ended", w.Name)
		}
		added.counts = old.counts
		s.workers = slices.Delete(s.workers, i, i+1)
	}
	added.ctx, added.cancel = context.WithCancel(context.WithValue(context.Background(), workerKey{}, added))
	added.enterLocked(Running)
	s.workers = append(s.workers, added)
	go added.run()
	return nil
}

// Run waits until ctx ends, a worker escalates or somebody else calls Stop, then
// stops the workers as Stop does and returns what escalated, joined with the error
// of Stop. When ctx was what ended and all workers stopped as they should, it
// returns nil. ctx is not the workers' context.
//
// With it a supervisor can be a worker itself, as in OTP: one that escalates fails,
// and its own supervisor makes it anew, or escalates in turn. Its StopTimeout is
// to be the sum of its workers' then. An error that wraps ErrEscalate goes up through
// all of them.
func (s *Supervisor) Run(ctx context.Context) error {
	switch {
	case s == nil:
		return errNilSupervisor
	case ctx == nil:
		return errors.New("supervise: Run: the context is nil")
	}
	select {
	case <-ctx.Done():
	case <-s.escalated:
	case <-s.stopped:
	}
	err := s.Stop(context.WithoutCancel(ctx))
	select {
	case <-s.escalated:
		return errors.Join(s.escalation, err)
	default:
		return err
	}
}

// Stop ends the workers, the last added first: each one's context ends and Stop
// waits until it has ended, but for its StopTimeout at most, before it turns to the
// next. When ctx ends it waits no longer, and tells those that are left all at
// once. A worker that backs off ends at once. From the moment Stop is called no
// worker is restarted and none escalates. A logger that hangs has up to 1s more.
//
// A worker that has not ended in time is abandoned: it keeps its goroutine and is
// named in the error, and Snapshot shows it so until it ends. The error also has
// what workers returned while Stop ran, except for errors that wrap
// context.Canceled, and their panics. It is nil if there is nothing to tell.
//
// Calling it again waits for the first call and returns the same. A worker cannot
// wait for itself: Stop refuses a context that comes from a worker of this
// supervisor, and with another the worker is abandoned once its StopTimeout is over.
// A worker that wants all to end returns ErrEscalate.
func (s *Supervisor) Stop(ctx context.Context) error {
	switch {
	case s == nil:
		return errNilSupervisor
	case ctx == nil:
		return errors.New("supervise: Stop: the context is nil")
	}
	if w := workerOf(ctx); w != nil && w.supervisor == s {
		return fmt.Errorf("supervise: Stop: the context is that of worker %q, which Stop would end: return an error that wraps ErrEscalate", w.Name)
	}
	s.mu.Lock()
	again := s.stopping
	s.stopping = true
	s.mu.Unlock()
	if again {
		if !wait(ctx, s.stopped, nil) {
			return fmt.Errorf("supervise: Stop: %w", context.Cause(ctx))
		}
		return s.stopErr
	}
	defer close(s.stopped)
	var errs []error
	var logs sync.WaitGroup // not in line: a logger that hangs must not hold up the others
	for _, w := range slices.Backward(s.workers) {
		errs = append(errs, w.stop(ctx, &logs))
	}
	errs = append(errs, s.registration.Unregister())
	logged := make(chan struct{})
	go func() {
		logs.Wait()
		close(logged)
	}()
	wait(context.Background(), logged, time.After(time.Second))
	s.stopErr = errors.Join(errs...)
	return s.stopErr
}

// wait waits until done is closed, which it reports, a timer fires or ctx ends.
func wait(ctx context.Context, done <-chan struct{}, timer <-chan time.Time) bool {
	select {
	case <-done:
		return true
	case <-timer:
	case <-ctx.Done():
	}
	select {
	case <-done:
		return true
	default:
		return false
	}
}

// noRestartLocked reports whether no worker is to run again.
func (s *Supervisor) noRestartLocked() bool { return s.stopping || s.draining() }

func (s *Supervisor) draining() bool {
	select {
	case <-s.opts.draining:
		return true
	default:
		return false
	}
}

// escalate tells of the first worker that escalates.
func (s *Supervisor) escalate(err error) {
	first := false
	s.once.Do(func() {
		first, s.escalation = true, err
		close(s.escalated)
	})
	s.log(slog.LevelError, "worker escalates", slog.String("error", err.Error()), slog.Bool("first", first))
	if f := s.opts.escalation; first && f != nil {
		if p := contain(func() { f(err) }); p != nil {
			s.log(slog.LevelError, "escalation callback panicked", slog.Any("panic", p), slog.String("stack", string(debug.Stack())))
		}
	}
}

// log writes to the user's logger, whose handler may panic.
func (s *Supervisor) log(level slog.Level, msg string, attrs ...slog.Attr) {
	contain(func() { s.opts.logger.LogAttrs(context.Background(), level, msg, attrs...) })
}
