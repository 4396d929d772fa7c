package supervise_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/supervise"
)

// The last added ends first, and one has ended before the next is told.
func TestStopInReverseOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mustNew(t)
		var log []string
		for i := range 4 {
			mustAdd(t, s, supervise.Worker{Name: fmt.Sprint(i), Run: func(ctx context.Context) error {
				<-ctx.Done()
				log = append(log, fmt.Sprint("told ", i))
				time.Sleep(time.Second)
				log = append(log, fmt.Sprint("ended ", i))
				return nil
			}})
		}
		began := time.Now()
		mustStop(t, s)
		if took := time.Since(began); took != 4*time.Second {
			t.Errorf("took %v", took)
		}
		want := []string{"told 3", "ended 3", "told 2", "ended 2", "told 1", "ended 1", "told 0", "ended 0"}
		if !slices.Equal(log, want) {
			t.Errorf("happened: %v", log)
		}
		for _, w := range s.Snapshot() {
			if w.State != supervise.Stopped || w.LastError != "" {
				t.Errorf("found %+v", w)
			}
		}
	})
}

// What a worker returns when it is told to stop is no failure of its own, but is
// not lost either.
func TestStopTellsWhatWorkersReturned(t *testing.T) {
	for name, c := range map[string]struct {
		end  func(ctx context.Context) error
		want string // in the error of Stop
		is   error
	}{
		"nil":              {func(context.Context) error { return nil }, "", nil},
		"the context's":    {func(ctx context.Context) error { return ctx.Err() }, "", nil},
		"wrapping it":      {func(ctx context.Context) error { return fmt.Errorf("poll: %w", ctx.Err()) }, "", nil},
		"another error":    {func(context.Context) error { return io.ErrShortWrite }, `worker "w": ended while stopping: short write`, io.ErrShortWrite},
		"deadline":         {func(context.Context) error { return context.DeadlineExceeded }, "deadline exceeded", context.DeadlineExceeded},
		"a panic":          {func(context.Context) error { panic("flush") }, `ended while stopping: panic: flush`, nil},
		"a goexit":         {func(context.Context) error { runtime.Goexit(); return nil }, "runtime.Goexit", nil},
		"an escalation":    {func(context.Context) error { return supervise.ErrEscalate }, "escalate", supervise.ErrEscalate},
		"after some while": {func(context.Context) error { time.Sleep(5*time.Second - 1); return nil }, "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := mustNew(t, supervise.WithIntensity(0, time.Minute), supervise.WithEscalation(func(err error) { t.Errorf("escalates: %v", err) }))
				mustAdd(t, s, supervise.Worker{Name: "other", Run: untilDone})
				mustAdd(t, s, supervise.Worker{Name: "w", Run: func(ctx context.Context) error {
					<-ctx.Done()
					return c.end(ctx)
				}})
				err := s.Stop(t.Context())
				switch {
				case c.want == "" && err != nil, c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
					t.Errorf("got %v, want %q", err, c.want)
				case c.is != nil && !errors.Is(err, c.is):
					t.Errorf("%v is not %v", err, c.is)
				}
				for _, w := range s.Snapshot() {
					if w.State != supervise.Stopped || w.Restarts != 0 || (w.LastError == "") != (w.Name == "other" || c.want == "") {
						t.Errorf("found %+v", w)
					}
				}
				time.Sleep(time.Hour) // nobody starts again
				if again := s.Stop(t.Context()); again != err {
					t.Errorf("again: %v, want %v", again, err)
				}
			})
		})
	}
}

// One that ends by itself while others are being stopped is not restarted, nor one
// whose backoff ends.
func TestStopKeepsOthersFromRestarting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mustNew(t, supervise.WithBackoff(supervise.Backoff{Initial: time.Second}))
		var runs atomic.Int32
		backsOff, itsRuns := fails("backs off", errBroken)
		mustAdd(t, s, backsOff)
		mustAdd(t, s, supervise.Worker{Name: "first", Run: func(ctx context.Context) error {
			runs.Add(1)
			time.Sleep(time.Second)
			if ctx.Err() != nil {
				t.Error("told before its turn")
			}
			return errBroken
		}})
		mustAdd(t, s, supervise.Worker{Name: "last", Run: func(ctx context.Context) error {
			<-ctx.Done()
			time.Sleep(4 * time.Second)
			return nil
		}})
		time.Sleep(time.Second / 4)
		if err := s.Stop(t.Context()); err == nil || !strings.Contains(err.Error(), `"first": ended while stopping: broken`) || !errors.Is(err, errBroken) {
			t.Errorf("Stop: %v", err)
		}
		time.Sleep(time.Hour)
		if runs.Load() != 1 || itsRuns.Load() != 1 {
			t.Errorf("%d and %d runs", runs.Load(), itsRuns.Load())
		}
	})
}

