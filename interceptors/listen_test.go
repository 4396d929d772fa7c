package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
	"github.com/grpc-resilience/grpc-resilience/interceptors/supervise"
)

// faulty is a listener in memory whose Accept fails when it is told to. Closed, it
// says so as those of package net do.
type faulty struct {
	*bufconn.Listener
	conns   chan net.Conn
	fault   chan func() error // what an Accept returns that waits
	accepts atomic.Int32
}

func faultyListener() *faulty {
	l := &faulty{Listener: rpctest.Listen(), conns: make(chan net.Conn), fault: make(chan func() error)}
	go func() {
		defer close(l.conns)
		for {
			c, err := l.Listener.Accept()
			if err != nil {
				return
			}
			l.conns <- c
		}
	}()
	return l
}

func (l *faulty) Accept() (net.Conn, error) {
	l.accepts.Add(1)
	select {
	case f := <-l.fault:
		return nil, f()
	case c, ok := <-l.conns:
		if !ok {
			return nil, &net.OpError{Op: "accept", Net: "bufconn", Err: net.ErrClosed}
		}
		return c, nil
	}
}

// failUntil has the Accept that waits fail, and those that follow until ended is closed.
func (l *faulty) failUntil(ended <-chan struct{}, err error) {
	for {
		select {
		case l.fault <- func() error { return err }:
		case <-ended:
			return
		}
	}
}

// errAccept is as what the system returns when it is out of memory: gRPC gives up.
var errAccept = &net.OpError{Op: "accept", Net: "tcp", Err: syscall.ENOBUFS}

// serveAll serves s on listeners, until stop is called.
func serveAll(t *testing.T, s *rpctest.Service, lis []net.Listener, opts ...interceptors.Option) (g *interceptors.Guard, stop func(), served <-chan error) {
	t.Helper()
	g = mustGuard(t, drainPolicy, append(opts, interceptors.WithSignals())...)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- g.Serve(ctx, rpctest.NewServer(s, g.ServerOptions()...), lis...) }()
	synctest.Wait()
	return g, func() { cancel(); synctest.Wait() }, ended
}

// listenersOf is their state in the snapshot.
func listenersOf(g *interceptors.Guard) string {
	var all []string
	for _, l := range g.Snapshot().Listeners {
		all = append(all, fmt.Sprintf("%s: %v, %d restarts, %d panics, %q", l.Name, l.State, l.Restarts, l.Panics, l.LastError))
	}
	return strings.Join(all, "\n")
}

func wantListeners(t *testing.T, g *interceptors.Guard, want ...string) {
	t.Helper()
	if got := listenersOf(g); got != strings.Join(want, "\n") {
		t.Errorf("the listeners are\n%s\nwant\n%s", got, strings.Join(want, "\n"))
	}
}

func wantPortClosed(t *testing.T, lis *bufconn.Listener) {
	t.Helper()
	if c, err := lis.Dial(); err == nil {
		_ = c.Close()
		t.Error("the port is open")
	}
}

// Calls in flight go on, and connections that come meanwhile are served, by the same
// listener. A logger that hangs is no hindrance.
func TestAnAcceptThatFailsIsTriedAgain(t *testing.T) {
	for name, c := range map[string]struct {
		fault  func() error
		panics int // of each
		want   string
	}{
		"an error": {func() error { return errAccept }, 0, "accept tcp: no buffer space available"},
		"a panic":  {func() error { panic("a bug") }, 1, "panic: a bug"},
	} {
		for _, hangs := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", the logger hangs: ", hangs), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					lis, released := faultyListener(), make(chan struct{})
					if hangs {
						defer close(released)
					} else {
						close(released)
					}
					g, stop, served := serveAll(t, bothKinds(func(_ context.Context, text string) error {
						if text == "held" {
							time.Sleep(time.Minute)
						}
						return nil
					}), []net.Listener{lis}, interceptors.WithLogger(slog.New(hungHandler{slog.NewTextHandler(io.Discard, nil), released})))
					conn := rpctest.Dial(t, lis.Listener)
					held := hold(t, arms[2], conn)
					for n := range 3 {
						lis.fault <- c.fault
						synctest.Wait()
						if got := g.Snapshot().Listeners[0].State; got != supervise.BackingOff {
							t.Errorf("the listener is %v", got)
						}
						for _, cc := range []string{"an old connection", "a new one"} {
							if cc == "a new one" {
								conn = rpctest.Dial(t, lis.Listener)
							}
							if err := arms[3].call(t.Context(), conn, "new"); err != nil {
								t.Errorf("a call by %s: %v", cc, err)
							}
						}
						wantListeners(t, g, fmt.Sprintf("listener bufconn bufconn: running, %d restarts, %d panics, %q", n+1, (n+1)*c.panics, c.want))
					}
					time.Sleep(time.Minute)
					if err := <-held; err != nil {
						t.Errorf("the call in flight: %v", err)
					}
					stop()
					if err := arms[3].call(t.Context(), rpctest.Dial(t, lis.Listener), "new"); err != nil {
						t.Errorf("a call in announce: %v", err)
					}
					if err := <-served; err != nil {
						t.Errorf("Serve returned %v", err)
					}
					wantPortClosed(t, lis.Listener)
					checkIdle(t, g)
				})
			})
		}
	}
}

