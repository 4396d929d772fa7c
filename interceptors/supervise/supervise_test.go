package supervise_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/supervise"
)

// The tests run in bubbles of testing/synctest: time is virtual, and the end of a
// bubble proves that no goroutine is left.

// mustNew makes a supervisor that logs nothing, unless opts say otherwise.
func mustNew(t testing.TB, opts ...supervise.Option) *supervise.Supervisor {
	t.Helper()
	s, err := supervise.New(append([]supervise.Option{supervise.WithLogger(slog.New(slog.DiscardHandler))}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func mustAdd(t testing.TB, s *supervise.Supervisor, w supervise.Worker) {
	t.Helper()
	if err := s.Add(w); err != nil {
		t.Fatal(err)
	}
}

// mustStop stops a supervisor none of whose workers has anything to tell.
func mustStop(t testing.TB, s *supervise.Supervisor) {
	t.Helper()
	if err := s.Stop(t.Context()); err != nil {
		t.Errorf("Stop: %v", err)
	}
}

// only is the snapshot of the only worker, when nothing moves any more.
func only(t testing.TB, s *supervise.Supervisor) supervise.WorkerSnapshot {
	t.Helper()
	synctest.Wait()
	all := s.Snapshot()
	if len(all) != 1 {
		t.Fatalf("found %d workers: %+v", len(all), all)
	}
	return all[0]
}

func wantState(t testing.TB, s *supervise.Supervisor, want supervise.State) {
	t.Helper()
	if got := only(t, s).State; got != want {
		t.Fatalf("the worker is %v, want %v", got, want)
	}
}

// untilDone is a worker that does as it is told.
func untilDone(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

var errBroken = errors.New("broken")

// ends are the ways in which Run can end, by their cause.
var ends = map[string]func() error{
	"return": func() error { return nil },
	"error":  func() error { return errBroken },
	"panic":  func() error { panic("broken") },
	"goexit": func() error { runtime.Goexit(); return nil },
}

// Each kind, for each way to end.
func TestKinds(t *testing.T) {
	restarted := map[supervise.Kind]map[string]bool{
		supervise.Permanent: {"return": true, "error": true, "panic": true, "goexit": true},
		supervise.Transient: {"error": true, "panic": true, "goexit": true},
		supervise.Temporary: {},
	}
	lastErrors := map[string]string{"error": "broken", "panic": "panic: broken", "goexit": "runtime.Goexit was called"}
	for kind, causes := range restarted {
		for cause, end := range ends {
			t.Run(kind.String()+" "+cause, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := mustNew(t)
					var runs atomic.Int32
					mustAdd(t, s, supervise.Worker{Name: "w", Kind: kind, Run: func(ctx context.Context) error {
						if runs.Add(1) == 1 {
							time.Sleep(time.Second)
							return end()
						}
						return untilDone(ctx)
					}})
					began := time.Now()
					wantState(t, s, supervise.Running)
					time.Sleep(time.Second)

					got := only(t, s)
					want := supervise.WorkerSnapshot{Name: "w", Kind: kind, Since: began.Add(time.Second), LastError: lastErrors[cause]}
					if cause == "panic" || cause == "goexit" {
						want.Panics = 1
					}
					switch {
					case causes[cause]:
						want.State, want.Next = supervise.BackingOff, got.Next
					case cause == "return":
						want.State = supervise.Stopped
					default:
						want.State = supervise.Failed
					}
					if got != want {
						t.Errorf("after the end: %+v, want %+v", got, want)
					}

					time.Sleep(time.Hour)
					got = only(t, s)
					if causes[cause] {
						want.State, want.Restarts, want.Since, want.Next = supervise.Running, 1, want.Next, time.Time{}
					}
					if got != want {
						t.Errorf("an hour later: %+v, want %+v", got, want)
					}
					if n := runs.Load(); causes[cause] != (n == 2) {
						t.Errorf("%d runs", n)
					}
					mustStop(t, s)
				})
			})
		}
	}
}

// What a run has started with its context ends before the next run.
func TestContextEndsWithTheRun(t *testing.T) {
	for cause, end := range ends {
		t.Run(cause, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := mustNew(t)
				var helpers atomic.Int32
				mustAdd(t, s, supervise.Worker{Name: "w", Run: func(ctx context.Context) error {
					if helpers.Add(1) != 1 {
						t.Error("the helper of the last run is still there")
					}
					go func() {
						<-ctx.Done()
						helpers.Add(-1)
					}()
					return end()
				}})
				time.Sleep(10 * time.Second)
				synctest.Wait()
				if n := helpers.Load(); n != 0 {
					t.Errorf("%d helpers are left", n)
				}
				mustStop(t, s)
			})
		})
	}
}

// goroutines counts those of the bubble.
func goroutines() int {
	stacks := make([]byte, 1<<20)
	return strings.Count(string(stacks[:runtime.Stack(stacks, true)]), "synctest bubble ")
}

// A worker that backs off has no goroutine, one that runs has one.
func TestGoroutines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		before := goroutines()
		s := mustNew(t, supervise.WithBackoff(supervise.Backoff{Initial: time.Hour, Max: time.Hour}))
		check := func(want int) {
			t.Helper()
			synctest.Wait()
			if got := goroutines() - before; got != want {
				t.Errorf("%d goroutines, want %d", got, want)
			}
		}
		check(0)
		mustAdd(t, s, supervise.Worker{Name: "one", Run: untilDone})
		mustAdd(t, s, supervise.Worker{Name: "two", Run: untilDone})
		check(2)
		for cause, end := range ends {
			mustAdd(t, s, supervise.Worker{Name: cause, Run: func(context.Context) error { return end() }})
		}
		check(2)
		mustStop(t, s)
		check(0)
	})
}

func TestAddAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mustNew(t)
		mustAdd(t, s, supervise.Worker{Name: "first", Run: untilDone})
		broken := supervise.Worker{Name: "w", Run: func(context.Context) error { panic(errBroken) }, Kind: supervise.Temporary}
		mustAdd(t, s, broken)
		mustAdd(t, s, supervise.Worker{Name: "last", Run: untilDone})
		synctest.Wait()
		mustAdd(t, s, broken)
		synctest.Wait()
		mustAdd(t, s, supervise.Worker{Name: "w", Run: untilDone})
		synctest.Wait()

		all := s.Snapshot()
		if len(all) != 3 || all[0].Name != "first" || all[1].Name != "last" {
			t.Fatalf("found %+v", all)
		}
		if w := all[2]; w.Name != "w" || w.State != supervise.Running || w.Panics != 2 || w.LastError != "" || w.Kind != supervise.Permanent {
			t.Errorf("found %+v", w)
		}
		if err := s.Add(broken); err == nil {
			t.Error("two workers of one name")
		}
		mustStop(t, s)
	})
}

// One that backs off has not ended.
func TestAddAgainWhileBackingOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mustNew(t)
		w := supervise.Worker{Name: "w", Run: func(context.Context) error { return io.EOF }}
		mustAdd(t, s, w)
		wantState(t, s, supervise.BackingOff)
		if err := s.Add(w); err == nil {
			t.Error("two workers of one name")
		}
		mustStop(t, s)
	})
}
