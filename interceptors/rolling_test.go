package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// ledger is what was done, and how often.
type ledger struct {
	mu   sync.Mutex
	done map[string]int
}

func (l *ledger) add(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.done == nil {
		l.done = map[string]int{}
	}
	l.done[id]++
}

// String has a line for each time.
func (l *ledger) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var text strings.Builder
	for id, n := range l.done {
		text.WriteString(strings.Repeat(id+"\n", n))
	}
	return text.String()
}

// ledgerService enters what it does in a ledger: a unary call, each message of a
// server stream, each answer of a bidi stream. Its streams end when the guard drains,
// and every answer is its name.
func ledgerService(g *interceptors.Guard, name string, l *ledger) *rpctest.Service {
	return &rpctest.Service{
		Unary: func(_ context.Context, req *rpctest.Message) (*rpctest.Message, error) {
			time.Sleep(3 * time.Millisecond) // the work of the call
			l.add(req.GetValue())
			return &rpctest.Message{Value: name}, nil
		},
		Stream: func(ss grpc.ServerStream) error {
			if method, _ := grpc.Method(ss.Context()); method == rpctest.ServerStream {
				return tick(g, ss, l)
			}
			return answer(g, ss, name, l)
		},
	}
}

// tick sends a message every few milliseconds.
func tick(g *interceptors.Guard, ss grpc.ServerStream, l *ledger) error {
	id, err := rpctest.Recv(ss)
	if err != nil {
		return err
	}
	ticker := time.NewTicker(3 * time.Millisecond)
	defer ticker.Stop()
	for n := 0; ; n++ {
		select {
		case <-ticker.C:
			message := fmt.Sprintf("%s/%d", id, n)
			l.add(message)
			if err := rpctest.Send(ss, message); err != nil {
				return err
			}
		case <-g.Draining():
			return nil
		}
	}
}

// answer answers each message. One that comes with the drain is left to the server
// that the client turns to next.
func answer(g *interceptors.Guard, ss grpc.ServerStream, name string, l *ledger) error {
	messages := make(chan string)
	go func() {
		defer close(messages)
		for {
			message, err := rpctest.Recv(ss)
			if err != nil {
				return
			}
			select {
			case messages <- message:
			case <-ss.Context().Done():
				return
			}
		}
	}()
	for {
		select {
		case message, ok := <-messages:
			if !ok {
				return nil
			}
			l.add(message)
			if err := rpctest.Send(ss, name); err != nil {
				return err
			}
		case <-g.Draining():
			return nil
		}
	}
}

// load is clients that call two servers all the time, and enter each answer in a
// ledger.
type load struct {
	ledger
	t    *testing.T
	conn *grpc.ClientConn

	stop    context.CancelFunc // of the clients, who end what they have begun
	stopped context.Context
	clients sync.WaitGroup

	mu    sync.Mutex // guards the fields below
	lost  int
	first error
	known map[string]chan struct{} // servers, by name; closed when one has answered
}

