package interceptors

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/policy"
)

// handshakeTimeout bounds how long a connection that never finishes its
// handshake can hold up a drain.
const handshakeTimeout = 5 * time.Second

// Serve serves srv on the listeners until ctx ends, a signal comes (see
// WithSignals), Drain is called or a listener is given up, then drains as the policy's
// server.drain says and returns. It registers a health service unless srv has
// one; so srv must not be serving already: gRPC would end the process. The
// listeners are closed when grace begins.
//
// Each listener has a worker of package supervise. One whose Accept fails (with an
// error that gRPC takes for temporary it tries again itself) is tried again after 100ms,
// the pause doubling up to 1s; with the sixth failure within a minute it is given up. So is
// one that was closed, at once: its Accept says net.ErrClosed. In a drain nothing is tried
// again: the port of a listener that has failed is closed. Connections and calls are
// not affected by any of this. Snapshot and the metrics resilience.worker.* show how the
// listeners are.
//
// SIGTERM, and the end of ctx, start the full drain: announce, grace, cut.
// SIGINT skips announce, and a SIGINT during a drain cuts at once; a second
// SIGTERM is ignored. (After the end of ctx the first SIGINT only skips announce:
// it may be what ended ctx, by way of signal.NotifyContext.) A signal that comes
// before Serve is the program's. The error is nil after a drain that cut nothing;
// otherwise it lists the calls that were cut (the 20 oldest, and how many more there
// were), and the listeners that had failed. Of a server that is drained by another
// Serve or by Shutdown at the same time each call is in one of the errors.
//
// The client of a call that is cut gets UNAVAILABLE, and its handler's context is
// cancelled. Handlers that have not ended when cut is over go on without a client,
// and Serve returns. It takes no longer than the phases, and up to 1s for a logger
// that hangs.
//
// A guard drains once, all of its servers together: a drain of one makes every
// other Serve of the guard drain, and Serve refuses to start after it.
func (g *Guard) Serve(ctx context.Context, srv *grpc.Server, lis ...net.Listener) error {
	ls, err := g.prepare(ctx, srv, lis)
	if err != nil {
		for _, l := range lis {
			if l != nil {
				_ = l.Close()
			}
		}
		return err
	}
	j := ls.journal
	defer j.close()
	g.drain.servers.Add(1)
	g.drain.listen(ls)
	signals := make(chan os.Signal, 8)
	if len(g.opts.signals) > 0 {
		signal.Notify(signals, g.opts.signals...)
		defer signal.Stop(signals)
	}
	ls.start()
	cutNow, cut := context.WithCancel(context.Background())
	defer cut()
	announced, skip := context.WithCancel(cutNow)

	var stopped error
	patient := false
	select {
	case <-ctx.Done():
		j.log(slog.LevelInfo, "drain begins", slog.String("cause", "context ended"))
		patient = true
	case s := <-signals:
		j.log(slog.LevelInfo, "drain begins", slog.String("cause", s.String()))
		if s == os.Interrupt {
			skip()
		}
	case <-g.drain.asked:
		j.log(slog.LevelInfo, "drain begins", slog.String("cause", "asked to"))
	case err := <-ls.failed:
		j.log(slog.LevelError, "drain begins", slog.String("cause", "a listener failed"), slog.Any("error", err))
		if ls.serving() == 0 {
			skip() // nobody is served who could be told
		}
	case stopped = <-ls.stopped:
		j.log(slog.LevelError, "drain begins", slog.String("cause", "the server was stopped"), slog.Any("error", stopped))
		skip()
	}
	g.enter(announcing, j)
	ls.closeFailed()
	go func() {
		for {
			select {
			case s := <-signals:
				switch {
				case s != os.Interrupt: // kubelet repeats SIGTERM
				case patient:
					patient = false
					skip()
				default:
					cut()
				}
			case <-cutNow.Done():
				return
			}
		}
	}()
	returned, end := context.WithCancel(context.Background())
	defer end()
	err = g.shutDown(announced, cutNow, srv, func() {
		ls.stop(returned)
		srv.GracefulStop()
	}, j)
	return errors.Join(stopped, ls.err(), err)
}

// Shutdown drains srv as the policy's server.drain says, for those who call
// srv.Serve themselves; when ctx ends, what still runs is cut at once: by closing
// its connection, for which gRPC's clients say UNAVAILABLE. The error is nil if
// nothing was cut, otherwise it lists the calls that were, as that of Serve does,
// and those of other servers on which Shutdown is called. Called from a handler it
// would wait for that handler: use Drain there. For a server behind http.Server it
// is ShutdownHTTP.
func (g *Guard) Shutdown(ctx context.Context, srv *grpc.Server) error {
	if err := g.usable(); err != nil {
		return err
	}
	switch {
	case ctx == nil:
		return errors.New("interceptors: Shutdown: the context is nil")
	case srv == nil:
		return errors.New("interceptors: Shutdown: the server is nil")
	}
	return g.shutDownOne(ctx, srv, srv.GracefulStop)
}

