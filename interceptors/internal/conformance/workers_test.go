package conformance

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/supervise"
)

func mustSupervise(t testing.TB, opts ...supervise.Option) *supervise.Supervisor {
	t.Helper()
	s, err := supervise.New(append(opts, supervise.WithLogger(slog.New(slog.DiscardHandler)))...)
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

// awaitState waits until a worker is in a state.
func awaitState(t testing.TB, s *supervise.Supervisor, worker string, want supervise.State) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; runtime.Gosched() {
		for _, w := range s.Snapshot() {
			if w.Name == worker && w.State == want {
				return
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s is not %v: %+v", worker, want, s.Snapshot())
		}
	}
}

func worker(name string, more ...string) string { return labels(append(more, "worker", name)) }

// What a Prometheus server sees of workers.
func TestWorkerMetrics(t *testing.T) {
	scraper, provider := newProvider(t)
	s := mustSupervise(t, supervise.WithMeterProvider(provider), supervise.WithIntensity(0, 0),
		supervise.WithBackoff(supervise.Backoff{Initial: time.Millisecond, Max: time.Millisecond}))
	untilDone := func(ctx context.Context) error { <-ctx.Done(); return nil }
	causes := []func(){func() {}, func() { panic("asked to") }, runtime.Goexit, runtime.Goexit}
	mustAdd(t, s, supervise.Worker{Name: "outbox", Run: func(ctx context.Context) error {
		if len(causes) == 0 {
			supervise.Go(ctx, func(context.Context) { panic("asked to") })
			<-ctx.Done()
			return nil
		}
		cause := causes[0]
		causes = causes[1:]
		cause()
		return nil
	}})
	broken := supervise.Worker{Name: "import", Kind: supervise.Temporary, Run: func(context.Context) error { panic("asked to") }}
	mustAdd(t, s, broken)
	awaitState(t, s, "import", supervise.Failed)
	for s.Snapshot()[0].Restarts < 4 {
		runtime.Gosched()
	}
	awaitState(t, s, "outbox", supervise.Running)

	const restarts, panics, state = "resilience_worker_restarts_total", "resilience_worker_panics_total", "resilience_worker_state"
	want := samples{
		restarts + worker("outbox", "cause", "return"): 1,
		restarts + worker("outbox", "cause", "error"):  0,
		restarts + worker("outbox", "cause", "panic"):  1,
		restarts + worker("outbox", "cause", "goexit"): 2,
		panics + worker("outbox"):                      3,
		panics + worker("import"):                      1,
		state + worker("outbox", "state", "running"):   1,
		state + worker("import", "state", "failed"):    1,
	}
	for _, other := range []string{"backing_off", "stopped", "failed", "abandoned"} {
		want[state+worker("outbox", "state", other)] = 0
	}
	scraper.scrape().expect(t, want)

	// Added again a worker goes on counting, as counters must; scrape checks that too.
	mustAdd(t, s, broken)
	awaitState(t, s, "import", supervise.Failed)
	scraper.scrape().expect(t, samples{panics + worker("import"): 2})

	// Workers of one name are added up.
	twin := mustSupervise(t, supervise.WithMeterProvider(provider))
	mustAdd(t, twin, supervise.Worker{Name: "outbox", Run: untilDone})
	scraper.scrape().expect(t, samples{state + worker("outbox", "state", "running"): 2, panics + worker("outbox"): 3})

	scraper.until("resilience_goroutine_panics_total", 1)
	if names := families(scraper.text()); len(names) != 4 ||
		names[restarts+" counter"] != "cause worker" || names[panics+" counter"] != "worker" || names[state+" gauge"] != "state worker" {
		t.Errorf("found %v", names)
	}

	// What a supervisor observes is gone with it.
	for _, s := range []*supervise.Supervisor{s, twin} {
		if err := s.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if names := families(scraper.text()); len(names) != 1 {
		t.Errorf("after Stop there are %v", names)
	}
}

// A worker that is abandoned shows while Stop still runs.
func TestWorkerMetricsWhileStopping(t *testing.T) {
	scraper, provider := newProvider(t)
	s := mustSupervise(t, supervise.WithMeterProvider(provider))
	told, end := make(chan struct{}), make(chan struct{})
	mustAdd(t, s, supervise.Worker{Name: "slow", Run: func(ctx context.Context) error { <-ctx.Done(); close(told); <-end; return nil }})
	mustAdd(t, s, supervise.Worker{Name: "deaf", StopTimeout: time.Millisecond, Run: func(context.Context) error { <-end; return nil }})
	stopped := make(chan error, 1)
	go func() { stopped <- s.Stop(context.Background()) }()
	<-told
	scraper.scrape().expect(t, samples{
		"resilience_worker_state" + worker("slow", "state", "running"):   1,
		"resilience_worker_state" + worker("deaf", "state", "abandoned"): 1,
	})
	close(end)
	if err := <-stopped; err == nil {
		t.Error("nobody was abandoned")
	}
	awaitState(t, s, "deaf", supervise.Stopped)
}

// Collection, restarts, Add and Stop at one time wait for one another in no circle.
func TestWorkersAreCollectedWhileTheyLive(t *testing.T) {
	scraper, provider := newProvider(t)
	for range 20 {
		s := mustSupervise(t, supervise.WithMeterProvider(provider), supervise.WithIntensity(0, 0),
			supervise.WithBackoff(supervise.Backoff{Initial: time.Millisecond, Max: time.Millisecond}))
		var group sync.WaitGroup
		for range 3 {
			group.Go(func() {
				for range 10 {
					_ = scraper.text()
				}
			})
		}
		for _, name := range []string{"a", "b", "c"} {
			group.Go(func() {
				if err := s.Add(supervise.Worker{Name: name, Run: func(context.Context) error { return errors.New("broken") }}); err != nil {
					t.Error(err)
				}
			})
		}
		group.Go(func() {
			for len(s.Snapshot()) < 3 {
				runtime.Gosched()
			}
			_ = s.Stop(context.Background())
		})
		group.Wait()
	}
}

// What a Prometheus server sees of the listeners of Serve.
func TestListenerMetrics(t *testing.T) {
	scraper, provider := newProvider(t)
	guard := mustGuard(t, "server: {drain: {announce: 0s}}", interceptors.WithMeterProvider(provider), interceptors.WithSignals())
	lis := brokenOnce{bufconn.Listen(1), new(atomic.Bool)}
	served := make(chan error, 1)
	go func() { served <- guard.Serve(t.Context(), grpc.NewServer(guard.ServerOptions()...), lis) }()
	for len(guard.Snapshot().Listeners) == 0 || guard.Snapshot().Listeners[0].Restarts == 0 {
		runtime.Gosched()
	}
	const name = "listener bufconn bufconn"
	scraper.scrape().expect(t, samples{
		"resilience_worker_restarts_total" + worker(name, "cause", "error"): 1,
		"resilience_worker_panics_total" + worker(name):                     0,
		"resilience_worker_state" + worker(name, "state", "running"):        1,
		"resilience_worker_state" + worker(name, "state", "backing_off"):    0,
	})
	guard.Drain()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if got := scraper.text(); strings.Contains(got, name) {
		t.Errorf("after Serve:\n%s", got)
	}
}

// brokenOnce is a listener whose first Accept fails.
type brokenOnce struct {
	*bufconn.Listener
	failed *atomic.Bool
}

func (l brokenOnce) Accept() (net.Conn, error) {
	if !l.failed.Swap(true) {
		return nil, errors.New("asked to")
	}
	return l.Listener.Accept()
}
