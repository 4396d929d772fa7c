package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

func TestCase34_DrainFromAHandlerAndTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r *running
		r = serveDrain(t, drainPolicy, bothKinds(func(context.Context, string) error {
			r.guard.Drain()
			r.guard.Drain()
			return nil
		}))
		for _, a := range arms[2:] {
			if err := a.call(t.Context(), r.conn, "drain"); err != nil {
				t.Errorf("%s: %v", a.name, err)
			}
		}
		r.guard.Drain()
		r.end(t, 5*time.Second)
	})
}

func TestCase34_DrainBeforeServe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, drainPolicy, interceptors.WithSignals())
		g.Drain()
		if isClosed(g.Draining()) {
			t.Error("Draining is closed before the grace phase")
		}
		r := &running{guard: g, srv: rpctest.NewServer(&rpctest.Service{}, g.ServerOptions()...), lis: rpctest.Listen()}
		r.serve(t)
		if err := arms[2].call(t.Context(), r.conn, "new"); err != nil {
			t.Errorf("a call in announce: %v", err)
		}
		r.end(t, 5*time.Second)
	})
}

func TestCase34_ServeWithAnEndedContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, drainPolicy, interceptors.WithSignals())
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		began := time.Now()
		if err := g.Serve(ctx, grpc.NewServer(g.ServerOptions()...), rpctest.Listen()); err != nil || time.Since(began) != 5*time.Second {
			t.Errorf("Serve returned %v after %v", err, time.Since(began))
		}
	})
}

func TestOneDrainForAllServersOfAGuard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := serveDrain(t, drainPolicy, stuck())
		admin := &running{guard: r.guard, srv: rpctest.NewServer(&rpctest.Service{}, r.guard.ServerOptions()...), lis: rpctest.Listen()}
		admin.serve(t)
		call := hold(t, arms[2], r.conn)
		admin.stop()
		if took, err := admin.wait(); err != nil || took != 5*time.Second {
			t.Errorf("the idle server: %v after %v", err, took)
		}
		if took, err := r.wait(); err == nil || took != 15*time.Second {
			t.Errorf("the busy server: %v, %v later", err, took)
		}
		<-call

		lis := rpctest.Listen()
		err := r.guard.Serve(t.Context(), grpc.NewServer(), lis)
		wantServeError(t, err, lis, "the guard has drained")
	})
}

// The guard has stopped with the last of its servers, however each was run.
func TestTheGuardStopsWithTheLastOfItsServers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := serveDrain(t, drainPolicy, stuck())
		idle := &running{guard: r.guard, srv: rpctest.NewServer(&rpctest.Service{}, r.guard.ServerOptions()...), lis: rpctest.Listen()}
		idle.serve(t)
		call := hold(t, arms[2], r.conn)
		if err := r.guard.Serve(t.Context(), nil); err == nil {
			t.Error("Serve has no server to serve")
		}
		r.stop()
		if took, err := idle.wait(); err != nil || took != 5*time.Second {
			t.Errorf("the idle server: %v after %v", err, took)
		}
		if err := r.guard.Shutdown(t.Context(), grpc.NewServer()); err != nil {
			t.Errorf("one that never served: %v", err)
		}
		if got := phaseOf(r.guard); got != "grace" {
			t.Errorf("the busy server is in grace, the phase is %s", got)
		}
		if took, err := r.wait(); err == nil || took != 15*time.Second {
			t.Errorf("the busy server: %v, %v later", err, took)
		}
		if got := phaseOf(r.guard); got != "stopped" {
			t.Errorf("all have ended, the phase is %s", got)
		}
		<-call
	})
}

// Of two at the same time only one may register health, and none while the
// other serves: gRPC would end the process.
func TestCase34_ServeTwiceAtTheSameTime(t *testing.T) {
	for range 20 {
		g := mustGuard(t, "server: {drain: {announce: 0s}}", interceptors.WithSignals())
		srv := grpc.NewServer(g.ServerOptions()...)
		for i := range 300 { // Serve goes through them all before it registers
			srv.RegisterService(&grpc.ServiceDesc{ServiceName: fmt.Sprint("test.v1.S", i)}, nil)
		}
		g.Drain()
		var serves sync.WaitGroup
		for range 4 {
			serves.Go(func() {
				if err := g.Serve(t.Context(), srv, rpctest.Listen()); err != nil && !errors.Is(err, grpc.ErrServerStopped) && !strings.Contains(err.Error(), "the guard has drained") {
					t.Error(err)
				}
			})
		}
		serves.Wait()
	}
}