// ShutdownHTTP is Shutdown for gRPC calls that come by way of an http.Server, whose
// handler calls grpc.Server.ServeHTTP. In place of gRPC's GracefulStop, which would
// cut them, it calls srv.Shutdown when grace begins, and srv.Close for what still
// runs when grace is over; the clients of calls get UNAVAILABLE before. As Shutdown
// it waits for handlers whose client has gone. srv's other requests end with the drain,
// too, but are neither named nor waited for. The grpc.Server itself needs no Shutdown.
func (g *Guard) ShutdownHTTP(ctx context.Context, srv *http.Server) error {
	if err := g.usable(); err != nil {
		return err
	}
	switch {
	case ctx == nil:
		return errors.New("interceptors: ShutdownHTTP: the context is nil")
	case srv == nil:
		return errors.New("interceptors: ShutdownHTTP: the server is nil")
	}
	web := httpServer{srv}
	returned, end := context.WithCancel(context.Background())
	defer end()
	return g.shutDownOne(ctx, web, func() {
		web.GracefulStop()
		// It waits for connections, not for handlers whose connection has gone.
		for returned.Err() == nil && g.handling(web) {
			wait(returned, 10*time.Millisecond, nil)
		}
	})
}

func (g *Guard) shutDownOne(ctx context.Context, srv server, gracefulStop func()) error {
	g.drain.servers.Add(1)
	j := g.newJournal()
	defer j.close()
	return g.shutDown(ctx, ctx, srv, gracefulStop, j)
}

// shutDown goes through the phases; the end of announced ends the first, that of
// cutNow the first and the second. gracefulStop is srv's, and what else grace begins
// with.
func (g *Guard) shutDown(announced, cutNow context.Context, srv server, gracefulStop func(), j *journal) error {
	began := g.now()
	defer func() { g.metrics.drained(g.now() - began) }()

	g.enter(announcing, j)
	wait(announced, g.drain.policy.Load().Announce-g.drain.age(began), nil)

	g.enter(graceful, j)
	ended := make(chan struct{})
	go func() {
		gracefulStop() // its return, not an in-flight count of 0, is the end
		close(ended)
	}()
	if wait(cutNow, g.drain.policy.Load().Grace, ended) {
		g.stopped(j)
		return nil
	}

	g.enter(cutting, j)
	limit := g.drain.policy.Load().Cut
	over := g.now() + limit
	var calls []runningCall
	cut := func(strangers bool) {
		found := g.cutCalls(srv, strangers)
		j.cut(found)
		calls = append(calls, found...)
	}
	cut(true)
	_, told := g.drain.told.Load(srv) // perhaps by another drain of it: of a second Serve, or Shutdown
	if len(calls) == 0 && !told {
		j.log(slog.LevelWarn, "drain closes connections that are not done: a client does not read its answers or does not send its request, or a handshake hangs")
	}
	complete := false
	if told {
		complete = wait(context.Background(), min(flushTime, limit/2), ended)
	}
	if !complete {
		cut(false)    // what has come since
		go srv.Stop() // waits for handshakes
		wait(context.Background(), over-g.now(), ended)
	}
	if n := g.running(srv); n > 0 {
		j.log(slog.LevelError, "drain abandons handlers that ignore their context", slog.Int("calls", n))
	}
	cut(false)
	g.stopped(j)
	return cutError(calls)
}

func (g *Guard) enter(p phase, j *journal) {
	if g.drain.advance(p, g.now()) {
		j.log(slog.LevelInfo, "drain", slog.String("phase", p.String()), slog.Int("in_flight", g.inflight.count()))
	}
}

// stopped is the end of one server's drain, and of the guard's with the last.
func (g *Guard) stopped(j *journal) {
	if g.drain.servers.Add(-1) == 0 {
		g.enter(stopped, j)
	}
}

// wait waits for a time, or until ended is closed, which it reports, or ctx ends.
func wait(ctx context.Context, d time.Duration, ended <-chan struct{}) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ended:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	return false
}

// prepare checks what Serve was given, and registers the health service.
func (g *Guard) prepare(ctx context.Context, srv *grpc.Server, lis []net.Listener) (*listeners, error) {
	if err := g.usable(); err != nil {
		return nil, err
	}
	switch {
	case ctx == nil:
		return nil, errors.New("interceptors: Serve: the context is nil")
	case srv == nil:
		return nil, errors.New("interceptors: Serve: the server is nil")
	case len(lis) == 0:
		return nil, errors.New("interceptors: Serve: no listener was given")
	case slices.Contains(lis, nil):
		return nil, errors.New("interceptors: Serve: a listener is nil")
	case slices.ContainsFunc(lis, func(l net.Listener) bool { return l.Addr() == nil }): // gRPC would panic
		return nil, errors.New("interceptors: Serve: a listener has no address")
	case g.drain.phase() == stopped:
		return nil, errors.New("interceptors: Serve: the guard has drained; a new server needs a new guard")
	}
	g.reloading.Lock()
	defer g.reloading.Unlock()
	if _, ok := srv.GetServiceInfo()[healthService]; !ok {
		healthpb.RegisterHealthServer(srv, health.NewServer())
	}
	if err := checkMethods(g.server.rules.Load(), srv); err != nil {
		return nil, err
	}
	ls, err := g.newListeners(srv, lis)
	if err != nil {
		return nil, err
	}
	g.served = append(g.served, srv)
	return ls, nil
}

// checkMethods finds methods that the policy names and the server lacks: a
// misspelt rule would protect nothing.
func checkMethods(rules *policy.Table, srv *grpc.Server) error {
	has := map[string]bool{}
	for service, info := range srv.GetServiceInfo() {
		for _, m := range info.Methods {
			has["/"+service+"/"+m.Name] = true
		}
	}
	var errs []error
	for _, method := range rules.Exact() {
		if !has[method] {
			errs = append(errs, fmt.Errorf("interceptors: server.rules: the server has no method %s", method))
		}
	}
	return errors.Join(errs...)
}
