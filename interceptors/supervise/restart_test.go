package supervise_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/supervise"
)

// noLimit lets a worker fail for ever.
var noLimit = supervise.WithIntensity(0, 0)

// pauses runs a worker that fails at once, or after as long as ran says for the
// run, and returns how long it was away each time.
func pauses(t *testing.T, n int, ran func(run int) time.Duration, opts ...supervise.Option) []time.Duration {
	t.Helper()
	var all []time.Duration
	synctest.Test(t, func(t *testing.T) {
		s := mustNew(t, append([]supervise.Option{noLimit}, opts...)...)
		var ended time.Time
		enough := make(chan struct{})
		mustAdd(t, s, supervise.Worker{Name: "w", Run: func(ctx context.Context) error {
			if !ended.IsZero() {
				all = append(all, time.Since(ended))
			}
			if len(all) == n {
				close(enough)
				return untilDone(ctx)
			}
			if ran != nil {
				time.Sleep(ran(len(all)))
			}
			ended = time.Now()
			return io.EOF
		}})
		<-enough
		mustStop(t, s)
	})
	return all
}

// The pause doubles up to its maximum, by default from 500ms to 30s, and is
// jittered by up to a half.
func TestBackoff(t *testing.T) {
	for name, c := range map[string]struct {
		opts  []supervise.Option
		means []time.Duration // of the jitter
	}{
		"default": {nil, []time.Duration{
			500 * time.Millisecond, time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second, 16 * time.Second, 30 * time.Second, 30 * time.Second}},
		"set": {[]supervise.Option{supervise.WithBackoff(supervise.Backoff{Initial: time.Minute, Max: 3 * time.Minute})},
			[]time.Duration{time.Minute, 2 * time.Minute, 3 * time.Minute, 3 * time.Minute}},
		"a short maximum": {[]supervise.Option{supervise.WithBackoff(supervise.Backoff{Max: 10 * time.Millisecond})},
			[]time.Duration{10 * time.Millisecond, 10 * time.Millisecond}},
		"a long start": {[]supervise.Option{supervise.WithBackoff(supervise.Backoff{Initial: time.Hour})},
			[]time.Duration{time.Hour, time.Hour}},
	} {
		t.Run(name, func(t *testing.T) {
			var less, more int
			for range 20 {
				for i, got := range pauses(t, len(c.means), nil, c.opts...) {
					mean := c.means[i]
					if got < mean/2 || got > mean*3/2 {
						t.Errorf("pause %d is %v, want %v ± a half", i, got, mean)
					}
					if got < mean {
						less++
					} else {
						more++
					}
				}
			}
			if less < 5 || more < 5 {
				t.Errorf("%d pauses are shorter than their mean, %d are not: no jitter", less, more)
			}
		})
	}
}

// A run that lasted long enough makes the next pause the first one again.
func TestBackoffIsResetAfterAHealthyRun(t *testing.T) {
	const healthy = 10 * time.Second
	ran := func(run int) time.Duration {
		if run == 3 {
			return healthy
		}
		return healthy - 1
	}
	got := pauses(t, 6, ran, supervise.WithBackoff(supervise.Backoff{Initial: time.Second, Max: time.Hour, Healthy: healthy}))
	for i, mean := range []time.Duration{time.Second, 2 * time.Second, 4 * time.Second, time.Second, 2 * time.Second, 4 * time.Second} {
		if got[i] < mean/2 || got[i] > mean*3/2 {
			t.Errorf("pause %d is %v, want %v ± a half", i, got[i], mean)
		}
	}
}

