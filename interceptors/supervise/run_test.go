package supervise_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/supervise"
)

// Run, a callback and somebody else may all stop it.
func TestRunAndACallbackThatStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s *supervise.Supervisor
		s = mustNew(t, supervise.WithEscalation(func(error) {
			if err := s.Stop(context.Background()); err != nil {
				t.Error(err)
			}
		}))
		mustAdd(t, s, supervise.Worker{Name: "slow", Run: func(ctx context.Context) error {
			<-ctx.Done()
			time.Sleep(time.Second)
			return nil
		}})
		bad, _ := fails("bad", supervise.ErrEscalate)
		mustAdd(t, s, bad)
		if err := s.Run(t.Context()); !errors.Is(err, supervise.ErrEscalate) {
			t.Errorf("Run: %v", err)
		}
		mustStop(t, s)
	})
}

func TestRun(t *testing.T) {
	for name, c := range map[string]struct {
		end  func(cancel func(), s *supervise.Supervisor, bad chan<- error)
		want error
	}{
		"the context ends":   {func(cancel func(), _ *supervise.Supervisor, _ chan<- error) { cancel() }, nil},
		"a worker escalates": {func(_ func(), _ *supervise.Supervisor, bad chan<- error) { bad <- errBroken }, errBroken},
		"somebody stops it":  {func(_ func(), s *supervise.Supervisor, _ chan<- error) { _ = s.Stop(context.Background()) }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := mustNew(t, supervise.WithIntensity(0, time.Second))
				bad := make(chan error)
				mustAdd(t, s, supervise.Worker{Name: "bad", Run: func(ctx context.Context) error {
					select {
					case err := <-bad:
						return err
					case <-ctx.Done():
						return nil
					}
				}})
				mustAdd(t, s, supervise.Worker{Name: "slow", Run: func(ctx context.Context) error {
					<-ctx.Done()
					time.Sleep(time.Second)
					return nil
				}})
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				began, ran := time.Now(), make(chan error, 1)
				go func() { ran <- s.Run(ctx) }()
				time.Sleep(time.Hour)
				c.end(cancel, s, bad)
				if err := <-ran; !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
					t.Errorf("Run: %v, want %v", err, c.want)
				}
				if took := time.Since(began); took != time.Hour+time.Second {
					t.Errorf("took %v", took)
				}
				if all := s.Snapshot(); all[1].State != supervise.Stopped {
					t.Errorf("found %+v", all)
				}
			})
		})
	}
}

// A supervisor is a worker of another: made anew when it escalates.
func TestTree(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		quick := supervise.WithBackoff(supervise.Backoff{Max: time.Second})
		var leaves, children atomic.Int32
		child := func(end error) func(ctx context.Context) error {
			return func(ctx context.Context) error {
				children.Add(1)
				s := mustNew(t, supervise.WithIntensity(2, time.Minute), quick)
				leaf := supervise.Worker{Name: "leaf", Run: func(context.Context) error { leaves.Add(1); return end }}
				return errors.Join(s.Add(leaf), s.Run(ctx))
			}
		}
		told := make(chan error, 1)
		escalation := supervise.WithEscalation(func(err error) { told <- err })

		root := mustNew(t, supervise.WithIntensity(3, time.Minute), quick, escalation)
		mustAdd(t, root, supervise.Worker{Name: "child", Run: child(errBroken)})
		if err := <-told; !errors.Is(err, errBroken) || children.Load() != 4 || leaves.Load() != 12 {
			t.Errorf("%d children, %d leaves, told %v", children.Load(), leaves.Load(), err)
		}
		mustStop(t, root)

		root = mustNew(t, quick, escalation)
		children.Store(0)
		mustAdd(t, root, supervise.Worker{Name: "child", Run: child(supervise.ErrEscalate)})
		if err := <-told; !errors.Is(err, supervise.ErrEscalate) || children.Load() != 1 {
			t.Errorf("%d children, told %v", children.Load(), err)
		}
		mustStop(t, root)
	})
}

// OTP's one_for_all: with an intensity of 0, a supervisor that is a worker.
func TestOneForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var good, bad atomic.Int32
		root := mustNew(t)
		mustAdd(t, root, supervise.Worker{Name: "both", Run: func(ctx context.Context) error {
			s := mustNew(t, supervise.WithIntensity(0, time.Minute))
			return errors.Join(
				s.Add(supervise.Worker{Name: "good", Run: func(ctx context.Context) error { good.Add(1); return untilDone(ctx) }}),
				s.Add(supervise.Worker{Name: "bad", Run: func(ctx context.Context) error {
					if bad.Add(1) == 3 {
						return untilDone(ctx)
					}
					time.Sleep(time.Second)
					return errBroken
				}}),
				s.Run(ctx))
		}})
		time.Sleep(time.Minute)
		wantState(t, root, supervise.Running)
		if good.Load() != 3 || bad.Load() != 3 {
			t.Errorf("%d and %d runs, want 3", good.Load(), bad.Load())
		}
		mustStop(t, root)
	})
}
