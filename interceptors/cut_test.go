package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// hungHandler is a slog.Handler that nobody reads from: it takes nothing until it
// is released.
type hungHandler struct {
	slog.Handler
	released <-chan struct{}
}

func (h hungHandler) Handle(context.Context, slog.Record) error {
	<-h.released
	return nil
}

// The log goes to a pipe, and its reader is the first to end.
func TestALoggerThatHangsDoesNotHoldUpTheDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		released := make(chan struct{})
		defer close(released)
		var began time.Time
		r := serveDrain(t, drainPolicy, bothKinds(func(ctx context.Context, _ string) error {
			<-ctx.Done()
			if after := time.Since(began); after != 20*time.Second {
				t.Errorf("a handler was cancelled after %v, want 20s", after)
			}
			return ctx.Err()
		}), interceptors.WithLogger(slog.New(hungHandler{slog.NewTextHandler(io.Discard, nil), released})))
		calls := []<-chan error{hold(t, arms[2], r.conn), hold(t, arms[3], r.conn)}
		began = time.Now()
		r.stop()
		if took, err := r.wait(); took != 21*time.Second || !strings.Contains(fmt.Sprint(err), "the drain cut 2 calls") {
			t.Errorf("Serve returned %v after %v, want 2 calls after 20s, and 1s for the logger", err, took)
		}
		for _, c := range calls {
			<-c
		}
	})
}

// wantCut checks that a client was told that its call was cut.
func wantCut(t *testing.T, what string, err error) {
	t.Helper()
	if st := status.Convert(err); st.Code() != codes.Unavailable || st.Message() != "the server is draining: the call was cut" {
		t.Errorf("%s: %v, want that it was cut", what, err)
	}
}

// kinds are the kinds of calls that a drain cuts.
var kinds = []arm{
	{"unary", "server", rpctest.Unary},
	{"server stream", "server", rpctest.ServerStream},
	{"client stream", "server", rpctest.ClientStream},
	{"bidi", "server", rpctest.Bidi},
}

// deaf is a service whose handlers ignore everything until they are released, and
// then use what they were given to the last.
func deaf(released <-chan struct{}) *rpctest.Service {
	return &rpctest.Service{
		Unary: func(ctx context.Context, req *rpctest.Message) (*rpctest.Message, error) {
			<-released
			_ = grpc.SendHeader(ctx, metadata.Pairs("late", "header"))
			_ = grpc.SetTrailer(ctx, metadata.Pairs("late", "trailer"))
			return req, nil
		},
		Stream: func(ss grpc.ServerStream) error {
			<-released
			_ = ss.SendHeader(metadata.Pairs("late", "header"))
			ss.SetTrailer(metadata.Pairs("late", "trailer"))
			return errors.Join(rpctest.Send(ss, "late"), rpctest.Send(ss, "later"), ss.RecvMsg(new(rpctest.Message)))
		},
	}
}

// Whether a handler heeds its context or not, and whether a rule is for its method
// or not: its client is told at once.
func TestCutCallsGetAStatus(t *testing.T) {
	for _, policy := range []string{
		drainPolicy,
		"server: {drain: {announce: 5s, grace: 15s, cut: 5s}, rules: [{methods: ['*'], timeout: 1m, stream_timeout: 1m, breaker: {}, concurrency_limit: {max_in_flight: 9}}]}",
	} {
		for _, heeds := range []bool{true, false} {
			t.Run(fmt.Sprintf("rules: %v, handlers that heed: %v", policy != drainPolicy, heeds), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					release := make(chan struct{})
					service, lasts := deaf(release), 25*time.Second
					if heeds {
						service, lasts = stuck(), 20*time.Second
					}
					r := serveDrain(t, policy, service)
					var calls []*pending
					for _, a := range kinds {
						calls = append(calls, a.start(t.Context(), r.conn, "held"))
					}
					r.stop()
					if took, err := r.wait(); took != lasts || err == nil || !strings.Contains(err.Error(), "cut 4 calls") {
						t.Errorf("Serve returned %v after %v, want 4 calls after %v", err, took, lasts)
					}
					synctest.Wait()
					for i, call := range calls {
						end := call.result()
						wantCut(t, kinds[i].name, end.err)
						if end.took != 20*time.Second {
							t.Errorf("%s: told after %v, want 20s", kinds[i].name, end.took)
						}
					}
					close(release)
					synctest.Wait()
					checkIdle(t, r.guard)
				})
			})
		}
	}
}