func TestBackoffThatIsWrong(t *testing.T) {
	for name, b := range map[string]supervise.Backoff{
		"too short":          {Initial: time.Millisecond - 1},
		"negative":           {Initial: -1},
		"negative maximum":   {Max: -1},
		"negative healthy":   {Healthy: -1},
		"more than maximum":  {Initial: 2 * time.Second, Max: time.Second},
		"too long":           {Max: 24*time.Hour + 1},
		"too long a start":   {Initial: math.MaxInt64},
		"short, so also max": {Max: time.Millisecond - 1},
	} {
		if _, err := supervise.New(supervise.WithBackoff(b)); err == nil || !strings.Contains(err.Error(), "allowed") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// fails returns a worker that fails at once, and how often it has run.
func fails(name string, err error) (supervise.Worker, *atomic.Int32) {
	runs := new(atomic.Int32)
	return supervise.Worker{Name: name, Run: func(context.Context) error {
		runs.Add(1)
		return err
	}}, runs
}

// By default the sixth failure within a minute escalates, once; the worker is
// given up and the others go on.
func TestIntensity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told []error
		s := mustNew(t, supervise.WithEscalation(func(err error) { told = append(told, err) }))
		mustAdd(t, s, supervise.Worker{Name: "other", Run: untilDone})
		bad, runs := fails("bad", fmt.Errorf("the broker: %w", io.EOF))
		mustAdd(t, s, bad)
		worse, worseRuns := fails("worse", io.ErrUnexpectedEOF)
		began := time.Now()
		time.Sleep(time.Second)
		mustAdd(t, s, worse)
		time.Sleep(time.Until(began.Add(25 * time.Second))) // 15.5 s, jittered by a half
		synctest.Wait()

		if runs.Load() != 6 || worseRuns.Load() != 6 {
			t.Errorf("%d and %d runs, want 6", runs.Load(), worseRuns.Load())
		}
		if len(told) != 1 {
			t.Fatalf("told %d times: %v", len(told), told)
		}
		name, cause := "bad", io.EOF
		if strings.Contains(told[0].Error(), "worse") {
			name, cause = "worse", io.ErrUnexpectedEOF
		}
		if !errors.Is(told[0], cause) || !strings.Contains(told[0].Error(), fmt.Sprintf("%q: more than 5 restarts within 1m0s", name)) {
			t.Errorf("told %v", told[0])
		}
		for i, want := range []supervise.State{supervise.Running, supervise.Failed, supervise.Failed} {
			if got := s.Snapshot()[i]; got.State != want {
				t.Errorf("found %+v, want %v", got, want)
			}
		}

		// The name is free, the worker begins anew, nobody is told again.
		mustAdd(t, s, bad)
		time.Sleep(time.Hour)
		synctest.Wait()
		if runs.Load() != 12 || len(told) != 1 {
			t.Errorf("added again: %d runs, told %d times", runs.Load(), len(told))
		}
		mustStop(t, s)
	})
}

// What the documentation says of the default.
func TestIntensityByDefault(t *testing.T) {
	for range 50 {
		synctest.Test(t, func(t *testing.T) {
			told := make(chan time.Time, 1)
			s := mustNew(t, supervise.WithEscalation(func(error) { told <- time.Now() }))
			w, _ := fails("w", errBroken)
			began := time.Now()
			mustAdd(t, s, w)
			if after := (<-told).Sub(began); after < 7750*time.Millisecond || after > 23250*time.Millisecond {
				t.Errorf("escalates after %v", after)
			}
			mustStop(t, s)
		})
		synctest.Test(t, func(t *testing.T) {
			s := mustNew(t, supervise.WithEscalation(func(err error) { t.Error(err) }))
			mustAdd(t, s, supervise.Worker{Name: "w", Run: func(ctx context.Context) error {
				select {
				case <-time.After(20 * time.Second):
					return errBroken
				case <-ctx.Done():
					return nil
				}
			}})
			time.Sleep(time.Hour)
			mustStop(t, s)
		})
	}
}

// The window slides: restarts that are older do not count.
func TestIntensityOfAWindow(t *testing.T) {
	for name, c := range map[string]struct {
		ran  time.Duration // each run
		want supervise.State
	}{
		// With a pause of 1 to 3 ms, two restarts lie two runs apart.
		"inside":  {time.Second - 10*time.Millisecond, supervise.Failed},
		"outside": {time.Second, supervise.Running},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := mustNew(t, supervise.WithIntensity(2, 2*time.Second),
					supervise.WithBackoff(supervise.Backoff{Initial: 2 * time.Millisecond, Max: 2 * time.Millisecond}))
				mustAdd(t, s, supervise.Worker{Name: "w", Run: func(ctx context.Context) error {
					select {
					case <-time.After(c.ran):
						return errBroken
					case <-ctx.Done():
						return nil
					}
				}})
				time.Sleep(100*time.Second + 500*time.Millisecond)
				wantState(t, s, c.want)
				mustStop(t, s)
			})
		})
	}
}