// A worker that ignores its context is abandoned and named; the others are stopped
// all the same.
func TestStopAbandons(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		records := &recorder{}
		s := mustNew(t, records.option())
		deaf := func(context.Context) error {
			time.Sleep(time.Minute)
			return errBroken
		}
		good := 0
		for _, w := range []supervise.Worker{
			{Name: "good", Run: func(ctx context.Context) error { <-ctx.Done(); good++; return nil }},
			{Name: "deaf", Run: deaf},
			{Name: "very deaf", Run: deaf, StopTimeout: 7 * time.Second},
		} {
			mustAdd(t, s, w)
		}
		began := time.Now()
		err := s.Stop(t.Context())
		if took := time.Since(began); took != 12*time.Second || good != 1 {
			t.Errorf("took %v, %d stopped", took, good)
		}
		const want = `supervise: worker "very deaf" did not stop within 7s: abandoned
supervise: worker "deaf" did not stop within 5s: abandoned`
		if err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
		if n := records.count("worker abandoned"); n != 2 {
			t.Errorf("%d in the log:\n%v", n, records)
		}
		for i, want := range []supervise.State{supervise.Stopped, supervise.Abandoned, supervise.Abandoned} {
			if got := s.Snapshot()[i].State; got != want {
				t.Errorf("worker %d is %v, want %v", i, got, want)
			}
		}

		time.Sleep(time.Hour) // they do end, and stay so
		for _, w := range s.Snapshot() {
			if w.State != supervise.Stopped || w.Restarts != 0 {
				t.Errorf("found %+v", w)
			}
		}
	})
}

// When the context ends, the rest is told at once and not waited for.
func TestStopWithAContextThatEnds(t *testing.T) {
	for name, timeout := range map[string]time.Duration{"at once": 0, "later": time.Second} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := mustNew(t)
				var told atomic.Int32
				for i := range 3 {
					mustAdd(t, s, supervise.Worker{Name: fmt.Sprint(i), Run: func(ctx context.Context) error {
						<-ctx.Done()
						told.Add(1)
						time.Sleep(3 * time.Second)
						return nil
					}})
				}
				ended, _ := fails("ended", io.EOF)
				ended.Kind = supervise.Temporary
				mustAdd(t, s, ended)
				synctest.Wait()
				ctx, cancel := context.WithTimeout(t.Context(), timeout)
				defer cancel()
				began := time.Now()
				err := s.Stop(ctx)
				if took := time.Since(began); took != timeout {
					t.Errorf("took %v", took)
				}
				if err == nil || strings.Count(err.Error(), "had not stopped when the context ended: abandoned") != 3 {
					t.Errorf("got %v", err)
				}
				synctest.Wait()
				if n := told.Load(); n != 3 {
					t.Errorf("%d were told", n)
				}
				time.Sleep(time.Hour)
			})
		})
	}
}

// A worker that backs off ends at once and never comes back.
func TestStopWhileBackingOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mustNew(t)
		w, runs := fails("w", errBroken)
		mustAdd(t, s, w)
		for range 3 { // also after a timer that has fired
			time.Sleep(3 * time.Second)
		}
		wantState(t, s, supervise.BackingOff)
		before, failed := runs.Load(), only(t, s).Since
		time.Sleep(time.Millisecond)
		began := time.Now()
		mustStop(t, s)
		if time.Since(began) > 0 {
			t.Errorf("took %v", time.Since(began))
		}
		got := only(t, s)
		if got.State != supervise.Failed || !got.Next.IsZero() || got.LastError != "broken" || got.Since != failed {
			t.Errorf("found %+v", got)
		}
		time.Sleep(time.Hour)
		if n := runs.Load(); n != before {
			t.Errorf("%d runs more", n-before)
		}
	})
}

// Stop at the very time of a restart: it runs, and is stopped, or does not run.
func TestStopAtTheTimeOfARestart(t *testing.T) {
	for range 200 {
		synctest.Test(t, func(t *testing.T) {
			s := mustNew(t)
			var running atomic.Int32
			first := true
			mustAdd(t, s, supervise.Worker{Name: "w", Run: func(ctx context.Context) error {
				running.Add(1)
				defer running.Add(-1)
				if first {
					first = false
					return errBroken
				}
				return untilDone(ctx)
			}})
			time.Sleep(time.Until(only(t, s).Next))
			mustStop(t, s)
			if n := running.Load(); n != 0 {
				t.Errorf("%d run after Stop", n)
			}
			if state := only(t, s).State; state != supervise.Stopped && state != supervise.Failed {
				t.Errorf("the worker is %v", state)
			}
		})
	}
}