// What gRPC itself tries again is no end of a worker.
func TestATemporaryErrorIsLeftToGRPC(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lis := faultyListener()
		g, stop, served := serveAll(t, &rpctest.Service{}, []net.Listener{lis})
		tooMany := &net.OpError{Op: "accept", Net: "tcp", Err: syscall.EMFILE}
		for range 20 {
			lis.fault <- func() error { return tooMany }
		}
		if err := arms[2].call(t.Context(), rpctest.Dial(t, lis.Listener), "new"); err != nil {
			t.Error(err)
		}
		wantListeners(t, g, `listener bufconn bufconn: running, 0 restarts, 0 panics, ""`)
		lis.fault <- func() error { return tooMany } // the drain begins while gRPC waits
		stop()
		if err := <-served; err != nil {
			t.Errorf("Serve returned %v", err)
		}
		wantPortClosed(t, lis.Listener)
	})
}

// gRPC closes the listener to end an Accept, also one that has failed before.
func TestTheServerIsStoppedAfterATemporaryError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, lis, served := mustGuard(t, drainPolicy, interceptors.WithSignals()), faultyListener(), make(chan error, 1)
		srv := grpc.NewServer(g.ServerOptions()...)
		go func() { served <- g.Serve(t.Context(), srv, lis) }()
		lis.fault <- func() error { return syscall.EMFILE }
		time.Sleep(time.Second)
		began := time.Now()
		go srv.GracefulStop()
		synctest.Wait()
		wantPortClosed(t, lis.Listener)
		_ = lis.Close()
		if err := <-served; err != nil || time.Since(began) != 0 {
			t.Errorf("Serve returned %v after %v", err, time.Since(began))
		}
	})
}

// A listener that was closed cannot come back; one that fails on and on is given up,
// and so is one that does not say that it was closed, as bufconn's.
func TestAListenerFails(t *testing.T) {
	const soonest, latest = 1250 * time.Millisecond, 3750 * time.Millisecond
	for name, c := range map[string]struct {
		mute            bool // it does not say that it was closed
		fails           bool // or else it is closed
		want            string
		soonest, latest time.Duration // it is given up
	}{
		"closed":                   {want: "interceptors: Serve: listener bufconn bufconn: accept bufconn: use of closed network connection"},
		"closed, in its own words": {mute: true, want: "interceptors: Serve: listener bufconn bufconn: closed", soonest: soonest, latest: latest},
		"fails on and on":          {fails: true, want: "interceptors: Serve: listener bufconn bufconn: accept tcp: no buffer space available", soonest: soonest, latest: latest},
	} {
		for _, spare := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", another goes on: ", spare), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					mem, other, ended := rpctest.Listen(), rpctest.Listen(), make(chan struct{})
					defer close(ended)
					lis := []net.Listener{mem}
					if !c.mute {
						failing := faultyListener()
						mem, lis[0] = failing.Listener, failing
					}
					if spare {
						lis = append(lis, other)
					}
					g, _, served := serveAll(t, bothKinds(func(context.Context, string) error {
						time.Sleep(8 * time.Second)
						return nil
					}), lis)
					call := hold(t, arms[2], rpctest.Dial(t, mem))
					began := time.Now()
					if c.fails {
						go lis[0].(*faulty).failUntil(ended, errAccept)
					} else {
						_ = mem.Close()
					}
					synctest.Wait()
					for phaseOf(g) == "serving" {
						time.Sleep(time.Millisecond)
						synctest.Wait()
					}
					if took := time.Since(began); took < c.soonest || took > c.latest+time.Millisecond {
						t.Errorf("the drain began after %v", took)
					}
					wantPortClosed(t, mem)
					lasts := 8*time.Second - time.Since(began) // without announce, until the call ends
					began = time.Now()
					if spare {
						if got := phaseOf(g); got != "announce" {
							t.Errorf("the phase is %s", got)
						}
						if err := arms[2].call(t.Context(), rpctest.Dial(t, other), "new"); err != nil {
							t.Errorf("a call by way of the other listener: %v", err)
						}
						lasts = 8 * time.Second
					}
					err := <-served
					if took := time.Since(began); err == nil || err.Error() != c.want || took != lasts {
						t.Errorf("Serve returned %v after %v, want %s after %v", err, took, c.want, lasts)
					}
					if err := <-call; err != nil {
						t.Errorf("the call in flight: %v", err)
					}
					checkIdle(t, g)
				})
			})
		}
	}
}