// The same over TCP, with many calls at once.
func TestCase33_HandlersThatIgnoreEverythingOverTCP(t *testing.T) {
	t.Parallel()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var handlers sync.WaitGroup
	entered := make(chan struct{}, 1000)
	handler := func(next func()) {
		handlers.Add(1)
		defer handlers.Done()
		entered <- struct{}{}
		next()
	}
	release := make(chan struct{})
	never := deaf(release)
	g := mustGuard(t, "server: {drain: {announce: 0s, grace: 0s, cut: 3s}}", interceptors.WithSignals())
	srv := rpctest.NewServer(&rpctest.Service{
		Unary: func(ctx context.Context, req *rpctest.Message) (resp *rpctest.Message, err error) {
			handler(func() { resp, err = never.Unary(ctx, req) })
			return resp, err
		},
		Stream: func(ss grpc.ServerStream) (err error) {
			handler(func() { err = never.Stream(ss) })
			return err
		},
	}, g.ServerOptions()...)
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- g.Serve(ctx, srv, lis) }()

	var clients sync.WaitGroup
	const conns, each = 3, 20
	for range conns {
		conn := dialProcess(t, lis.Addr().String())
		for _, a := range kinds {
			for range each {
				clients.Go(func() { wantCut(t, a.name, a.call(t.Context(), conn, "held")) })
			}
		}
	}
	for range conns * each * len(kinds) {
		<-entered
	}
	stop()
	if err := <-served; err == nil || !strings.Contains(err.Error(), "cut 240 calls") || !strings.Contains(err.Error(), "peer 127.0.0.1:") {
		t.Errorf("Serve returned %v", err)
	}
	clients.Wait() // while every handler still runs
	close(release)
	handlers.Wait()
}

// A call that waits for its turn is in flight, too.
func TestCallsInAQueueAreCut(t *testing.T) {
	eachServerArm(t, func(t *testing.T, a arm) {
		r := serveDrain(t, `server: {drain: {announce: 5s, grace: 15s, cut: 5s}, rules: [{methods: ['*'],
			concurrency_limit: {max_in_flight: 1, max_streams: 1, max_queue: 1, max_queue_wait: 1h}}]}`, stuck())
		calls := []*pending{a.start(t.Context(), r.conn, "held"), a.start(t.Context(), r.conn, "waits")}
		r.stop()
		if took, err := r.wait(); took != 20*time.Second || err == nil || !strings.Contains(err.Error(), "cut 2 calls") {
			t.Errorf("Serve returned %v after %v", err, took)
		}
		synctest.Wait()
		for _, call := range calls {
			wantCut(t, "a call", call.result().err)
		}
		checkIdle(t, r.guard)
	})
}

// addressed is a listener in memory with an address of its own.
type addressed struct {
	*bufconn.Listener
	addr net.Addr
}

func (l addressed) Addr() net.Addr { return l.addr }

func (l addressed) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, net.ErrClosed
	}
	return addressedConn{c, l.addr}, nil
}

type addressedConn struct {
	net.Conn
	addr net.Addr
}

func (c addressedConn) LocalAddr() net.Addr { return c.addr }

