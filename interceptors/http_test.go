package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/test/bufconn"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// webServer is an http.Server whose requests are all gRPC's.
func webServer(srv *grpc.Server) *http.Server {
	web := &http.Server{Handler: srv, Protocols: new(http.Protocols)}
	web.Protocols.SetUnencryptedHTTP2(true)
	return web
}

// serveWeb serves s by way of an http.Server, in virtual time.
func serveWeb(t *testing.T, g *interceptors.Guard, s *rpctest.Service) (*http.Server, *bufconn.Listener) {
	t.Helper()
	srv, lis := rpctest.NewServer(s, g.ServerOptions()...), rpctest.Listen()
	healthpb.RegisterHealthServer(srv, health.NewServer())
	web, served := webServer(srv), make(chan error, 1)
	go func() { served <- web.Serve(lis) }()
	t.Cleanup(func() {
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return web, lis
}

func TestShutdownHTTPLosesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, drainPolicy)
		web, lis := serveWeb(t, g, &rpctest.Service{
			Unary: func(_ context.Context, req *rpctest.Message) (*rpctest.Message, error) {
				time.Sleep(12 * time.Second)
				return req, nil
			},
			Stream: func(ss grpc.ServerStream) error {
				<-g.Draining()
				return rpctest.Send(ss, "bye")
			},
		})
		conn := rpctest.Dial(t, lis)
		calls := []<-chan error{hold(t, arms[2], conn), hold(t, arms[3], conn)}
		watch, err := healthpb.NewHealthClient(conn).Watch(t.Context(), &healthpb.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		began, ended := time.Now(), make(chan error, 1)
		go func() { ended <- g.ShutdownHTTP(t.Context(), web) }()
		pass(4 * time.Second)
		check, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
		if err != nil || check.GetStatus() != down || phaseOf(g) != "announce" {
			t.Errorf("health in %s: %v, %v", phaseOf(g), check, err)
		}
		calls = append(calls, hold(t, arms[2], conn)) // its last second is after the drain's first call has ended
		if err := <-ended; err != nil || time.Since(began).Truncate(time.Second) != 16*time.Second {
			t.Errorf("ShutdownHTTP returned %v after %v", err, time.Since(began))
		}
		for _, c := range calls {
			if err := <-c; err != nil {
				t.Error(err)
			}
		}
		if got, _ := statusesOf(watch); fmt.Sprint(got) != "[SERVING NOT_SERVING]" {
			t.Errorf("Watch received %v", got)
		}
		if got := phaseOf(g); got != "stopped" {
			t.Errorf("phase %s", got)
		}
		checkIdle(t, g)
	})
}

func TestShutdownHTTPCuts(t *testing.T) {
	for _, patience := range []time.Duration{3 * time.Second, time.Minute} {
		t.Run(patience.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, release := mustGuard(t, drainPolicy), make(chan struct{})
				web, lis := serveWeb(t, g, deaf(release))
				other, otherLis := serveWeb(t, g, &rpctest.Service{}) // whose calls are not its own
				defer other.Close()
				conn := rpctest.Dial(t, lis)
				var calls []*pending
				for _, a := range kinds {
					calls = append(calls, a.start(t.Context(), conn, "held"))
				}
				stream, err := rpctest.Open(t.Context(), rpctest.Dial(t, otherLis), rpctest.Bidi)
				if err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				began := time.Now()
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				err = g.ShutdownHTTP(ctx, web)
				want := min(patience, 20*time.Second) + 5*time.Second // the handlers are deaf
				if took := time.Since(began); took.Truncate(time.Second) != want || err == nil || !strings.Contains(err.Error(), "cut 4 calls") {
					t.Errorf("ShutdownHTTP returned %v after %v, want 4 calls after %v", err, took, want)
				}
				synctest.Wait()
				for i, call := range calls {
					end := call.result()
					wantCut(t, kinds[i].name, end.err)
					if end.took != want-5*time.Second {
						t.Errorf("%s: told after %v", kinds[i].name, end.took)
					}
				}
				if err := rpctest.Send(stream, "on"); err != nil {
					t.Error(err)
				}
				if text, err := rpctest.Recv(stream); text != "on" || err != nil {
					t.Errorf("a stream of another http.Server: %q, %v", text, err)
				}
				close(release)
			})
		})
	}
}

// Handlers have until the end of cut, and those whose client has gone until then or the
// end of grace, as those of gRPC's own transport.
func TestShutdownHTTPWaitsForHandlers(t *testing.T) {
	for name, c := range map[string]struct {
		gone bool // the client, in grace
		want time.Duration
		err  string
	}{
		"cut":                 {false, 22 * time.Second, "cut 1 calls"},
		"the client has gone": {true, 9 * time.Second, "<nil>"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := mustGuard(t, drainPolicy)
				web, lis := serveWeb(t, g, bothKinds(func(ctx context.Context, _ string) error {
					<-ctx.Done()
					time.Sleep(2 * time.Second) // it tidies up
					return ctx.Err()
				}))
				conn := rpctest.Dial(t, lis)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				call := arms[2].start(ctx, conn, "held")
				if c.gone {
					time.AfterFunc(7*time.Second, func() { _ = conn.Close() })
				}
				began := time.Now()
				err := g.ShutdownHTTP(t.Context(), web)
				if took := time.Since(began); took.Truncate(time.Second) != c.want || !strings.Contains(fmt.Sprint(err), c.err) {
					t.Errorf("ShutdownHTTP returned %v after %v, want %s after %v", err, took, c.err, c.want)
				}
				checkIdle(t, g)
				synctest.Wait()
				call.result()
			})
		})
	}
}

// Calls of another server, even if nobody knows of which, are not this one's to wait for.
func TestShutdownHTTPDoesNotWaitForOtherServers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, drainPolicy)
		web, _ := serveWeb(t, g, &rpctest.Service{})
		srv, lis, served := rpctest.NewServer(stuck(), g.ServerOptions()...), rpctest.Listen(), make(chan error, 1)
		go func() { served <- srv.Serve(lis) }()
		call := hold(t, arms[2], rpctest.Dial(t, lis))
		began := time.Now()
		if err := g.ShutdownHTTP(t.Context(), web); err != nil || time.Since(began) != 5*time.Second {
			t.Errorf("ShutdownHTTP returned %v after %v", err, time.Since(began))
		}
		srv.Stop()
		<-call
		if err := <-served; err != nil {
			t.Error(err)
		}
		synctest.Wait()
		checkIdle(t, g)
	})
}

// An http.Server may have other requests, too: they are not named, but do not last.
func TestShutdownHTTPEndsOtherRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, lis := mustGuard(t, drainPolicy), rpctest.Listen()
		web := &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })}
		served := make(chan error, 1)
		go func() { served <- web.Serve(lis) }()
		c, err := lis.Dial()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write([]byte("GET / HTTP/1.1\r\nHost: test\r\n\r\n")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		began := time.Now()
		go func() { _, _ = c.Read(make([]byte, 1)); _ = c.Close() }()
		err = g.ShutdownHTTP(t.Context(), web)
		if took := time.Since(began); err != nil || took.Truncate(time.Second) != 20*time.Second {
			t.Errorf("ShutdownHTTP returned %v after %v", err, took)
		}
		<-served
	})
}