func newLoad(t *testing.T, addrs ...string) *load {
	l := &load{t: t, known: map[string]chan struct{}{}}
	var state resolver.State
	for _, addr := range addrs {
		state.Addresses = append(state.Addresses, resolver.Address{Addr: addr})
	}
	r := manual.NewBuilderWithScheme("rolling")
	r.InitialState(state)
	soon := backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1, MaxDelay: 50 * time.Millisecond}
	l.conn = dialProcess(t, "rolling:///test", grpc.WithResolvers(r),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"round_robin": {}}]}`),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: soon, MinConnectTimeout: time.Second}))
	l.stopped, l.stop = context.WithCancel(t.Context())
	for i := range 4 {
		l.clients.Go(func() { l.calls(fmt.Sprint("unary", i)) })
		l.clients.Go(func() { l.listen(fmt.Sprint("server stream", i)) })
		l.clients.Go(func() { l.ask(fmt.Sprint("bidi", i)) })
	}
	return l
}

func (l *load) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lost++
	if l.first == nil {
		l.first = err
	}
}

// server is closed when the server of a name has answered.
func (l *load) server(name string) chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.known[name] == nil {
		l.known[name] = make(chan struct{})
	}
	return l.known[name]
}

func (l *load) answered(id, by string) {
	l.add(id)
	if c := l.server(by); !isClosed(c) {
		l.mu.Lock()
		defer l.mu.Unlock()
		if !isClosed(c) {
			close(c)
		}
	}
}

// waitFor waits until a server has answered.
func (l *load) waitFor(name string) {
	l.t.Helper()
	select {
	case <-l.server(name):
	case <-time.After(patience):
		l.t.Fatalf("the server %s does not get any calls", name)
	}
}

// calls makes unary calls.
func (l *load) calls(id string) {
	for n := 0; l.stopped.Err() == nil; n++ {
		call := fmt.Sprintf("%s/%d", id, n)
		by, err := rpctest.Call(l.t.Context(), l.conn, rpctest.Unary, call)
		if err != nil {
			l.fail(err)
			continue
		}
		l.answered(call, by)
	}
}

// listen receives server streams, one after the other, each until its server drains.
func (l *load) listen(id string) {
	for n := 0; l.stopped.Err() == nil; n++ {
		s, err := rpctest.Open(l.t.Context(), l.conn, rpctest.ServerStream)
		if err == nil {
			err = errors.Join(rpctest.Send(s, fmt.Sprintf("%s/%d", id, n)), s.CloseSend())
		}
		for err == nil {
			var message string
			if message, err = rpctest.Recv(s); err == nil {
				l.add(message)
			}
		}
		if err != io.EOF {
			l.fail(err)
		}
	}
}

// ask sends message by message on bidi streams, and what was not answered again on
// the next stream.
func (l *load) ask(id string) {
	for n := 0; l.stopped.Err() == nil; {
		s, err := rpctest.Open(l.t.Context(), l.conn, rpctest.Bidi)
		for err == nil && l.stopped.Err() == nil {
			message := fmt.Sprintf("%s/%d", id, n)
			_ = rpctest.Send(s, message) // Recv tells why it failed
			var by string
			if by, err = rpctest.Recv(s); err == nil {
				l.answered(message, by)
				n++
			}
		}
		if err == nil {
			err = s.CloseSend()
			if _, end := rpctest.Recv(s); err == nil {
				err = end
			}
		}
		if err != io.EOF {
			l.fail(err)
		}
	}
}

// check compares the client's ledger with that of the servers.
func (l *load) check(servers string) {
	l.t.Helper()
	served := map[string]int{}
	for id := range strings.Lines(servers) {
		served[strings.TrimSuffix(id, "\n")]++
	}
	bad := 0
	for id, n := range l.done {
		if n != 1 || served[id] != 1 {
			l.t.Errorf("%s was answered %d times and done %d times", id, n, served[id])
			if bad++; bad == 10 {
				break
			}
		}
	}
	if bad == 0 && len(served) != len(l.done) {
		l.t.Errorf("%d were answered, %d done", len(l.done), len(served))
	}
}

// Two servers are restarted one after the other under load. With Stop instead of
// the drain the same load must lose calls, or the test would prove nothing.
func TestCase36_RollingRestart(t *testing.T) {
	for name, c := range map[string]struct {
		mode   string
		rounds int
		loses  bool
	}{
		"drain":      {"rolling", 10, false},
		"plain Stop": {"rolling stop", 1, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ledgers := t.TempDir()
			start := func(addr string) *process {
				return startProcess(t, addr, c.mode, "server: {drain: {announce: 50ms, grace: 10s}}", processLedgers+"="+ledgers)
			}
			servers := [2]*process{start("127.0.0.1:0"), start("127.0.0.1:0")}
			l := newLoad(t, servers[0].addr, servers[1].addr)
			for _, p := range servers {
				l.waitFor(p.name())
			}
			for range c.rounds {
				for i, old := range servers {
					old.signal(syscall.SIGTERM)
					old.exit(0)
					servers[i] = start(old.addr)
					l.waitFor(servers[i].name())
				}
			}
			l.stop()
			for _, p := range servers {
				p.signal(syscall.SIGTERM)
				p.exit(0)
			}
			l.clients.Wait()
			t.Logf("%d answers, %d calls lost", len(l.done), l.lost)
			if (l.lost > 0) != c.loses {
				t.Errorf("%d calls were lost: %v", l.lost, l.first)
			}
			if c.loses {
				return
			}
			var served strings.Builder
			files, err := os.ReadDir(ledgers)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range files {
				text, err := os.ReadFile(ledgers + "/" + f.Name())
				if err != nil {
					t.Fatal(err)
				}
				served.Write(text)
			}
			if want := 2 * (c.rounds + 1); len(files) != want {
				t.Errorf("%d servers have left a ledger, want %d", len(files), want)
			}
			l.check(served.String())
		})
	}
}

// The same with two servers behind http.Server. Shutdown, which is not for them,
// must lose calls.
func TestCase36_RollingRestartBehindHTTP(t *testing.T) {
	for name, c := range map[string]struct {
		shutdown func(g *interceptors.Guard, srv *grpc.Server, web *http.Server) error
		loses    bool
	}{
		"ShutdownHTTP": {func(g *interceptors.Guard, _ *grpc.Server, web *http.Server) error {
			return g.ShutdownHTTP(context.Background(), web)
		}, false},
		"Shutdown": {func(g *interceptors.Guard, srv *grpc.Server, web *http.Server) error {
			return errors.Join(g.Shutdown(context.Background(), srv), web.Close())
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var served ledger
			start := func(name, addr string) (string, func() error) {
				lis, err := net.Listen("tcp", addr)
				if err != nil {
					t.Fatal(err)
				}
				g := mustGuard(t, "server: {drain: {announce: 50ms, grace: 10s}}")
				srv := rpctest.NewServer(ledgerService(g, name, &served), g.ServerOptions()...)
				web := webServer(srv)
				go func() { _ = web.Serve(lis) }()
				return lis.Addr().String(), func() error { return c.shutdown(g, srv, web) }
			}
			var addrs [2]string
			var stops [2]func() error
			for i := range addrs {
				addrs[i], stops[i] = start(fmt.Sprint(i), "127.0.0.1:0")
			}
			l := newLoad(t, addrs[:]...)
			for i := range addrs {
				l.waitFor(fmt.Sprint(i))
			}
			for round := 1; round <= 3; round++ {
				for i := range addrs {
					if err := stops[i](); err != nil {
						t.Error(err)
					}
					name := fmt.Sprint(i, " after ", round)
					_, stops[i] = start(name, addrs[i])
					l.waitFor(name)
				}
			}
			l.stop()
			for _, stop := range stops {
				if err := stop(); err != nil {
					t.Error(err)
				}
			}
			l.clients.Wait()
			t.Logf("%d answers, %d calls lost", len(l.done), l.lost)
			if (l.lost > 0) != c.loses {
				t.Errorf("%d calls were lost: %v", l.lost, l.first)
			}
			if !c.loses {
				l.check(served.String())
			}
		})
	}
}
