package interceptors_test

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

const drainPolicy = "server: {drain: {announce: 5s, grace: 15s, cut: 5s}}"

// running is a server that a guard serves, in virtual time, and a client.
type running struct {
	guard *interceptors.Guard
	srv   *grpc.Server
	lis   *bufconn.Listener
	conn  *grpc.ClientConn

	stop   func()     // ends the context of Serve, and waits until it has seen that
	served chan error // what Serve returned
}

// serveDrain serves s under a policy until stop is called.
func serveDrain(t *testing.T, policy string, s *rpctest.Service, opts ...interceptors.Option) *running {
	t.Helper()
	g := mustGuard(t, policy, append(opts, interceptors.WithSignals())...)
	r := &running{guard: g, srv: rpctest.NewServer(s, g.ServerOptions()...), lis: rpctest.Listen()}
	r.serve(t)
	return r
}

// serve calls Serve and connects.
func (r *running) serve(t *testing.T) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	r.stop = func() { stop(); synctest.Wait() }
	r.served = make(chan error, 1)
	go func() { r.served <- r.guard.Serve(ctx, r.srv, r.lis) }()
	r.conn = rpctest.Dial(t, r.lis)
}

// wait returns what Serve returned and how long it took to.
func (r *running) wait() (time.Duration, error) {
	began := time.Now()
	err := <-r.served
	return time.Since(began), err
}

// end expects that Serve returns nil after a time, and that nothing is left.
func (r *running) end(t *testing.T, after time.Duration) {
	t.Helper()
	if took, err := r.wait(); err != nil || took != after {
		t.Errorf("Serve returned %v after %v, want nil after %v", err, took, after)
	}
	checkIdle(t, r.guard)
}

// silence opens a connection that never begins its handshake: until it times
// out, 5s later, the server's other connections get no GOAWAY.
func (r *running) silence(t *testing.T) {
	t.Helper()
	c, err := r.lis.Dial()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	synctest.Wait()
}

// stuck is a service whose calls end only with their context.
func stuck() *rpctest.Service {
	return bothKinds(func(ctx context.Context, _ string) error {
		<-ctx.Done()
		return ctx.Err()
	})
}

// hold makes a call that is in flight when hold returns; its error comes later.
func hold(t *testing.T, a arm, conn grpc.ClientConnInterface) <-chan error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- a.call(t.Context(), conn, "held") }()
	synctest.Wait()
	return done
}

func phaseOf(g *interceptors.Guard) string { return g.Snapshot().Drain.Phase }

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func TestDrainPhases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := serveDrain(t, drainPolicy, stuck())
		cut := hold(t, arms[3], r.conn)
		if got := phaseOf(r.guard); got != "serving" {
			t.Errorf("before the drain: phase %s", got)
		}
		r.stop()
		began := time.Now()
		for _, want := range []struct {
			at       time.Duration
			phase    string
			draining bool
		}{
			{0, "announce", false},
			{5*time.Second - 1, "announce", false},
			{5*time.Second + 1, "grace", true},
			{20*time.Second - 1, "grace", true},
			{20*time.Second + 1, "stopped", true},
		} {
			time.Sleep(want.at - time.Since(began))
			synctest.Wait()
			if got := phaseOf(r.guard); got != want.phase {
				t.Errorf("after %v: phase %s, want %s", want.at, got, want.phase)
			}
			if got := isClosed(r.guard.Draining()); got != want.draining {
				t.Errorf("after %v: Draining closed is %v", want.at, got)
			}
		}
		if took, err := r.wait(); took != 0 || err == nil {
			t.Errorf("Serve returned %v, %v later; want an error at once", err, took)
		}
		if err := <-cut; status.Code(err) != codes.Unavailable {
			t.Errorf("the call that was cut: %v", err)
		}
		checkIdle(t, r.guard)
	})
}

func TestDrainServesNewCallsWhileTheirConnectionCan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := serveDrain(t, drainPolicy, &rpctest.Service{})
		r.stop()
		for _, phase := range []string{"announce", "grace"} {
			if phase == "grace" {
				time.Sleep(4 * time.Second)
				r.silence(t)
				time.Sleep(2 * time.Second)
			}
			for _, a := range arms[2:] {
				if err := a.call(t.Context(), r.conn, "new"); err != nil {
					t.Errorf("%s: %s: %v", phase, a.name, err)
				}
			}
			if got := phaseOf(r.guard); got != phase {
				t.Fatalf("phase %s, want %s", got, phase)
			}
		}
		// The silent connection is 5s old: only then can the drain go on.
		r.end(t, 3*time.Second)
	})
}

