package supervise_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/grpc-resilience/grpc-resilience/interceptors/supervise"
)

// foreign is an error, and a value to panic with, whose methods do what they like.
type foreign struct{ text, is func() }

func (f foreign) Error() string      { f.text(); return "foreign" }
func (f foreign) Is(err error) bool  { f.is(); return false }
func (f foreign) GoString() string   { f.text(); return "foreign" }
func nothing()                       {}
func panics()                        { panic("in a method") }
func exits()                         { runtime.Goexit() }
func panicsTwice()                   { panic(foreign{panics, panics}) }
func returns(err error) func() error { return func() error { return err } }
func raises(v any) func() error      { return func() error { panic(v) } }

// However a run ends, there is a next one, and Stop does not wait in vain.
func TestForeignCode(t *testing.T) {
	for name, c := range map[string]struct {
		end   func() error
		cause string
		last  string // in LastError
	}{
		"Error panics":              {returns(foreign{panics, nothing}), "panic", "panic: in a method"},
		"Error panics twice":        {returns(foreign{panicsTwice, nothing}), "panic", "panic"},
		"Error exits":               {returns(foreign{exits, nothing}), "error", "runtime.Goexit"},
		"Is panics":                 {returns(foreign{nothing, panics}), "panic", "panic: in a method"},
		"Is exits":                  {returns(foreign{nothing, exits}), "error", "runtime.Goexit"},
		"nil error of a type":       {returns((*foreign)(nil)), "panic", "nil *foreign pointer"},
		"panic with nil":            {raises(nil), "panic", "nil"},
		"panic with an error":       {raises(errBroken), "panic", "panic: broken"},
		"panic, Error panics":       {raises(foreign{panics, panics}), "panic", "in a method"},
		"panic, Error panics twice": {raises(foreign{panicsTwice, panics}), "panic", "cannot be printed"},
		"panic, Error exits":        {raises(foreign{exits, exits}), "panic", "cannot be printed"},
		"panic in a deferred call": {func() error {
			defer panics()
			panic("first")
		}, "panic", "panic: in a method"},
		"exit in a panic": {func() error {
			defer exits()
			panic("first")
		}, "goexit", "runtime.Goexit"},
		"panic in an exit": {func() error {
			defer panics()
			exits()
			return nil
		}, "panic", "panic: in a method"},
		"exit in a contained panic in an exit": {func() error {
			defer func() {
				defer func() { _ = recover() }()
				panics()
			}()
			exits()
			return nil
		}, "goexit", "runtime.Goexit"},
		"runtime error": {func() error {
			words := strings.Fields("one two")
			return errors.New(words[2])
		}, "panic", "index out of range"},
		"not UTF-8": {returns(errors.New("\xff\xfe" + strings.Repeat("é", 1000))), "error", "?éé"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				records := &recorder{}
				s := mustNew(t, records.option())
				first := true
				mustAdd(t, s, supervise.Worker{Name: "w", Run: func(ctx context.Context) error {
					if first {
						first = false
						return c.end()
					}
					return untilDone(ctx)
				}})
				wantState(t, s, supervise.BackingOff)
				got := only(t, s)
				if !strings.Contains(got.LastError, c.last) || !utf8.ValidString(got.LastError) || len(got.LastError) > 300 {
					t.Errorf("the last error is %q, want %q", got.LastError, c.last)
				}
				if cause := records.attr("worker ended", "cause"); cause != c.cause {
					t.Errorf("the cause is %s, want %s", cause, c.cause)
				}
				if stack := records.attr("worker ended", "stack"); (stack != "") != (c.cause != "error") {
					t.Errorf("the stack is %q", stack)
				}
				if unwound := c.cause != "error"; (got.Panics == 1) != unwound {
					t.Errorf("%d panics", got.Panics)
				}
				if _, err := json.Marshal(s.Snapshot()); err != nil {
					t.Error(err)
				}
				time.Sleep(time.Minute)
				wantState(t, s, supervise.Running)
				mustStop(t, s)
			})
		})
	}
}

// The texts of errors that are handed out were taken once.
func TestErrorsOfForeignErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		err := foreign{text: func() { asked++ }, is: nothing}
		told := make(chan error, 1)
		s := mustNew(t, supervise.WithIntensity(0, time.Second), supervise.WithEscalation(func(err error) { told <- err }))
		w, _ := fails("w", &err)
		mustAdd(t, s, w)
		got := <-told
		for range 3 {
			if !strings.Contains(got.Error(), "foreign") || !errors.Is(got, &err) {
				t.Errorf("told %v", got)
			}
		}
		if asked != 1 {
			t.Errorf("asked %d times", asked)
		}
		mustStop(t, s)
	})
}

