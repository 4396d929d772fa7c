package interceptors

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// maxNamed is how many of the calls that a drain cuts are named, the oldest
// first: a server may have any number of them.
const maxNamed = 20

// flushTime is how long, at most, the statuses of calls that are cut have to get on
// their way before the connections are closed: their handlers are cancelled already.
const flushTime = time.Second

// errCut is what the client of a call that is cut gets, if its server is known;
// otherwise its connection is closed, which gRPC calls UNAVAILABLE too.
var errCut = status.New(codes.Unavailable, "the server is draining: the call was cut")

// server is what a drain stops: a *grpc.Server or an httpServer.
type server interface {
	GracefulStop()
	Stop()
}

// httpServer is an http.Server that a drain stops.
type httpServer struct{ srv *http.Server }

// GracefulStop has no deadline, as that of gRPC.
func (s httpServer) GracefulStop() { _ = s.srv.Shutdown(context.Background()) }
func (s httpServer) Stop()         { _ = s.srv.Close() }

// listening is where a server listens.
type listening struct {
	addr net.Addr
	srv  server
}

// at reports whether a connection with this local address came by there.
func (l listening) at(local net.Addr) bool {
	on, ok := l.addr.(*net.TCPAddr)
	to, both := local.(*net.TCPAddr)
	if ok && both {
		return on.Port == to.Port && (on.IP.IsUnspecified() || on.IP.Equal(to.IP))
	}
	return l.addr != nil && local != nil && l.addr.Network() == local.Network() && l.addr.String() == local.String()
}

// listen makes known where a server listens.
func (d *drain) listen(ls *listeners) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, l := range ls.all {
		d.listeners = append(d.listeners, listening{l.Addr(), ls.srv})
	}
	d.workers = append(d.workers, ls.workers)
}

// serverOf returns the server that a call came to, which gRPC does not tell its
// interceptors; nil if it is not known.
func serverOf(ctx context.Context, listeners []listening) server {
	if s, ok := ctx.Value(http.ServerContextKey).(*http.Server); ok {
		return httpServer{s}
	}
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	var found server
	for _, l := range listeners {
		if !l.at(p.LocalAddr) {
			continue
		}
		if found != nil && found != l.srv {
			return nil
		}
		found = l.srv
	}
	return found
}

// eachOf takes the calls in flight that came to a server, or whose server is not
// known.
func (g *Guard) eachOf(srv server, visit func(r *record, known bool) (keep bool)) {
	g.drain.mu.Lock()
	listeners := g.drain.listeners
	g.drain.mu.Unlock()
	g.inflight.each(func(r *record) (keep bool) {
		to := serverOf(r.ctx, listeners)
		return (to == srv || to == nil) && visit(r, to != nil)
	})
}

// running is the number of those calls.
func (g *Guard) running(srv server) int {
	n := 0
	g.eachOf(srv, func(*record, bool) bool { n++; return false })
	return n
}

// handling reports whether calls are in flight that surely came to a server.
func (g *Guard) handling(srv server) bool {
	found := false
	g.eachOf(srv, func(_ *record, known bool) bool { found = found || known; return false })
	return found
}

// cutCalls returns those calls that it has not returned yet, in no order, and
// writes their status. Those whose server is not known are left alone, and
// returned only with strangers.
func (g *Guard) cutCalls(srv server, strangers bool) []runningCall {
	now := g.now()
	var calls []runningCall
	g.eachOf(srv, func(r *record, known bool) (keep bool) {
		if r.cut || !known && !strangers {
			return false
		}
		calls = append(calls, r.call(now))
		if !known {
			return false
		}
		r.cut = true
		g.drain.told.Store(srv, true)
		// Not in line: a stats handler may hang, an HTTP client not read.
		go func() {
			defer r.giveBack()
			g.contain("stats handler", func() { r.writeStatus(errCut) })
		}()
		return true
	})
	g.metrics.aborted(len(calls))
	return calls
}

// oldest returns the calls that are named, and how many are not.
func oldest(calls []runningCall) (named []runningCall, more int) {
	slices.SortFunc(calls, func(a, b runningCall) int { return cmp.Compare(b.age, a.age) })
	n := min(len(calls), maxNamed)
	return calls[:n], len(calls) - n
}

func cutError(calls []runningCall) error {
	if len(calls) == 0 {
		return nil
	}
	var lines []string
	named, more := oldest(calls)
	for _, c := range named {
		lines = append(lines, fmt.Sprintf("%s (age %v, peer %s)", c.method, roundUp(c.age), c.peer))
	}
	if more > 0 {
		lines = append(lines, fmt.Sprintf("and %d more", more))
	}
	return fmt.Errorf("interceptors: the drain cut %d calls: %s", len(calls), strings.Join(lines, ", "))
}

// journal logs a drain, and what Serve's listeners do, in order, on a goroutine of
// its own: a logger that hangs, perhaps because nobody reads from its pipe, must not
// hold them up.
type journal struct {
	guard  *Guard
	lines  chan func()
	closed chan struct{}
	done   chan struct{}
}

func (g *Guard) newJournal() *journal {
	j := &journal{guard: g, lines: make(chan func(), 4*maxNamed), closed: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(j.done)
		for {
			select {
			case write := <-j.lines:
				write()
			case <-j.closed:
				for len(j.lines) > 0 {
					(<-j.lines)()
				}
				return
			}
		}
	}()
	return j
}

func (j *journal) log(level slog.Level, msg string, attrs ...slog.Attr) {
	j.write(func() { j.guard.log(level, msg, attrs...) })
}

// write is for one line. What is written after close may be lost.
func (j *journal) write(line func()) {
	select {
	case j.lines <- line:
	default: // it hangs
	}
}

// logger is the guard's, by way of the journal, for those that add no attributes
// and no groups to it.
func (j *journal) logger() *slog.Logger {
	return slog.New(journaled{j.guard.opts.logger.Handler(), j})
}

type journaled struct {
	slog.Handler
	journal *journal
}

func (h journaled) Handle(ctx context.Context, r slog.Record) error {
	h.journal.write(func() {
		h.journal.guard.contain("logger", func() { _ = h.Handler.Handle(ctx, r) })
	})
	return nil
}

func (j *journal) cut(calls []runningCall) {
	named, more := oldest(calls)
	for _, c := range named {
		j.log(slog.LevelWarn, "drain cuts a call", slog.String("method", c.method), slog.Duration("age", c.age), slog.String("peer", c.peer))
	}
	if more > 0 {
		j.log(slog.LevelWarn, "drain cuts more calls", slog.Int("calls", more))
	}
}

// close waits for the logger, but not for ever.
func (j *journal) close() {
	close(j.closed)
	wait(context.Background(), time.Second, j.done)
}