// Of two servers on one guard, one comes to the cut 5s before the other: it cuts
// and names its own calls. If their addresses do not tell them apart, it names both
// and gives no status.
func TestTheCutOfOneServerLeavesTheCallsOfAnother(t *testing.T) {
	for name, addrs := range map[string][2]net.Addr{
		"known":   {&net.TCPAddr{IP: net.IPv6unspecified, Port: 1}, &net.UnixAddr{Net: "unix", Name: "admin"}},
		"unknown": {&net.UnixAddr{Net: "unix", Name: "same"}, &net.UnixAddr{Net: "unix", Name: "same"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := mustGuard(t, drainPolicy, interceptors.WithSignals())
				var lis [2]addressed
				var served [2]chan error
				var calls [2]*pending
				for i := range lis {
					lis[i], served[i] = addressed{rpctest.Listen(), addrs[i]}, make(chan error, 1)
					srv := rpctest.NewServer(bothKinds(func(ctx context.Context, text string) error {
						if i == 1 {
							time.Sleep(18 * time.Second)
							return ctx.Err()
						}
						<-ctx.Done()
						return ctx.Err()
					}), g.ServerOptions()...)
					go func() { served[i] <- g.Serve(t.Context(), srv, lis[i]) }()
					calls[i] = arms[2+i].start(t.Context(), rpctest.Dial(t, lis[i].Listener), "held")
				}
				_ = lis[0].Close() // skips announce; the other server does not
				err := <-served[0]
				synctest.Wait()
				if got := calls[0].result(); status.Code(got.err) != codes.Unavailable || got.took != 15*time.Second {
					t.Errorf("the call of the first server: %v after %v", got.err, got.took)
				} else if name == "known" {
					wantCut(t, "the first server", got.err)
				}
				if want := map[string]string{"known": "cut 1 calls: /test.v1.Test/Unary", "unknown": "cut 2 calls"}[name]; err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("the first server: %v, want %s", err, want)
				}
				if err := <-served[1]; err != nil {
					t.Errorf("the second server: %v", err)
				}
				synctest.Wait()
				if got := calls[1].result(); !calls[1].ended() || got.err != nil {
					t.Errorf("the call of the second server: %v", got.err)
				}
				checkIdle(t, g)
			})
		})
	}
}

// Serve twice for one server, or Serve and Shutdown: whichever comes to the cut second
// finds no calls to tell, and must not close the connections before they were told.
func TestAServerThatIsDrainedTwiceTellsItsCalls(t *testing.T) {
	for name, second := range map[string]func(r *running) error{
		"Serve":    func(r *running) error { return r.guard.Serve(context.Background(), r.srv, rpctest.Listen()) },
		"Shutdown": func(r *running) error { return r.guard.Shutdown(context.Background(), r.srv) },
	} {
		t.Run(name, func(t *testing.T) {
			for range 20 {
				synctest.Test(t, func(t *testing.T) {
					log := new(drainLog)
					r := serveDrain(t, drainPolicy, stuck(), log.option())
					calls := []*pending{arms[2].start(t.Context(), r.conn, "held"), arms[3].start(t.Context(), r.conn, "held")}
					also := make(chan error, 1)
					go func() { also <- second(r) }()
					r.stop()
					_, err := r.wait()
					if err = errors.Join(err, <-also); err == nil || strings.Count(err.Error(), "(age 20s, peer bufconn)") != 2 {
						t.Errorf("the two say %v, want each call once", err)
					}
					synctest.Wait()
					for _, call := range calls {
						wantCut(t, "a call", call.result().err)
					}
					if strings.Contains(log.String(), "drain closes connections") {
						t.Errorf("the log says that connections were closed:\n%v", log)
					}
					checkIdle(t, r.guard)
				})
			}
		})
	}
}

