package supervise_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/supervise"
)

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
