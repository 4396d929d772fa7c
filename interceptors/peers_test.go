package interceptors_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// Beginnings of connections that go no further.
const (
	clientHello = "\x16\x03\x01\x02\x00\x01\x00"                                              // of TLS, its first bytes
	preface     = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + "\x00\x00\x00\x04\x00\x00\x00\x00\x00" // of HTTP/2, with empty SETTINGS
)

// peers are those that a server waits for in a drain.
var peers = []struct {
	name      string
	says      string // then nothing more
	reads     bool
	tls       bool // the server wants TLS
	handshake bool // it never ends
}{
	{name: "silent", handshake: true},
	{name: "half a preface", says: preface[:10], handshake: true},
	{name: "silent to TLS", tls: true, handshake: true},
	{name: "stalled TLS handshake", says: clientHello, tls: true, handshake: true},
	{name: "acknowledges nothing", says: preface, reads: true},
	{name: "acknowledges nothing and does not read", says: preface},
}

// join makes a connection a peer's.
func join(t *testing.T, c net.Conn, says string, reads bool) {
	t.Helper()
	t.Cleanup(func() { _ = c.Close() })
	if _, err := c.Write([]byte(says)); err != nil {
		t.Fatal(err)
	}
	if reads {
		go func() { _, _ = io.Copy(io.Discard, c) }()
	}
}

// serverTLS is the credentials of a server, which a client need not know.
func serverTLS(t *testing.T) credentials.TransportCredentials {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return credentials.NewServerTLSFromCert(&tls.Certificate{Certificate: [][]byte{cert}, PrivateKey: key})
}

var clientTLS = grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true}))

// The peers come in the last moment before grace. They hold up gRPC's GOAWAY, or its
// GracefulStop, for 5s: the calls that end are answered, one that hangs is cut when
// grace is over, and Serve returns in time.
func TestCase31_PeersThatHoldUpADrain(t *testing.T) {
	type lasts struct{ handshake, open time.Duration } // a drain, with either kind of peers
	for name, c := range map[string]struct {
		policy      string
		grace       time.Duration // its end
		hung, clean lasts         // if a call hangs, or none does
	}{
		"grace is longer than peers can hold it up": {drainPolicy, 20 * time.Second,
			lasts{20 * time.Second, 20 * time.Second}, lasts{10 * time.Second, 11 * time.Second}},
		"grace is shorter": {"server: {drain: {announce: 5s, grace: 1s, cut: 1s}}", 6 * time.Second,
			lasts{7 * time.Second, 6*time.Second + 500*time.Millisecond}, lasts{7 * time.Second, 6 * time.Second}},
	} {
		for _, p := range peers {
			for _, hangs := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s/%s/a call hangs: %v", name, p.name, hangs), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						g := mustGuard(t, c.policy, interceptors.WithSignals())
						var extra []grpc.ServerOption
						var dial []grpc.DialOption
						if p.tls {
							extra, dial = append(extra, grpc.Creds(serverTLS(t))), append(dial, clientTLS)
						}
						r := &running{guard: g, lis: rpctest.Listen()}
						r.srv = rpctest.NewServer(bothKinds(func(ctx context.Context, text string) error {
							if text == "stuck" {
								<-ctx.Done()
								return ctx.Err()
							}
							time.Sleep(5500 * time.Millisecond)
							return nil
						}), g.ServerOptions(extra...)...)
						r.serve(t)
						conn := rpctest.Dial(t, r.lis, dial...)
						ends := []*pending{arms[2].start(t.Context(), conn, "ends"), arms[3].start(t.Context(), conn, "ends")}
						var cut []*pending
						if hangs {
							cut = []*pending{arms[2].start(t.Context(), conn, "stuck"), arms[3].start(t.Context(), conn, "stuck")}
						}
						r.stop()
						time.Sleep(5*time.Second - 1)
						raw, err := r.lis.Dial()
						if err != nil {
							t.Fatal(err)
						}
						join(t, raw, p.says, p.reads)
						took, err := r.wait()
						took += 5*time.Second - 1
						all := map[bool]lasts{true: c.hung, false: c.clean}[hangs]
						want := map[bool]time.Duration{true: all.handshake, false: all.open}[p.handshake]
						if took != want && took != want-1 || (err != nil) != hangs {
							t.Errorf("Serve returned %v after %v, want %v", err, took, want)
						}
						synctest.Wait()
						for _, call := range ends {
							if got := call.result(); !call.ended() || got.err != nil {
								t.Errorf("a call that ends: %v", got.err)
							}
						}
						for _, call := range cut {
							got := call.result()
							wantCut(t, "a call that hangs", got.err)
							if got.took != c.grace {
								t.Errorf("it was cut after %v", got.took)
							}
						}
						checkIdle(t, g)
					})
				})
			}
		}
	}
}

