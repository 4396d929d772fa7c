package supervise_test

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/supervise"
)

// Case 37: a worker that fails during the drain is not restarted; those that run
// go on.
func TestCase37_NoRestartWhileDraining(t *testing.T) {
	for cause, end := range ends {
		t.Run(cause, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				draining := make(chan struct{})
				s := mustNew(t, supervise.WithDraining(draining), supervise.WithIntensity(1, time.Minute),
					supervise.WithEscalation(func(err error) { t.Errorf("escalates: %v", err) }))
				worker := func(name string, after time.Duration) *atomic.Int32 {
					runs := new(atomic.Int32)
					mustAdd(t, s, supervise.Worker{Name: name, Run: func(ctx context.Context) error {
						runs.Add(1)
						select {
						case <-time.After(after):
							return end()
						case <-ctx.Done():
							return nil
						}
					}})
					return runs
				}
				backsOff, fails, goesOn := worker("backs off", 0), worker("fails", time.Second), worker("goes on", time.Hour)
				synctest.Wait()
				if state := s.Snapshot()[0].State; state != supervise.BackingOff {
					t.Fatalf("the first worker is %v", state)
				}
				close(draining)

				final := supervise.Failed
				if cause == "return" {
					final = supervise.Stopped
				}
				want := []supervise.State{final, supervise.Running, supervise.Running}
				for range 2 {
					for i, w := range s.Snapshot() {
						if w.State != want[i] || !w.Next.IsZero() {
							t.Errorf("%s is %v until %v, want %v", w.Name, w.State, w.Next, want[i])
						}
					}
					time.Sleep(time.Minute)
					want[1] = final
				}
				late := worker("late", time.Second) // starts, once
				if err := s.Add(supervise.Worker{Name: "backs off", Run: untilDone}); err != nil {
					t.Error(err)
				}
				time.Sleep(time.Minute)
				for i, runs := range []*atomic.Int32{backsOff, fails, goesOn, late} {
					if n := runs.Load(); n != 1 {
						t.Errorf("worker %d ran %d times", i, n)
					}
				}
				mustStop(t, s)
			})
		})
	}
}

// The same when nobody looks before the backoff ends.
func TestCase37_BackoffEndsWhileDraining(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		draining := make(chan struct{})
		s := mustNew(t, supervise.WithDraining(draining))
		w, runs := fails("w", errBroken)
		mustAdd(t, s, w)
		failed := time.Now()
		synctest.Wait()
		close(draining)
		time.Sleep(time.Hour)
		if got := only(t, s); runs.Load() != 1 || got.State != supervise.Failed || got.Since != failed {
			t.Errorf("%d runs, %+v", runs.Load(), got)
		}
		mustStop(t, s)
	})
}