func TestDrainRejectsNewCallsOnlyIfAskedTo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := serveDrain(t, "server: {drain: {announce: 5s, grace: 15s, reject_new: true}, rules: [{methods: ['*'], timeout: 1m, stream_timeout: 1m}]}", &rpctest.Service{})
		r.stop()
		for _, a := range arms[2:] {
			if err := a.call(t.Context(), r.conn, "new"); err != nil {
				t.Errorf("announce: %s: %v", a.name, err)
			}
		}
		time.Sleep(4 * time.Second)
		r.silence(t)
		time.Sleep(2 * time.Second)
		for _, a := range arms[2:] {
			if err := a.call(t.Context(), r.conn, "new"); status.Code(err) != codes.Unavailable || reasonOf(err) != interceptors.ReasonDraining {
				t.Errorf("grace: %s: %v", a.name, err)
			}
			if got := a.state(t, r.guard).Counts; got.Rejected[interceptors.ReasonDraining] != 1 || got.Admitted != 1 {
				t.Errorf("%s: counted %+v", a.name, got)
			}
		}
		r.end(t, 3*time.Second)
	})
}

func TestDrainLosesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := serveDrain(t, drainPolicy, bothKinds(func(context.Context, string) error {
			time.Sleep(12 * time.Second)
			return nil
		}))
		calls := []<-chan error{hold(t, arms[2], r.conn), hold(t, arms[3], r.conn)}
		r.stop()
		r.end(t, 12*time.Second)
		for _, c := range calls {
			if err := <-c; err != nil {
				t.Error(err)
			}
		}
	})
}

func TestDrainingIsTheSignForStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r *running
		r = serveDrain(t, drainPolicy, &rpctest.Service{Stream: func(ss grpc.ServerStream) error {
			<-r.guard.Draining()
			return rpctest.Send(ss, "bye")
		}})
		s, err := rpctest.Open(t.Context(), r.conn, rpctest.Bidi)
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		r.stop()
		r.end(t, 5*time.Second)
		if text, err := rpctest.Recv(s); text != "bye" || err != nil {
			t.Errorf("received %q, %v", text, err)
		}
		if _, err := rpctest.Recv(s); err != io.EOF {
			t.Errorf("the stream ended with %v", err)
		}
	})
}

// drainLog keeps what a guard logs.
type drainLog struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *drainLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *drainLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *drainLog) option() interceptors.Option {
	return interceptors.WithLogger(slog.New(slog.NewTextHandler(l, nil)))
}

func TestDrainNamesWhatItCuts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := new(drainLog)
		r := serveDrain(t, drainPolicy, stuck(), log.option())
		older := hold(t, arms[3], r.conn)
		time.Sleep(2 * time.Second)
		newer := hold(t, arms[2], r.conn)
		r.stop()
		took, err := r.wait()
		const want = "interceptors: the drain cut 2 calls: /test.v1.Test/Bidi (age 22s, peer bufconn), /test.v1.Test/Unary (age 20s, peer bufconn)"
		if err == nil || err.Error() != want || took != 20*time.Second {
			t.Errorf("Serve returned after %v:\n%v, want\n%s", took, err, want)
		}
		<-older
		<-newer
		for _, line := range []string{
			`msg="drain cuts a call" method=/test.v1.Test/Bidi age=22s peer=bufconn`,
			`msg="drain cuts a call" method=/test.v1.Test/Unary age=20s peer=bufconn`,
			`msg="drain begins" cause="context ended"`,
			`msg=drain phase=announce in_flight=2`,
			`msg=drain phase=grace in_flight=2`,
			`msg=drain phase=cut in_flight=2`,
			`msg=drain phase=stopped in_flight=0`,
		} {
			if n := strings.Count(log.String(), line); n != 1 {
				t.Errorf("the log has %d times %s", n, line)
			}
		}
		if t.Failed() {
			t.Log(log)
		}
	})
}

func TestCase33_StuckStreamsAreCutInTime(t *testing.T) {
	big := strings.Repeat("x", 4<<20-100)
	for name, c := range map[string]struct {
		handler func(ss grpc.ServerStream) error
		client  func(s grpc.ClientStream)
		lasts   time.Duration
	}{
		"idle in RecvMsg": {
			handler: func(ss grpc.ServerStream) error { _, err := rpctest.Recv(ss); return err },
		},
		"half-closed, still sending": {
			handler: func(ss grpc.ServerStream) error {
				for {
					if err := rpctest.Send(ss, "more"); err != nil {
						return err
					}
					time.Sleep(900 * time.Millisecond)
				}
			},
			client: func(s grpc.ClientStream) {
				_ = s.CloseSend()
				for {
					if _, err := rpctest.Recv(s); err != nil {
						return
					}
				}
			},
		},
		"a client that does not read": {
			handler: func(ss grpc.ServerStream) error {
				for {
					if err := rpctest.Send(ss, big); err != nil {
						return err
					}
				}
			},
			lasts: 21 * time.Second, // its connection is closed
		},
		"ignores its context": {
			handler: func(grpc.ServerStream) error {
				time.Sleep(time.Hour)
				return nil
			},
			lasts: 25 * time.Second,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := serveDrain(t, drainPolicy, &rpctest.Service{Stream: c.handler})
				s, err := rpctest.Open(t.Context(), r.conn, rpctest.Bidi)
				if err != nil {
					t.Fatal(err)
				}
				if c.client != nil {
					go c.client(s)
				}
				synctest.Wait()
				r.stop()
				if took, err := r.wait(); took.Truncate(time.Second) != max(c.lasts, 20*time.Second) || err == nil || !strings.Contains(err.Error(), "cut 1 calls: /test.v1.Test/Bidi") {
					t.Errorf("Serve returned %v after %v", err, took)
				}
				time.Sleep(time.Hour)
				checkIdle(t, r.guard)
			})
		})
	}
}

