package supervise

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// worker is a Worker that was added. Each run has a goroutine of its own, which
// decides when the run has ended whether there is a next, and leaves that to a
// timer. So a Goexit, which no goroutine survives, is an end like others, and who
// backs off has no goroutine.
type worker struct {
	Worker
	supervisor *Supervisor

	ctx    context.Context // ends when Stop says so
	cancel context.CancelFunc
	done   chan struct{} // closed when the worker has ended
	pace   *pace         // used by the run

	// Guarded by the supervisor's mu.
	counts
	state   State
	since   time.Time   // when it entered the state
	next    time.Time   // when it is to leave BackingOff
	timer   *time.Timer // that ends BackingOff
	last    verdict     // of the last run
	lastErr string      // clipped
	stopErr error       // what Stop has to tell of it
}

// counts are totals of a name.
type counts struct {
	restarts [causes]uint64
	panics   uint64
}

// verdict is what becomes of a worker whose run has ended.
type verdict struct {
	cause    cause
	restart  bool
	pause    time.Duration // before the restart
	state    State         // Stopped or Failed: if it is not restarted after all
	escalate error
}

type workerKey struct{}

// workerOf returns the worker whose context ctx comes from, nil if there is none.
func workerOf(ctx context.Context) *worker {
	w, _ := ctx.Value(workerKey{}).(*worker)
	return w
}

// run is one run of the worker and its end.
func (w *worker) run() {
	began, e := time.Now(), new(end)
	ctx, cancel := context.WithCancel(w.ctx)
	// Deferred, because a Goexit may come from Run and from every foreign method.
	defer func() {
		v := w.judge(e, time.Since(began))
		defer w.conclude(v) // last: Stop waits for the log too
		w.report(e, v)
	}()
	defer cancel()
	defer e.caught()
	e.result(w.Run(ctx))
}

// judge decides what becomes of the worker after a run that lasted for ran.
func (w *worker) judge(e *end, ran time.Duration) verdict {
	s := w.supervisor
	s.mu.Lock()
	defer s.mu.Unlock()
	v := verdict{cause: e.cause, state: Stopped}
	if e.abnormal() && !s.stopping {
		v.state = Failed
	}
	if e.unwound() {
		w.panics++
	}
	if asTold := s.stopping && e.canceled; e.abnormal() && !asTold {
		w.lastErr = clip(e.text)
		if s.stopping {
			w.stopErr = w.failure(e, "ended while stopping: "+e.text)
		}
	}
	switch {
	case s.noRestartLocked():
	case e.escalate:
		v.escalate = w.failure(e, e.text)
	case w.Kind == Temporary, w.Kind == Transient && !e.abnormal():
	default:
		if v.pause, v.restart = w.pace.next(time.Now(), ran); !v.restart {
			v.state, w.lastErr = Failed, clip(e.text)
			v.escalate = w.failure(e, fmt.Sprintf("more than %d restarts within %v, the last end: %s", s.opts.maxRestarts, s.opts.window, e.text))
		}
	}
	w.last = v
	return v
}

func (w *worker) failure(e *end, text string) error {
	return &failure{text: fmt.Sprintf("supervise: worker %q: %s", w.Name, text), err: e.err}
}

// report logs an end.
func (w *worker) report(e *end, v verdict) {
	attrs := append([]slog.Attr{slog.String("worker", w.Name)}, e.attrs()...)
	if v.restart {
		attrs = append(attrs, slog.Duration("restart_in", v.pause))
	} else {
		attrs = append(attrs, slog.String("state", v.state.String()))
	}
	level := slog.LevelInfo
	switch {
	case e.unwound():
		level = slog.LevelError
	case v.restart || v.state == Failed:
		level = slog.LevelWarn
	}
	w.supervisor.log(level, "worker ended", attrs...)
}

// conclude does what the verdict says, unless the supervisor has been told to stop
// since.
func (w *worker) conclude(v verdict) {
	s := w.supervisor
	s.mu.Lock()
	if v.restart && !s.noRestartLocked() {
		w.enterLocked(BackingOff)
		w.next = w.since.Add(v.pause)
		w.timer = time.AfterFunc(v.pause, w.restart)
	} else {
		w.endLocked()
	}
	s.mu.Unlock()
	if v.escalate != nil {
		s.escalate(v.escalate)
	}
}

// restart, on the timer's goroutine, which is the worker's then.
func (w *worker) restart() {
	s := w.supervisor
	s.mu.Lock()
	if s.noRestartLocked() {
		w.endLocked()
		s.mu.Unlock()
		return
	}
	w.restarts[w.last.cause]++
	w.enterLocked(Running)
	s.mu.Unlock()
	w.run()
}

// stop ends the worker for Stop, which ctx bounds, and returns what there is to
// tell of it.
func (w *worker) stop(ctx context.Context, logs *sync.WaitGroup) error {
	s := w.supervisor
	w.cancel()
	s.mu.Lock()
	w.settleLocked()
	s.mu.Unlock()
	timer := time.NewTimer(w.StopTimeout)
	defer timer.Stop()
	if wait(ctx, w.done, timer.C) || !w.abandon() {
		return w.stopErr
	}
	logs.Go(func() { s.log(slog.LevelError, "worker abandoned", slog.String("worker", w.Name)) })
	if ctx.Err() != nil {
		return fmt.Errorf("supervise: worker %q had not stopped when the context ended: abandoned", w.Name)
	}
	return fmt.Errorf("supervise: worker %q did not stop within %v: abandoned", w.Name, w.StopTimeout)
}

// abandon gives the worker up, unless it has ended just now.
func (w *worker) abandon() bool {
	w.supervisor.mu.Lock()
	defer w.supervisor.mu.Unlock()
	if w.ended() {
		return false
	}
	w.enterLocked(Abandoned)
	return true
}

func (w *worker) ended() bool {
	select {
	case <-w.done:
		return true
	default:
		return false
	}
}

func (w *worker) enterLocked(state State) { w.state, w.since = state, time.Now() }

// settleLocked ends a worker that backs off and is not to run again. Its timer would
// too, later.
func (w *worker) settleLocked() {
	if w.state == BackingOff && w.supervisor.noRestartLocked() && w.timer.Stop() {
		w.endLocked()
	}
}

// endLocked is the end. Of a worker that backs off it was that of its last run.
func (w *worker) endLocked() {
	if w.state == BackingOff {
		w.state = w.last.state
	} else {
		w.enterLocked(w.last.state)
	}
	close(w.done)
}