func TestCase34_ServeTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := serveDrain(t, drainPolicy, &rpctest.Service{})
		synctest.Wait()
		again := &running{guard: r.guard, srv: r.srv, lis: rpctest.Listen()}
		again.serve(t)
		for _, conn := range []*grpc.ClientConn{r.conn, again.conn} {
			if err := arms[2].call(t.Context(), conn, "new"); err != nil {
				t.Error(err)
			}
		}
		r.stop()
		r.end(t, 5*time.Second)
		again.end(t, 0)
	})
}

// TCP and a unix socket: both are served while they can be, and both are drained.
func TestCase34_SeveralListeners(t *testing.T) {
	socket := t.TempDir() + "/socket"
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	unix, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	g := mustGuard(t, "server: {drain: {announce: 0s, grace: 300ms}}", interceptors.WithSignals())
	entered, release := make(chan struct{}, 4), make(chan struct{})
	srv := rpctest.NewServer(bothKinds(func(ctx context.Context, text string) error {
		entered <- struct{}{}
		if text == "hangs" {
			<-ctx.Done()
			return ctx.Err()
		}
		<-release
		return nil
	}), g.ServerOptions()...)
	served := make(chan error, 1)
	go func() { served <- g.Serve(t.Context(), srv, tcp, unix) }()
	calls := map[string][]<-chan error{}
	for _, target := range []string{tcp.Addr().String(), "unix:" + socket} {
		conn := dialProcess(t, target)
		for _, text := range []string{"ends", "hangs"} {
			done := make(chan error, 1)
			go func() { done <- arms[3].call(t.Context(), conn, text) }()
			calls[text] = append(calls[text], done)
		}
	}
	for range cap(entered) {
		<-entered
	}
	g.Drain()
	<-g.Draining()
	close(release)
	for _, c := range calls["ends"] {
		if err := <-c; err != nil {
			t.Errorf("a call that ends: %v", err)
		}
	}
	for _, c := range calls["hangs"] {
		wantCut(t, "a call that hangs", <-c)
	}
	if err := <-served; err == nil || !strings.Contains(err.Error(), "cut 2 calls") || !strings.Contains(err.Error(), "peer 127.0.0.1:") {
		t.Errorf("Serve returned %v", err)
	}
	for _, lis := range []net.Listener{tcp, unix} {
		if c, err := net.Dial(lis.Addr().Network(), lis.Addr().String()); err == nil {
			_ = c.Close()
			t.Errorf("%v still listens", lis.Addr())
		}
	}
	checkIdle(t, g)
}

func TestAListenerOfAnotherServerFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := serveDrain(t, drainPolicy, &rpctest.Service{})
		lis, served := faultyListener(), make(chan error, 1)
		go func() {
			served <- r.guard.Serve(t.Context(), rpctest.NewServer(&rpctest.Service{}, r.guard.ServerOptions()...), lis)
		}()
		synctest.Wait()
		_ = lis.Close()
		began := time.Now()
		if err := <-served; !errors.Is(err, net.ErrClosed) || time.Since(began) != 0 {
			t.Errorf("the server without a listener: %v after %v", err, time.Since(began))
		}
		if err := arms[2].call(t.Context(), r.conn, "new"); err != nil {
			t.Errorf("a call of the other server: %v", err)
		}
		r.end(t, 5*time.Second)
	})
}

// wantServeError checks that Serve failed as told and closed its listener.
func wantServeError(t *testing.T, err error, lis *bufconn.Listener, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("Serve returned %v, want %q", err, want)
	}
	if lis != nil {
		if _, err := lis.Dial(); err == nil {
			t.Error("the listener is open")
		}
	}
}

func TestServeRefusesBadInput(t *testing.T) {
	guard := mustGuard(t, drainPolicy)
	closed := mustGuard(t, drainPolicy)
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		guard *interceptors.Guard
		ctx   context.Context
		srv   *grpc.Server
		want  string
	}{
		"nil guard":    {nil, t.Context(), grpc.NewServer(), "nil *Guard"},
		"closed guard": {closed, t.Context(), grpc.NewServer(), "the guard is closed"},
		"nil context":  {guard, nil, grpc.NewServer(), "the context is nil"},
		"nil server":   {guard, t.Context(), nil, "the server is nil"},
	} {
		t.Run(name, func(t *testing.T) {
			lis := rpctest.Listen()
			wantServeError(t, c.guard.Serve(c.ctx, c.srv, lis, nil), lis, c.want)
			if err := c.guard.Shutdown(c.ctx, c.srv); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Shutdown returned %v, want %q", err, c.want)
			}
			var web *http.Server
			if c.srv != nil {
				web = new(http.Server)
			}
			if err := c.guard.ShutdownHTTP(c.ctx, web); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("ShutdownHTTP returned %v, want %q", err, c.want)
			}
		})
	}
	t.Run("no listener", func(t *testing.T) {
		wantServeError(t, guard.Serve(t.Context(), grpc.NewServer()), nil, "no listener was given")
	})
	t.Run("nil listener", func(t *testing.T) {
		lis := rpctest.Listen()
		wantServeError(t, guard.Serve(t.Context(), grpc.NewServer(), lis, nil), lis, "a listener is nil")
	})
	t.Run("no address", func(t *testing.T) {
		lis := rpctest.Listen()
		wantServeError(t, guard.Serve(t.Context(), grpc.NewServer(), namedListener{Listener: lis}), lis, "a listener has no address")
	})
	if got := phaseOf(guard); got != "serving" {
		t.Errorf("what was refused changed the phase to %s", got)
	}
}

