package supervise_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/supervise"
)

// A worker that fails for ever, and one that is added for ever, take no more memory
// with time.
func TestMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mustNew(t, supervise.WithIntensity(1000, time.Second), supervise.WithBackoff(supervise.Backoff{Max: 2 * time.Millisecond}))
		w, runs := fails("w", errBroken)
		w.Kind = supervise.Transient
		mustAdd(t, s, w)
		spin := func() {
			for range 800 {
				mustAdd(t, s, supervise.Worker{Name: "again", Kind: supervise.Temporary, Run: func(context.Context) error { return nil }})
				time.Sleep(10 * time.Millisecond)
			}
		}
		heap := func() uint64 {
			var m runtime.MemStats
			debug.FreeOSMemory()
			runtime.ReadMemStats(&m)
			return m.HeapAlloc
		}
		spin()
		before, ran := heap(), runs.Load()
		spin()
		if after := heap(); after > before+100<<10 {
			t.Errorf("%d B of heap more after %d runs", after-before, runs.Load()-ran)
		}
		if n := len(s.Snapshot()); n != 2 || runs.Load() < 2*ran-ran/10 {
			t.Errorf("%d workers, %d runs after %d", n, runs.Load(), ran)
		}
		mustStop(t, s)
	})
}

// Random workers under a random life of their supervisor, in virtual time: one run
// at a time each, none after Stop or in a drain, and the counts are right.
func TestRandomLives(t *testing.T) {
	for seed := range uint64(300) {
		synctest.Test(t, func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 0))
			chance := func(d time.Duration) time.Duration { return time.Duration(random.Int64N(int64(d))) }
			draining := make(chan struct{})
			var over, escalations atomic.Int32 // over: 1 in a drain, 2 after Stop
			limit := random.IntN(6)
			s := mustNew(t, supervise.WithDraining(draining), supervise.WithIntensity(limit, time.Minute), supervise.WithEscalation(func(error) {
				if over.Load() > 0 {
					t.Error("escalates although it is over")
				}
				escalations.Add(1)
			}))
			type life struct {
				worker            supervise.Worker
				runs, alive       atomic.Int32
				abnormal, unwound atomic.Int32
			}
			lives := make([]*life, 1+random.IntN(5))
			for i := range lives {
				l := &life{}
				lives[i] = l
				script := rand.New(rand.NewPCG(seed, uint64(i)+1))
				obeys := script.IntN(4) > 0
				l.worker = supervise.Worker{Name: fmt.Sprint(i), Kind: supervise.Kind(script.IntN(3)), StopTimeout: time.Second + time.Duration(script.Int64N(int64(time.Second)))}
				l.worker.Run = func(ctx context.Context) error {
					if n := l.runs.Add(1); n > 1 && over.Load() > 0 {
						t.Errorf("%s is restarted although it is over (%d)", l.worker.Name, over.Load())
					}
					if l.alive.Add(1) != 1 {
						t.Errorf("%s runs twice at one time", l.worker.Name)
					}
					defer l.alive.Add(-1)
					stop := ctx.Done()
					if !obeys {
						stop = nil
					}
					select {
					case <-stop:
						return ctx.Err()
					case <-time.After(time.Duration(script.Int64N(int64(10 * time.Second)))):
					}
					switch script.IntN(5) {
					case 0:
						return nil
					case 1:
						l.unwound.Add(1)
						panic("random")
					case 2:
						l.unwound.Add(1)
						runtime.Goexit()
					}
					l.abnormal.Add(1)
					return errBroken
				}
				mustAdd(t, s, l.worker)
				time.Sleep(chance(time.Second))
			}
			time.Sleep(chance(2 * time.Minute))
			if random.IntN(2) == 0 {
				over.Store(1)
				close(draining)
				time.Sleep(chance(time.Minute))
			}
			over.Store(2)
			_ = s.Stop(t.Context())
			for i, w := range s.Snapshot() {
				if alive := lives[i].alive.Load() == 1; alive != (w.State == supervise.Abandoned) {
					t.Errorf("after Stop %s is %v, alive %v", w.Name, w.State, alive)
				}
			}
			time.Sleep(time.Hour)
			synctest.Wait()
			for i, w := range s.Snapshot() {
				l := lives[i]
				if l.alive.Load() != 0 || w.State != supervise.Stopped && w.State != supervise.Failed {
					t.Errorf("%+v has not ended", w)
				}
				if w.Restarts != uint64(l.runs.Load()-1) || w.Panics != uint64(l.unwound.Load()) {
					t.Errorf("%+v, but %d runs and %d panics", w, l.runs.Load(), l.unwound.Load())
				}
				if w.Kind == supervise.Temporary && w.Restarts > 0 {
					t.Errorf("%+v is temporary", w)
				}
			}
			if escalations.Load() > 1 {
				t.Errorf("escalated %d times", escalations.Load())
			}
			if t.Failed() {
				t.Logf("seed %d", seed)
			}
		})
	}
}

// Everything at once, in real time, for the race detector.
func TestConcurrently(t *testing.T) {
	for range 20 {
		s := mustNew(t, noLimit, supervise.WithBackoff(supervise.Backoff{Max: time.Millisecond}), supervise.WithEscalation(func(error) {}))
		var running atomic.Int32
		var group sync.WaitGroup
		for i := range 8 {
			group.Go(func() {
				for n := range 50 {
					err := s.Add(supervise.Worker{Name: fmt.Sprint(i, n%3), Kind: supervise.Kind(n % 3), Run: func(ctx context.Context) error {
						running.Add(1)
						defer running.Add(-1)
						switch rand.IntN(6) {
						case 0:
							return untilDone(ctx)
						case 1:
							panic("now and then")
						case 2:
							runtime.Goexit()
						case 3:
							return supervise.ErrEscalate
						case 4:
							return nil
						}
						return errBroken
					}})
					if errors.Is(err, supervise.ErrStopped) {
						return
					}
					_ = s.Snapshot()
				}
			})
		}
		for range 3 {
			group.Go(func() {
				time.Sleep(time.Duration(rand.IntN(5)) * time.Millisecond)
				if err := s.Stop(context.Background()); err != nil && !errors.Is(err, errBroken) && !strings.Contains(err.Error(), "while stopping") {
					t.Error(err)
				}
				if n := running.Load(); n != 0 {
					t.Errorf("%d run after Stop", n)
				}
			})
		}
		group.Wait()
		for _, w := range s.Snapshot() {
			if w.State != supervise.Stopped && w.State != supervise.Failed {
				t.Errorf("after Stop: %+v", w)
			}
		}
	}
}