// The handler has answered, 4 MB, and its client does not read: nobody knows how much
// of it is lost, but the log says that connections were closed.
func TestCase33_AnswersThatAreNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := new(drainLog)
		r := serveDrain(t, drainPolicy, &rpctest.Service{Stream: func(ss grpc.ServerStream) error {
			return rpctest.Send(ss, strings.Repeat("x", 4<<20-100))
		}}, log.option())
		s, err := rpctest.Open(t.Context(), r.conn, rpctest.ServerStream)
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		r.stop()
		r.end(t, 20*time.Second)
		if want := `msg="drain closes connections that are not done`; strings.Count(log.String(), want) != 1 {
			t.Errorf("the log lacks %s:\n%v", want, log)
		}
		if _, err := rpctest.Recv(s); status.Code(err) != codes.Unavailable {
			t.Errorf("the client has %v", err)
		}
	})
}

// A unary handler is called when its request is there, so the guard does not know of
// this call: no error names it, but the log says that connections were closed.
func TestCase33_ARequestThatIsNotSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := new(drainLog)
		r := serveDrain(t, drainPolicy, &rpctest.Service{}, log.option())
		s, err := r.conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true}, rpctest.Unary)
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		r.stop()
		r.end(t, 20*time.Second)
		if want := `or does not send its request`; strings.Count(log.String(), want) != 1 {
			t.Errorf("the log lacks %s:\n%v", want, log)
		}
		if err := s.RecvMsg(new(rpctest.Message)); status.Code(err) != codes.Unavailable {
			t.Errorf("the client has %v", err)
		}
	})
}

func TestDrainAbandonsHandlersThatIgnoreTheirContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, release := new(drainLog), make(chan struct{})
		r := serveDrain(t, drainPolicy, bothKinds(func(context.Context, string) error {
			<-release
			return nil
		}), log.option())
		call := hold(t, arms[2], r.conn)
		r.stop()
		took, err := r.wait()
		if err == nil || !strings.Contains(err.Error(), "/test.v1.Test/Unary (age 20s,") || took != 25*time.Second {
			t.Errorf("Serve returned %v after %v, want the call after 25s", err, took)
		}
		if want := `msg="drain abandons handlers that ignore their context" calls=1`; !strings.Contains(log.String(), want) {
			t.Errorf("the log lacks %s:\n%v", want, log)
		}
		if err := <-call; status.Code(err) != codes.Unavailable {
			t.Errorf("the abandoned call: %v", err)
		}
		close(release)
		synctest.Wait()
		checkIdle(t, r.guard)
	})
}

func TestShutdownCutsWhenItsContextEnds(t *testing.T) {
	for _, c := range []struct{ patience, want time.Duration }{
		{0, 0},
		{3 * time.Second, 3 * time.Second},   // in announce
		{8 * time.Second, 8 * time.Second},   // in grace
		{30 * time.Second, 20 * time.Second}, // later than the policy cuts
	} {
		t.Run(c.patience.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := mustGuard(t, drainPolicy)
				srv, lis := rpctest.NewServer(stuck(), g.ServerOptions()...), rpctest.Listen()
				served := make(chan error, 1)
				go func() { served <- srv.Serve(lis) }()
				call := hold(t, arms[2], rpctest.Dial(t, lis))

				ctx, cancel := context.WithTimeout(t.Context(), c.patience)
				defer cancel()
				began := time.Now()
				err := g.Shutdown(ctx, srv)
				if took := time.Since(began); took != c.want || err == nil || !strings.Contains(err.Error(), "cut 1 calls") {
					t.Errorf("Shutdown returned %v after %v, want the call after %v", err, took, c.want)
				}
				if err := <-served; err != nil {
					t.Errorf("grpc's Serve: %v", err)
				}
				<-call
				// It may be another server's, for which the drain is still announced.
				if err := g.Shutdown(t.Context(), srv); err != nil || time.Since(began) != max(c.want, 5*time.Second) {
					t.Errorf("a second Shutdown returned %v, %v after the first began", err, time.Since(began))
				}
				checkIdle(t, g)
			})
		})
	}
}

func TestShutdownOfAnIdleServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		for _, ctx := range []context.Context{t.Context(), ended} {
			g := mustGuard(t, drainPolicy)
			if err := g.Shutdown(ctx, rpctest.NewServer(&rpctest.Service{}, g.ServerOptions()...)); err != nil {
				t.Error(err)
			}
			if got := phaseOf(g); got != "stopped" {
				t.Errorf("phase %s", got)
			}
		}
	})
}