// cable is a connection that can be pulled: nothing comes through any more, and
// nobody is told.
type cable struct {
	net.Conn
	pulled <-chan struct{}
}

func (c cable) Write(p []byte) (int, error) {
	if isClosed(c.pulled) {
		return len(p), nil
	}
	return c.Conn.Write(p)
}

func (c cable) Read(p []byte) (int, error) {
	for {
		n, err := c.Conn.Read(p)
		if err != nil || !isClosed(c.pulled) {
			return n, err
		}
	}
}

func TestCase31_HalfOpenConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pull := make(chan struct{})
		r := serveDrain(t, drainPolicy, stuck())
		far := rpctest.Dial(t, r.lis, grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			c, err := r.lis.DialContext(ctx)
			return cable{c, pull}, err
		}))
		for _, a := range kinds[1:] {
			s, err := rpctest.Open(t.Context(), far, a.method)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(rpctest.Send(s, "hello"), s.CloseSend()); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		close(pull)
		r.stop()
		if took, err := r.wait(); took != 21*time.Second || err == nil || !strings.Contains(err.Error(), "cut 3 calls") {
			t.Errorf("Serve returned %v after %v, want 3 calls after 21s", err, took)
		}
		synctest.Wait()
		checkIdle(t, r.guard)
	})
}

// All at once: handlers, the logger and the stats handler hang, peers hold up their
// handshakes, acknowledge nothing and do not read. The drain ends in time.
func TestWhateverHangsTheDrainEndsInTime(t *testing.T) {
	for policy, phases := range map[string]time.Duration{
		drainPolicy: 25 * time.Second,
		"server: {drain: {announce: 0s, grace: 0s, cut: 0s}}":   0,
		"server: {drain: {announce: 1s, grace: 1s, cut: 50ms}}": 2050 * time.Millisecond,
	} {
		t.Run(phases.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				release := make(chan struct{})
				log := interceptors.WithLogger(slog.New(hungHandler{slog.NewTextHandler(io.Discard, nil), release}))
				r := &running{guard: mustGuard(t, policy, interceptors.WithSignals(), log), lis: rpctest.Listen()}
				r.srv = rpctest.NewServer(deaf(release), r.guard.ServerOptions(grpc.StatsHandler(hungStats{released: release}))...)
				r.serve(t)
				for _, a := range kinds {
					a.start(t.Context(), r.conn, "held")
				}
				for _, p := range peers {
					raw, err := r.lis.Dial()
					if err != nil {
						t.Fatal(err)
					}
					join(t, raw, p.says, p.reads)
				}
				r.stop()
				if took, err := r.wait(); took != phases+time.Second || err == nil || !strings.Contains(err.Error(), "cut 4 calls") {
					t.Errorf("Serve returned %v after %v, want 4 calls after %v and 1s for the logger", err, took, phases)
				}
				close(release)
				_ = r.conn.Close()
				r.srv.Stop()
			})
		})
	}
}

func TestCase31_PeersThatHoldUpADrainOverTCP(t *testing.T) {
	for _, mode := range []string{"", "tls"} {
		t.Run("mode "+mode, func(t *testing.T) {
			t.Parallel()
			p := startProcess(t, "127.0.0.1:0", mode, "server: {drain: {announce: 0s, grace: 300ms, cut: 2s}}")
			var dial []grpc.DialOption
			if mode == "tls" {
				dial = append(dial, clientTLS)
			}
			conn := dialProcess(t, p.addr, dial...)
			held, stuck := p.begin(conn, "held"), p.begin(conn, "stuck")
			for _, peer := range peers {
				if peer.tls == (mode == "tls") {
					raw, err := net.Dial("tcp", p.addr)
					if err != nil {
						t.Fatal(err)
					}
					join(t, raw, peer.says, peer.reads)
				}
			}
			p.signal(syscall.SIGTERM)
			p.expect("phase=grace in_flight=2")
			_ = p.release.Close()
			if err := <-held; err != nil {
				t.Errorf("the call that ended: %v", err)
			}
			wantCut(t, "the call that hung", <-stuck)
			said := p.exit(1)
			if want := "Serve: interceptors: the drain cut 1 calls: /test.v1.Test/Unary (age "; !strings.Contains(said, want) {
				t.Errorf("the server does not say %q:\n%s", want, said)
			}
		})
	}
}