// A logger that panics or ends its goroutine costs its line; one that hangs keeps
// one goroutine, and its worker is abandoned.
func TestLoggerThatIsBroken(t *testing.T) {
	for name, with := range map[string]func(){"panics": panics, "exits": exits} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				records := &recorder{with: with}
				s := mustNew(t, records.option(), noLimit)
				w, runs := fails("w", errBroken)
				mustAdd(t, s, w)
				time.Sleep(time.Minute)
				if runs.Load() < 4 {
					t.Errorf("%d runs", runs.Load())
				}
				mustStop(t, s)
			})
		})
	}
	t.Run("hangs", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			stuck := make(chan struct{})
			records := &recorder{with: func() { <-stuck }}
			s := mustNew(t, records.option(), noLimit)
			w, runs := fails("w", errBroken)
			mustAdd(t, s, w)
			synctest.Wait()
			before := goroutines()
			time.Sleep(time.Hour)
			if n := goroutines(); n != before || runs.Load() != 1 {
				t.Errorf("%d goroutines, were %d, %d runs", n, before, runs.Load())
			}
			stopped := make(chan error, 1)
			go func() { stopped <- s.Stop(t.Context()) }()
			time.Sleep(time.Minute)
			wantState(t, s, supervise.Abandoned)
			close(stuck)
			if err := <-stopped; err == nil || !strings.Contains(err.Error(), "abandoned") {
				t.Errorf("Stop: %v", err)
			}
			wantState(t, s, supervise.Failed)
		})
	})
}

// Stop that comes while the end of a run is logged, a restart decided already, waits
// for the log and not for the backoff.
func TestStopWhileAnEndIsLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		records := &recorder{with: func() { time.Sleep(time.Second) }}
		s := mustNew(t, records.option())
		w, runs := fails("w", errBroken)
		mustAdd(t, s, w)
		began := time.Now()
		synctest.Wait()
		mustStop(t, s)
		if took := time.Since(began); took != time.Second || runs.Load() != 1 {
			t.Errorf("took %v, %d runs", took, runs.Load())
		}
		if records.attr("worker ended", "restart_in") == "" {
			t.Errorf("no restart was decided: %v", records)
		}
	})
}

// A callback that hangs holds nobody up.
func TestEscalationThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stuck := make(chan struct{})
		s := mustNew(t, supervise.WithIntensity(0, time.Second), supervise.WithEscalation(func(error) { <-stuck }))
		for _, name := range []string{"one", "two"} {
			w, _ := fails(name, errBroken)
			mustAdd(t, s, w)
		}
		mustAdd(t, s, supervise.Worker{Name: "good", Run: untilDone})
		time.Sleep(time.Minute)
		began := time.Now()
		mustStop(t, s)
		if time.Since(began) > 0 {
			t.Errorf("took %v", time.Since(began))
		}
		close(stuck)
	})
}

func TestWorkersThatAreWrong(t *testing.T) {
	s := mustNew(t)
	run := func(context.Context) error { t.Error("it runs"); return nil }
	for name, c := range map[string]struct {
		worker supervise.Worker
		want   []string
	}{
		"nothing":         {supervise.Worker{}, []string{"name", "Run is nil"}},
		"no name":         {supervise.Worker{Run: run}, []string{`worker "": the name is ""`}},
		"no run":          {supervise.Worker{Name: "w"}, []string{`worker "w": Run is nil`}},
		"a long name":     {supervise.Worker{Name: strings.Repeat("x", 101), Run: run}, []string{"1 to 100"}},
		"a huge name":     {supervise.Worker{Name: strings.Repeat("x", 1<<20), Run: run}, []string{"1 to 100"}},
		"not UTF-8":       {supervise.Worker{Name: "\xff", Run: run}, []string{`"\xff"`}},
		"a line break":    {supervise.Worker{Name: "a\nb", Run: run}, []string{`"a\nb"`}},
		"a wrong kind":    {supervise.Worker{Name: "w", Run: run, Kind: 3}, []string{"kind is 3"}},
		"a wrong timeout": {supervise.Worker{Name: "w", Run: run, StopTimeout: -1}, []string{"StopTimeout is -1ns"}},
		"everything":      {supervise.Worker{Kind: 255, StopTimeout: -1}, []string{"name", "Run", "kind", "StopTimeout"}},
	} {
		err := s.Add(c.worker)
		for _, want := range c.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: got %v, want %q", name, err, want)
			}
		}
		if err != nil && len(err.Error()) > 1000 {
			t.Errorf("%s: an error of %d bytes", name, len(err.Error()))
		}
	}
	if n := len(s.Snapshot()); n != 0 {
		t.Errorf("%d workers", n)
	}
	mustStop(t, s)
}

func TestNamesThatAreFine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mustNew(t)
		for _, name := range []string{"a", "listener tcp [::1]:443", "Größe 測定", strings.Repeat("é", 100)} {
			mustAdd(t, s, supervise.Worker{Name: name, Run: untilDone})
		}
		mustStop(t, s)
	})
}