// A worker that ends at the very end of its StopTimeout is abandoned or not, but
// not for ever.
func TestStopAtTheTimeout(t *testing.T) {
	for range 200 {
		synctest.Test(t, func(t *testing.T) {
			s := mustNew(t)
			mustAdd(t, s, supervise.Worker{Name: "w", Run: func(ctx context.Context) error {
				<-ctx.Done()
				time.Sleep(5 * time.Second)
				return nil
			}})
			if err := s.Stop(t.Context()); err != nil && !strings.Contains(err.Error(), "did not stop within 5s") {
				t.Errorf("Stop: %v", err)
			}
			wantState(t, s, supervise.Stopped)
		})
	}
}

func TestStopTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mustNew(t)
		mustAdd(t, s, supervise.Worker{Name: "w", Run: func(ctx context.Context) error {
			<-ctx.Done()
			time.Sleep(2 * time.Second)
			return errBroken
		}})
		results := make(chan error, 3)
		began := time.Now()
		for range 3 {
			go func() { results <- s.Stop(t.Context()) }()
		}
		impatient, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		synctest.Wait()
		if err := s.Stop(impatient); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Second {
			t.Errorf("the impatient got %v after %v", err, time.Since(began))
		}
		first := <-results
		for range 2 {
			if err := <-results; err != first || !errors.Is(err, errBroken) {
				t.Errorf("got %v and %v", first, err)
			}
		}
		if took := time.Since(began); took != 2*time.Second {
			t.Errorf("took %v", took)
		}
		// The result is there, also for a context that has ended.
		<-impatient.Done()
		for range 100 {
			if err := s.Stop(impatient); err != first {
				t.Fatalf("got %v, want %v", err, first)
			}
		}
		if err := s.Add(supervise.Worker{Name: "late", Run: untilDone}); !errors.Is(err, supervise.ErrStopped) {
			t.Errorf("Add after Stop: %v", err)
		}
	})
}

// Add while Stop runs is refused: nobody would stop what it starts.
func TestAddWhileStopping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mustNew(t)
		var added error
		mustAdd(t, s, supervise.Worker{Name: "w", Run: func(ctx context.Context) error {
			<-ctx.Done()
			added = s.Add(supervise.Worker{Name: "late", Run: untilDone})
			return nil
		}})
		mustStop(t, s)
		if !errors.Is(added, supervise.ErrStopped) {
			t.Errorf("Add: %v", added)
		}
	})
}

// A worker that stops its own supervisor is told that it cannot; one that hides
// who it is waits for its StopTimeout, no longer.
func TestStopFromAWorker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mustNew(t)
		var refused error
		var runs int
		mustAdd(t, s, supervise.Worker{Name: "w", Run: func(ctx context.Context) error {
			runs++
			derived, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Hour)
			defer cancel()
			refused = s.Stop(derived)
			return untilDone(ctx)
		}})
		synctest.Wait()
		if refused == nil || !strings.Contains(refused.Error(), `worker "w"`) || !strings.Contains(refused.Error(), "ErrEscalate") {
			t.Errorf("Stop: %v", refused)
		}
		wantState(t, s, supervise.Running)
		mustStop(t, s)
	})
	synctest.Test(t, func(t *testing.T) {
		s := mustNew(t)
		var err error
		var took time.Duration
		mustAdd(t, s, supervise.Worker{Name: "other", Run: untilDone})
		mustAdd(t, s, supervise.Worker{Name: "w", Run: func(context.Context) error {
			began := time.Now()
			err = s.Stop(context.Background())
			took = time.Since(began)
			return nil
		}})
		time.Sleep(time.Hour)
		synctest.Wait()
		if took != 5*time.Second || err == nil || !strings.Contains(err.Error(), `worker "w" did not stop within 5s`) || strings.Contains(err.Error(), "other") {
			t.Errorf("Stop took %v: %v", took, err)
		}
		for _, w := range s.Snapshot() {
			if w.State != supervise.Stopped {
				t.Errorf("found %+v", w)
			}
		}
	})
	// A worker of another supervisor may.
	synctest.Test(t, func(t *testing.T) {
		a, b := mustNew(t), mustNew(t)
		mustAdd(t, b, supervise.Worker{Name: "b", Run: untilDone})
		mustAdd(t, a, supervise.Worker{Name: "a", Run: func(ctx context.Context) error {
			if err := b.Stop(ctx); err != nil {
				t.Error(err)
			}
			return untilDone(ctx)
		}})
		wantState(t, b, supervise.Stopped)
		mustStop(t, a)
	})
}