// Connections that got no GOAWAY, because of a handshake that hangs, bring new
// calls after the cut: they are cut and named, too.
func TestCallsThatComeAfterTheCutAreCutToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := serveDrain(t, "server: {drain: {announce: 0s, grace: 1s, cut: 1s}}", stuck())
		calls := []*pending{arms[2].start(t.Context(), r.conn, "held")}
		r.silence(t)
		r.stop()
		for _, pause := range []time.Duration{1050 * time.Millisecond, 600 * time.Millisecond} {
			pass(pause)
			calls = append(calls, arms[3].start(t.Context(), r.conn, "late"))
		}
		_, err := r.wait()
		const want = "interceptors: the drain cut 3 calls: /test.v1.Test/Unary (age 1s, peer bufconn), /test.v1.Test/Bidi (age 450ms, peer bufconn), /test.v1.Test/Bidi (age 350ms, peer bufconn)"
		if fmt.Sprint(err) != want {
			t.Errorf("Serve returned %v, want\n%s", err, want)
		}
		synctest.Wait()
		for i, after := range []time.Duration{time.Second, 450 * time.Millisecond, 350 * time.Millisecond} {
			if got := calls[i].result(); got.took != after {
				t.Errorf("call %d ended after %v, want %v", i, got.took, after)
			} else {
				wantCut(t, "a call", got.err)
			}
		}
		checkIdle(t, r.guard)
	})
}

// hungStats is a stats handler that hangs when a status is written.
type hungStats struct {
	stats.Handler
	released <-chan struct{}
}

func (hungStats) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (hungStats) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (hungStats) HandleConn(context.Context, stats.ConnStats)                       {}

func (h hungStats) HandleRPC(_ context.Context, s stats.RPCStats) {
	if _, ok := s.(*stats.OutTrailer); ok {
		<-h.released
	}
}

func TestAStatsHandlerThatHangsDoesNotHoldUpTheDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, release := mustGuard(t, drainPolicy, interceptors.WithSignals()), make(chan struct{})
		r := &running{guard: g, lis: rpctest.Listen()}
		r.srv = rpctest.NewServer(deaf(release), g.ServerOptions(grpc.StatsHandler(hungStats{released: release}))...)
		r.serve(t)
		calls := []*pending{arms[2].start(t.Context(), r.conn, "held"), arms[3].start(t.Context(), r.conn, "held")}
		r.stop()
		if took, err := r.wait(); took != 25*time.Second || err == nil || !strings.Contains(err.Error(), "cut 2 calls") {
			t.Errorf("Serve returned %v after %v", err, took)
		}
		for _, call := range calls {
			got := call.result()
			wantCut(t, "a call", got.err)
			if got.took != 20*time.Second {
				t.Errorf("cut after %v", got.took)
			}
		}
		close(release)
		synctest.Wait()
		checkIdle(t, g)
	})
}

func TestDrainNamesOnlySomeOfTheCallsThatItCuts(t *testing.T) {
	for calls, want := range map[int]string{20: "peer bufconn)", 21: "and 1 more", 50: "and 30 more"} {
		synctest.Test(t, func(t *testing.T) {
			log := new(drainLog)
			r := serveDrain(t, drainPolicy, stuck(), log.option())
			// Earlier calls, whose records come back in another order.
			earlier, cancel := context.WithCancel(t.Context())
			for range calls {
				arms[2].start(earlier, r.conn, "earlier")
			}
			cancel()
			synctest.Wait()
			var all []<-chan error
			for range calls {
				all = append(all, hold(t, arms[2], r.conn))
				time.Sleep(time.Second)
			}
			r.stop()
			_, err := r.wait()
			text := fmt.Sprint(err)
			age := time.Duration(calls+20) * time.Second
			oldest := fmt.Sprintf("the drain cut %d calls: /test.v1.Test/Unary (age %v, peer bufconn), ", calls, age)
			if !strings.Contains(text, oldest) || !strings.HasSuffix(text, want) || strings.Count(text, "(age ") != 20 {
				t.Errorf("%d calls: the error is %s", calls, text)
			}
			if n := strings.Count(log.String(), "drain cuts a call"); n != 20 || !strings.Contains(log.String(), fmt.Sprintf(`msg="drain cuts a call" method=/test.v1.Test/Unary age=%v `, age)) {
				t.Errorf("%d calls: the log names %d:\n%v", calls, n, log)
			}
			if has := strings.Contains(log.String(), fmt.Sprintf(`msg="drain cuts more calls" calls=%d`, calls-20)); has != (calls > 20) {
				t.Errorf("%d calls: the log says of more: %v", calls, has)
			}
			for _, c := range all {
				<-c
			}
		})
	}
}