func TestIntensityAtItsEnds(t *testing.T) {
	for name, c := range map[string]struct {
		max    int
		window time.Duration
		runs   int32 // 0: without end
	}{
		"none":     {0, time.Nanosecond, 1},
		"one":      {1, time.Hour, 2},
		"many":     {1000, 24 * time.Hour, 1001},
		"no limit": {0, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				escalations := 0
				s := mustNew(t, supervise.WithIntensity(c.max, c.window), supervise.WithBackoff(supervise.Backoff{Max: time.Second}),
					supervise.WithEscalation(func(error) { escalations++ }))
				w, runs := fails("w", errBroken)
				mustAdd(t, s, w)
				time.Sleep(time.Hour)
				got := only(t, s)
				if c.runs == 0 {
					if runs.Load() < 2000 || escalations > 0 || got.State != supervise.BackingOff {
						t.Errorf("%d runs, %d escalations, %v", runs.Load(), escalations, got.State)
					}
				} else if runs.Load() != c.runs || escalations != 1 || got.State != supervise.Failed || got.Restarts != uint64(c.runs-1) {
					t.Errorf("%d runs, %d escalations, %+v, want %d runs", runs.Load(), escalations, got, c.runs)
				}
				mustStop(t, s)
			})
		})
	}
	for name, opt := range map[string]supervise.Option{
		"negative":        supervise.WithIntensity(-1, time.Second),
		"too many":        supervise.WithIntensity(1001, time.Second),
		"negative window": supervise.WithIntensity(1, -1),
	} {
		if _, err := supervise.New(opt); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// ErrEscalate escalates at once, whatever the kind.
func TestErrEscalate(t *testing.T) {
	for kind := supervise.Permanent; kind <= supervise.Temporary; kind++ {
		synctest.Test(t, func(t *testing.T) {
			told := make(chan error, 2)
			s := mustNew(t, supervise.WithEscalation(func(err error) { told <- err }))
			w, runs := fails("w", fmt.Errorf("%w: %w", supervise.ErrEscalate, io.EOF))
			w.Kind = kind
			mustAdd(t, s, w)
			time.Sleep(time.Hour)
			wantState(t, s, supervise.Failed)
			if runs.Load() != 1 || len(told) != 1 {
				t.Fatalf("%v: %d runs, told %d times", kind, runs.Load(), len(told))
			}
			err := <-told
			if !errors.Is(err, io.EOF) || !errors.Is(err, supervise.ErrEscalate) || err.Error() != `supervise: worker "w": escalate: EOF` {
				t.Errorf("%v: told %v", kind, err)
			}
			mustStop(t, s)
		})
	}
}

// An end that is normal is counted too: a permanent worker is there to run.
func TestPermanentThatReturnsTooOften(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		told := make(chan error, 1)
		s := mustNew(t, supervise.WithEscalation(func(err error) { told <- err }))
		w, _ := fails("w", nil)
		mustAdd(t, s, w)
		if err := <-told; !strings.Contains(err.Error(), "Run returned nil") {
			t.Errorf("told %v", err)
		}
		wantState(t, s, supervise.Failed)
		mustStop(t, s)
	})
}

// The callback may do what it likes.
func TestEscalationCallback(t *testing.T) {
	for name, callback := range map[string]func(s *supervise.Supervisor){
		"stops": func(s *supervise.Supervisor) {
			began := time.Now()
			if err := s.Stop(context.Background()); err != nil || time.Since(began) > 0 {
				panic(fmt.Sprint("Stop: ", err, " after ", time.Since(began)))
			}
		},
		"adds": func(s *supervise.Supervisor) {
			if err := s.Add(supervise.Worker{Name: "bad", Run: untilDone}); err != nil {
				panic(err)
			}
		},
		"looks":  func(s *supervise.Supervisor) { _ = s.Snapshot() },
		"panics": func(*supervise.Supervisor) { panic("the callback") },
		"exits":  func(*supervise.Supervisor) { _ = ends["goexit"]() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var s *supervise.Supervisor
				calls := 0
				records := &recorder{}
				s = mustNew(t, supervise.WithIntensity(0, time.Second), records.option(), supervise.WithEscalation(func(error) {
					calls++
					callback(s)
				}))
				mustAdd(t, s, supervise.Worker{Name: "good", Run: untilDone})
				bad, _ := fails("bad", errBroken)
				mustAdd(t, s, bad)
				time.Sleep(time.Hour)
				synctest.Wait()
				if calls != 1 {
					t.Errorf("%d calls", calls)
				}
				if n := records.count("escalation callback panicked"); n > 0 != (name == "panics") {
					t.Errorf("%d panics of the callback: %v", n, records)
				}
				mustStop(t, s)
			})
		})
	}
}