func TestOptionsThatAreWrong(t *testing.T) {
	_, err := supervise.New(nil, supervise.WithLogger(nil), supervise.WithMeterProvider(nil), supervise.WithEscalation(nil), supervise.WithDraining(nil))
	for _, want := range []string{"option 0 is nil", "WithLogger", "WithMeterProvider", "WithEscalation", "WithDraining"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

func TestNil(t *testing.T) {
	var none *supervise.Supervisor
	s := mustNew(t)
	for name, err := range map[string]error{
		"Add":       none.Add(supervise.Worker{Name: "w", Run: untilDone}),
		"Run":       none.Run(t.Context()),
		"Stop":      none.Stop(t.Context()),
		"Run(nil)":  s.Run(nil),  //nolint:staticcheck // what a careless caller does
		"Stop(nil)": s.Stop(nil), //nolint:staticcheck // what a careless caller does
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if all := none.Snapshot(); all == nil || len(all) != 0 {
		t.Errorf("found %v", all)
	}
	if err := s.Add(supervise.Worker{Name: "w", Run: untilDone}); err != nil {
		t.Errorf("Stop(nil) has stopped it: %v", err)
	}
	mustStop(t, s)
}

// The log has one line for an end, whose level says how bad it is.
func TestLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		records := &recorder{}
		s := mustNew(t, records.option(), supervise.WithIntensity(0, time.Second))
		for _, w := range []supervise.Worker{
			{Name: "done", Kind: supervise.Transient, Run: func(context.Context) error { return nil }},
			{Name: "broken", Kind: supervise.Temporary, Run: func(context.Context) error { return errBroken }},
			{Name: "crashed", Kind: supervise.Temporary, Run: func(context.Context) error { panic(errBroken) }},
			{Name: "given up", Run: func(context.Context) error { return errBroken }},
			{Name: "given up too", Run: func(context.Context) error { return nil }},
		} {
			mustAdd(t, s, w)
			synctest.Wait()
		}
		const want = `INFO worker ended worker=done cause=return state=stopped
WARN worker ended worker=broken cause=error error=broken state=failed
ERROR worker ended worker=crashed cause=panic error=panic: broken state=failed
WARN worker ended worker=given up cause=error error=broken state=failed
ERROR worker escalates error=supervise: worker "given up": more than 0 restarts within 1s, the last end: broken first=true
WARN worker ended worker=given up too cause=return state=failed
ERROR worker escalates error=supervise: worker "given up too": more than 0 restarts within 1s, the last end: Run returned nil first=false
`
		if got := records.String(); got != want {
			t.Errorf("logged:\n%s\nwant:\n%s", got, want)
		}
		if stack := records.attr("worker ended", "stack"); !strings.Contains(stack, "TestLog") {
			t.Errorf("the stack is %q", stack)
		}
		mustStop(t, s)
	})
	synctest.Test(t, func(t *testing.T) {
		records := &recorder{}
		s := mustNew(t, records.option())
		w, _ := fails("w", errBroken)
		mustAdd(t, s, w)
		wantState(t, s, supervise.BackingOff)
		pause, err := time.ParseDuration(records.attr("worker ended", "restart_in"))
		if got := only(t, s); err != nil || !got.Since.Add(pause).Equal(got.Next) {
			t.Errorf("the log says %v, %v, the snapshot %v", pause, err, got.Next.Sub(got.Since))
		}
		mustStop(t, s)
	})
}

func TestSnapshotAsJSON(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mustNew(t, supervise.WithBackoff(supervise.Backoff{Initial: time.Second, Max: time.Second}))
		mustAdd(t, s, supervise.Worker{Name: "good", Run: untilDone, Kind: supervise.Transient})
		bad, _ := fails("bad", errBroken)
		mustAdd(t, s, bad)
		synctest.Wait()
		next := s.Snapshot()[1].Next
		got, err := json.Marshal(s.Snapshot())
		if err != nil {
			t.Fatal(err)
		}
		want := `[{"name":"good","kind":"transient","state":"running","since":"2000-01-01T00:00:00Z","restarts":0,"panics":0},` +
			`{"name":"bad","kind":"permanent","state":"backing_off","since":"2000-01-01T00:00:00Z","next_restart":"` + next.Format(time.RFC3339Nano) + `","restarts":0,"panics":0,"last_error":"broken"}]`
		if strings.ReplaceAll(string(got), time.Now().Format(time.RFC3339), "2000-01-01T00:00:00Z") != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
		mustStop(t, s)
	})
	if got := fmt.Sprint(supervise.Kind(7), supervise.State(7)); got != "unknown unknown" {
		t.Error(got)
	}
}

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

// The default logger is the one of the time when the supervisor is made.
func TestDefaultLogger(t *testing.T) {
	records := &recorder{}
	old := slog.Default()
	slog.SetDefault(slog.New(records))
	s, err := supervise.New()
	slog.SetDefault(old)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	mustAdd(t, s, supervise.Worker{Name: "w", Kind: supervise.Transient, Run: func(context.Context) error { close(ended); return nil }})
	<-ended
	mustStop(t, s)
	if n := records.count("worker ended"); n != 1 {
		t.Errorf("logged %v", records)
	}
}
