package interceptors

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// handshakeTimeout bounds how long a connection that never finishes its
// handshake can hold up a drain.
const handshakeTimeout = 5 * time.Second

// Serve serves srv on the listeners until ctx ends, a signal comes (see
// WithSignals), Drain is called or a listener fails, then drains as the policy's
// server.drain says and returns. It registers a health service unless srv has
// one; so srv must not be serving already. The listeners are closed when it
// returns.
//
// SIGTERM, and the end of ctx, start the full drain: announce, grace, cut.
// SIGINT skips announce, and a SIGINT during a drain cuts at once; a second
// SIGTERM is ignored. (After the end of ctx the first SIGINT only skips announce:
// it may be what ended ctx, by way of signal.NotifyContext.) The error is nil
// after a drain that cut nothing; otherwise it lists the calls that were cut,
// and what failed.
//
// A guard drains once, all of its servers together: a drain of one makes every
// other Serve of the guard drain, and Serve refuses to start after it.
func (g *Guard) Serve(ctx context.Context, srv *grpc.Server, lis ...net.Listener) error {
	if err := g.prepare(srv, lis); err != nil {
		for _, l := range lis {
			if l != nil {
				_ = l.Close()
			}
		}
		return err
	}
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

	var failed error
	alive, patient := len(lis), false
	select {
	case <-ctx.Done():
		g.opts.logger.Info("drain begins", "cause", "context ended")
		patient = true
	case s := <-signals:
		g.opts.logger.Info("drain begins", "cause", s.String())
		if s == os.Interrupt {
			skip()
		}
	case <-g.drain.asked:
		g.opts.logger.Info("drain begins", "cause", "asked to")
	case failed = <-served:
		g.opts.logger.Error("drain begins", "cause", "a listener stopped", "error", failed)
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
	complete, err := g.shutDown(announced, cutNow, srv)
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
// srv.Serve themselves; when ctx ends, what still runs is cut at once. The error
// is nil if nothing was cut, otherwise it lists the calls that were. Called from
// a handler it would wait for that handler: use Drain there.
func (g *Guard) Shutdown(ctx context.Context, srv *grpc.Server) error {
	if err := g.usable(); err != nil {
		return err
	}
	if srv == nil {
		return errors.New("interceptors: Shutdown: the server is nil")
	}
	_, err := g.shutDown(ctx, ctx, srv)
	return err
}

// shutDown goes through the phases; the end of announced ends the first, that of
// cutNow the first and the second. complete says that every handler has ended.
func (g *Guard) shutDown(announced, cutNow context.Context, srv *grpc.Server) (complete bool, err error) {
	began := g.now()
	defer func() { g.metrics.drained(g.now() - began) }()

	g.enter(announcing)
	wait(announced, g.drain.policy.Announce-g.drain.age(began), nil)

	g.enter(graceful)
	ended := make(chan struct{})
	go func() {
		srv.GracefulStop() // its return, not an in-flight count of 0, is the end
		close(ended)
	}()
	if wait(cutNow, g.drain.policy.Grace, ended) {
		g.enter(stopped)
		return true, nil
	}

	g.enter(cutting)
	calls := g.inflight.running(g.now())
	for _, c := range calls {
		g.opts.logger.Warn("drain cuts a call", "method", c.method, "age", c.age, "peer", c.peer)
	}
	g.metrics.aborted(len(calls))
	go srv.Stop() // waits for handshakes
	complete = wait(context.Background(), g.drain.policy.Cut, ended)
	g.enter(stopped)
	if !complete {
		g.opts.logger.Error("drain abandons handlers that ignore their context", "calls", g.inflight.count())
	}
	return complete, cutError(calls)
}

func (g *Guard) enter(p phase) {
	if g.drain.advance(p, g.now()) {
		g.opts.logger.LogAttrs(context.Background(), slog.LevelInfo, "drain", slog.String("phase", p.String()), slog.Int("in_flight", g.inflight.count()))
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

func cutError(calls []runningCall) error {
	if len(calls) == 0 {
		return nil
	}
	slices.SortFunc(calls, func(a, b runningCall) int { return cmp.Compare(b.age, a.age) })
	lines := make([]string, len(calls))
	for i, c := range calls {
		lines[i] = fmt.Sprintf("%s (age %v, peer %s)", c.method, roundUp(c.age), c.peer)
	}
	return fmt.Errorf("interceptors: the drain cut %d calls: %s", len(calls), strings.Join(lines, ", "))
}

// prepare checks what Serve was given, and registers the health service.
func (g *Guard) prepare(srv *grpc.Server, lis []net.Listener) error {
	if err := g.usable(); err != nil {
		return err
	}
	switch {
	case srv == nil:
		return errors.New("interceptors: Serve: the server is nil")
	case len(lis) == 0:
		return errors.New("interceptors: Serve: no listener was given")
	case slices.Contains(lis, nil):
		return errors.New("interceptors: Serve: a listener is nil")
	case g.drain.phase() == stopped:
		return errors.New("interceptors: Serve: the guard has drained; a new server needs a new guard")
	}
	if _, ok := srv.GetServiceInfo()[healthService]; !ok {
		healthpb.RegisterHealthServer(srv, health.NewServer())
	}
	return g.checkMethods(srv)
}

// checkMethods finds methods that the policy names and the server lacks: a
// misspelt rule would protect nothing.
func (g *Guard) checkMethods(srv *grpc.Server) error {
	has := map[string]bool{}
	for service, info := range srv.GetServiceInfo() {
		for _, m := range info.Methods {
			has["/"+service+"/"+m.Name] = true
		}
	}
	var errs []error
	for _, method := range g.server.rules.Exact() {
		if !has[method] {
			errs = append(errs, fmt.Errorf("interceptors: server.rules: the server has no method %s", method))
		}
	}
	return errors.Join(errs...)
}