// In a drain nothing is tried again, whether the listener fails then or has failed
// before: its port is closed at once, so that clients go elsewhere.
func TestCase37_AListenerThatFailsDuringTheDrain(t *testing.T) {
	for name, c := range map[string]struct {
		before bool // the drain begins
		fault  error
		want   error
	}{
		"in announce":        {false, errAccept, syscall.ENOBUFS},
		"closed in announce": {false, net.ErrClosed, net.ErrClosed},
		"before":             {true, errAccept, syscall.ENOBUFS},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				failing, spare := faultyListener(), rpctest.Listen()
				g, _, served := serveAll(t, &rpctest.Service{}, []net.Listener{failing, spare})
				conn := rpctest.Dial(t, failing.Listener)
				call := func(what string, conn *grpc.ClientConn) {
					if err := arms[2].call(t.Context(), conn, "new"); err != nil {
						t.Errorf("a call by %s: %v", what, err)
					}
				}
				call("the connection", conn)
				accepts := failing.accepts.Load()
				fail := func() {
					failing.fault <- func() error { return c.fault }
					synctest.Wait()
				}
				if c.before {
					fail()
				}
				g.Drain()
				synctest.Wait()
				if !c.before {
					fail()
				}
				began := time.Now()
				wantPortClosed(t, failing.Listener)
				time.Sleep(4 * time.Second)
				call("the connection", conn)
				call("the other listener", rpctest.Dial(t, spare))
				wantListeners(t, g,
					fmt.Sprintf("listener bufconn bufconn: failed, 0 restarts, 0 panics, %q", c.fault.Error()),
					`listener bufconn bufconn #2: running, 0 restarts, 0 panics, ""`)
				if err := <-served; !errors.Is(err, c.want) || time.Since(began) != 5*time.Second {
					t.Errorf("Serve returned %v after %v, want %v after 5s", err, time.Since(began), c.want)
				}
				if got := failing.accepts.Load(); got != accepts {
					t.Errorf("%d more Accepts", got-accepts)
				}
				if got := listenersOf(g); !strings.Contains(got, "#2: stopped, 0 restarts") {
					t.Errorf("the listeners are\n%s", got)
				}
			})
		})
	}
}

// namedListener has an address that a user made up.
type namedListener struct {
	*bufconn.Listener
	addr net.Addr
}

func (l namedListener) Addr() net.Addr { return l.addr }

func TestListenersAreNamedByTheirAddresses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tcp := &net.TCPAddr{IP: net.IPv6loopback, Port: 8080}
		var lis []net.Listener
		for _, a := range []net.Addr{
			tcp, tcp, &net.UnixAddr{Net: "unix", Name: "/run/\x00\xff"},
			&net.UnixAddr{Net: "unix", Name: strings.Repeat("ä", 200)}, &net.UnixAddr{Net: "unix", Name: strings.Repeat("ä", 201)},
		} {
			lis = append(lis, namedListener{rpctest.Listen(), a})
		}
		g, stop, served := serveAll(t, &rpctest.Service{}, lis)
		long := "listener unix " + strings.Repeat("ä", 76)
		var want []string
		for _, name := range []string{"listener tcp [::1]:8080", "listener tcp [::1]:8080 #2", "listener unix /run/??", long, long + " #2"} {
			want = append(want, name+`: running, 0 restarts, 0 panics, ""`)
		}
		wantListeners(t, g, want...)
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}

// sharedListener is two in one, as those that tell protocols apart: closing one
// closes the other.
type sharedListener struct{ *faulty }

func (l sharedListener) Close() error {
	err := l.faulty.Close()
	time.Sleep(time.Millisecond) // the other has noticed
	return err
}

func TestListenersThatCloseEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lis := sharedListener{faultyListener()}
		_, stop, served := serveAll(t, &rpctest.Service{}, []net.Listener{lis, lis})
		stop()
		if err := <-served; err != nil {
			t.Errorf("Serve returned %v", err)
		}
	})
}

// hungListener is one whose Accept does not end when it is closed, or whose Close
// does not end.
type hungListener struct {
	*bufconn.Listener
	accept, close <-chan struct{}
}

func (l hungListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.accept
	}
	return c, err
}

func (l hungListener) Close() error {
	<-l.close
	return l.Listener.Close()
}

// gRPC's GracefulStop and Stop wait for them for ever.
func TestAListenerThatHangsDoesNotHoldUpTheDrain(t *testing.T) {
	for name, hangs := range map[string]struct{ accept, close bool }{
		"Accept": {true, false},
		"Close":  {false, true},
		"both":   {true, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				released, release := make(chan struct{}), make(chan struct{})
				close(released)
				lis := hungListener{rpctest.Listen(), released, released}
				if hangs.accept {
					lis.accept = release
				}
				if hangs.close {
					lis.close = release
				}
				g, stop, served := serveAll(t, stuck(), []net.Listener{lis})
				call := hold(t, arms[2], rpctest.Dial(t, lis.Listener))
				stop()
				began := time.Now()
				if err := <-served; time.Since(began) != 25*time.Second || err == nil || !strings.Contains(err.Error(), "cut 1 calls") {
					t.Errorf("Serve returned %v after %v", err, time.Since(began))
				}
				wantCut(t, "the call", <-call)
				close(release)
				synctest.Wait()
				checkIdle(t, g)
			})
		})
	}
}
