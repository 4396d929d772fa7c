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
// WithSignals), Drain is called or a listener fails, then drains as the policy's
// server.drain says and returns. It registers a health service unless srv has
// one; so srv must not be serving already: gRPC would end the process. The
// listeners are closed when it returns.
//
// SIGTERM, and the end of ctx, start the full drain: announce, grace, cut.
// SIGINT skips announce, and a SIGINT during a drain cuts at once; a second
// SIGTERM is ignored. (After the end of ctx the first SIGINT only skips announce:
// it may be what ended ctx, by way of signal.NotifyContext.) A signal that comes
// before Serve is the program's. The error is nil after a drain that cut nothing;
// otherwise it lists the calls that were cut (the 20 oldest, and how many more there
// were), and what failed.
//
// The client of a call that is cut gets UNAVAILABLE, and its handler's context is
// cancelled. Handlers that have not ended when cut is over go on without a client,
// and Serve returns. It takes no longer than the phases, and up to 1s for a logger
// that hangs.
//
// A guard drains once, all of its servers together: a drain of one makes every
// other Serve of the guard drain, and Serve refuses to start after it.
func (g *Guard) Serve(ctx context.Context, srv *grpc.Server, lis ...net.Listener) error {
	if err := g.prepare(ctx, srv, lis); err != nil {
		for _, l := range lis {
			if l != nil {
				_ = l.Close()
			}
		}
		return err
	}
	g.drain.servers.Add(1)
	g.drain.listen(srv, lis)
	signals := make(chan os.Signal, 8)
	if len(g.opts.signals) > 0 {
		signal.Notify(signals, g.opts.signals...)
		defer signal.Stop(signals)
	}
	served := make(chan error, len(lis))
	for _, l := range lis {
		go func() { served <- srv.Serve(l) }()
	}
	cutNow, cut := context.WithCancel(context.Background())
	defer cut()
	announced, skip := context.WithCancel(cutNow)
	j := g.newJournal()
	defer j.close()

	var failed error
	alive, patient := len(lis), false
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
	case failed = <-served:
		j.log(slog.LevelError, "drain begins", slog.String("cause", "a listener stopped"), slog.Any("error", failed))
		alive--
		if alive == 0 || failed == nil || errors.Is(failed, grpc.ErrServerStopped) {
			skip() // nobody is served who could be told
		}
	}
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
	complete, err := g.shutDown(announced, cutNow, srv, j)
	if !complete {
		return errors.Join(failed, err) // Serve of grpc waits for handlers that were abandoned
	}
	for ; alive > 0; alive-- {
		if e := <-served; e != nil && !errors.Is(e, grpc.ErrServerStopped) {
			failed = errors.Join(failed, e)
		}
	}
	return errors.Join(failed, err)
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
	return g.shutDownOne(ctx, srv)
}

// ShutdownHTTP is Shutdown for gRPC calls that come by way of an http.Server, whose
// handler calls grpc.Server.ServeHTTP. In place of gRPC's GracefulStop, which would
// cut them, it calls srv.Shutdown when grace begins, and srv.Close for what still
// runs when grace is over; the clients of calls get UNAVAILABLE before. srv's other
// requests end with the drain, too, but are not named. The grpc.Server itself needs
// no Shutdown.
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
	return g.shutDownOne(ctx, httpServer{srv})
}

func (g *Guard) shutDownOne(ctx context.Context, srv server) error {
	g.drain.servers.Add(1)
	j := g.newJournal()
	defer j.close()
	_, err := g.shutDown(ctx, ctx, srv, j)
	return err
}

// shutDown goes through the phases; the end of announced ends the first, that of
// cutNow the first and the second. complete says that srv has stopped: of gRPC's
// servers, every handler has ended.
func (g *Guard) shutDown(announced, cutNow context.Context, srv server, j *journal) (complete bool, err error) {
	began := g.now()
	defer func() { g.metrics.drained(g.now() - began) }()

	g.enter(announcing, j)
	wait(announced, g.drain.policy.Load().Announce-g.drain.age(began), nil)

	g.enter(graceful, j)
	ended := make(chan struct{})
	go func() {
		srv.GracefulStop() // its return, not an in-flight count of 0, is the end
		close(ended)
	}()
	if wait(cutNow, g.drain.policy.Load().Grace, ended) {
		g.stopped(j)
		return true, nil
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
	if len(calls) == 0 {
		j.log(slog.LevelWarn, "drain closes connections that are not done: a client does not read its answers, or a handshake hangs")
	}
	if slices.ContainsFunc(calls, func(c runningCall) bool { return c.told }) {
		complete = wait(context.Background(), min(flushTime, limit/2), ended)
	}
	if !complete {
		cut(false)    // what has come since
		go srv.Stop() // waits for handshakes
		complete = wait(context.Background(), over-g.now(), ended)
	}
	if n := g.running(srv); n > 0 {
		j.log(slog.LevelError, "drain abandons handlers that ignore their context", slog.Int("calls", n))
	}
	cut(false)
	g.stopped(j)
	return complete, cutError(calls)
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
func (g *Guard) prepare(ctx context.Context, srv *grpc.Server, lis []net.Listener) error {
	if err := g.usable(); err != nil {
		return err
	}
	switch {
	case ctx == nil:
		return errors.New("interceptors: Serve: the context is nil")
	case srv == nil:
		return errors.New("interceptors: Serve: the server is nil")
	case len(lis) == 0:
		return errors.New("interceptors: Serve: no listener was given")
	case slices.Contains(lis, nil):
		return errors.New("interceptors: Serve: a listener is nil")
	case g.drain.phase() == stopped:
		return errors.New("interceptors: Serve: the guard has drained; a new server needs a new guard")
	}
	g.reloading.Lock()
	defer g.reloading.Unlock()
	if _, ok := srv.GetServiceInfo()[healthService]; !ok {
		healthpb.RegisterHealthServer(srv, health.NewServer())
	}
	if err := checkMethods(g.server.rules.Load(), srv); err != nil {
		return err
	}
	g.served = append(g.served, srv)
	return nil
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