func TestServeFindsRulesForMethodsThatTheServerLacks(t *testing.T) {
	g := mustGuard(t, `server: {drain: {announce: 0s}, rules: [{timeout: 1s, methods: [
		'/test.v1.Test/Unary', '/test.v1.Test/Bidi', '/grpc.health.v1.Health/Check', '/other.v1.Other/*',
		'/test.v1.Test/Unari', '/grpc.health.v1.Health/Czech', '/test.v2.Test/Unary']}]}`)
	g.Drain() // so that a Serve which finds nothing ends too
	lis := rpctest.Listen()
	err := g.Serve(t.Context(), rpctest.NewServer(&rpctest.Service{}, g.ServerOptions()...), lis)
	wantServeError(t, err, lis, "the server has no method /grpc.health.v1.Health/Czech\n"+
		"interceptors: server.rules: the server has no method /test.v1.Test/Unari\n"+
		"interceptors: server.rules: the server has no method /test.v2.Test/Unary")
	if err != nil && strings.Count(err.Error(), "\n") != 2 {
		t.Errorf("more was found than is wrong:\n%v", err)
	}
}

func TestTheServerIsStoppedBySomebodyElse(t *testing.T) {
	for name, c := range map[string]struct {
		before bool // Serve is called
		want   error
	}{
		"while it serves":  {false, nil},
		"before it serves": {true, grpc.ErrServerStopped},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := mustGuard(t, drainPolicy, interceptors.WithSignals())
				srv := grpc.NewServer(g.ServerOptions()...)
				if c.before {
					srv.Stop()
				}
				served := make(chan error, 1)
				go func() { served <- g.Serve(t.Context(), srv, rpctest.Listen(), rpctest.Listen()) }()
				synctest.Wait()
				began := time.Now()
				srv.Stop()
				if err := <-served; !errors.Is(err, c.want) || time.Since(began) != 0 {
					t.Errorf("Serve returned %v after %v, want %v at once", err, time.Since(began), c.want)
				}
			})
		})
	}
}

func TestTheDrainSurvivesALoggerThatPanics(t *testing.T) {
	for name, c := range map[string]struct {
		service *rpctest.Service
		after   time.Duration
		want    string // in the error
	}{
		"nothing is cut": {&rpctest.Service{}, 5 * time.Second, ""},
		"a call is cut":  {stuck(), 20 * time.Second, "the drain cut 1 calls"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := mustGuard(t, drainPolicy, interceptors.WithSignals(), interceptors.WithLogger(slog.New(minedHandler{})))
				srv, lis := rpctest.NewServer(c.service, g.ServerOptions()...), rpctest.Listen()
				ctx, stop := context.WithCancel(t.Context())
				var err error
				served := make(chan any)
				go func() { served <- survive(func() { err = g.Serve(ctx, srv, lis) }) }()
				call := hold(t, arms[2], rpctest.Dial(t, lis))
				stop()
				began := time.Now()
				if p := <-served; p != nil {
					srv.Stop()
					t.Fatalf("%v came through", p)
				}
				if took := time.Since(began); took != c.after || (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
					t.Errorf("Serve returned %v after %v, want %q after %v", err, took, c.want, c.after)
				}
				<-call
				checkIdle(t, g)
			})
		})
	}
}

func TestCase31_SilentConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := serveDrain(t, drainPolicy, stuck())
		call := hold(t, arms[3], r.conn)
		r.stop()
		time.Sleep(5*time.Second - 1)
		r.silence(t)
		if took, err := r.wait(); err == nil || took != 15*time.Second+1 {
			t.Errorf("Serve returned %v after %v, want the cut of the stream after 15s", err, took)
		}
		<-call
	})
}
