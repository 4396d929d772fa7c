package supervise_test

import (
	"context"
	"encoding/json"
	"errors"
	"runtime"
	"strings"
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
			began := time.Now()
			if err := s.Stop(t.Context()); err == nil || !strings.Contains(err.Error(), "abandoned") || time.Since(began) != 6*time.Second {
				t.Errorf("Stop: %v after %v, want 5s for the worker and 1s for the logger", err, time.Since(began))
			}
			wantState(t, s, supervise.Abandoned)
			close(stuck)
			synctest.Wait()
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
