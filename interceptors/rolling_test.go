package interceptors_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// Two servers are restarted one after the other under load. With Stop instead of
// the drain the same load must lose calls, or the test would prove nothing.
func TestCase36_RollingRestart(t *testing.T) {
	for name, c := range map[string]struct {
		mode  string
		loses bool
	}{
		"drain":      {"", false},
		"plain Stop": {"stop", true},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLoad(t, c.mode)
			for i := range l.servers {
				l.restart(i)
			}
			lost, answered := l.end()
			t.Logf("%d calls answered, %d lost", answered, lost)
			if answered < 100 {
				t.Errorf("only %d calls were answered", answered)
			}
			if (lost > 0) != c.loses {
				t.Errorf("%d of %d calls were lost: %v", lost, lost+answered, l.first.Load())
			}
		})
	}
}

// load is two servers and clients that call both of them all the time.
type load struct {
	t       *testing.T
	mode    string
	servers [2]*process

	cancel         context.CancelFunc
	clients        sync.WaitGroup
	lost, answered atomic.Int64
	first          atomic.Pointer[error]
	by             sync.Map // PIDs of the servers that have answered
	news           chan struct{}
}

func newLoad(t *testing.T, mode string) *load {
	l := &load{t: t, mode: mode, news: make(chan struct{}, 1)}
	addrs := make([]resolver.Address, len(l.servers))
	for i := range l.servers {
		l.servers[i] = l.start("127.0.0.1:0")
		addrs[i] = resolver.Address{Addr: l.servers[i].addr}
	}
	r := manual.NewBuilderWithScheme("rolling")
	r.InitialState(resolver.State{Addresses: addrs})
	soon := backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1, MaxDelay: 50 * time.Millisecond}
	conn := dialProcess(t, "rolling:///test", grpc.WithResolvers(r),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"round_robin": {}}]}`),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: soon, MinConnectTimeout: time.Second}))

	ctx, cancel := context.WithCancel(t.Context())
	l.cancel = cancel
	for range 8 {
		l.clients.Go(func() {
			for ctx.Err() == nil {
				l.call(conn)
			}
		})
	}
	for _, p := range l.servers {
		l.waitFor(p)
	}
	return l
}

func (l *load) start(addr string) *process {
	l.t.Helper()
	return startProcess(l.t, addr, l.mode, "server: {drain: {announce: 100ms, grace: 10s}}")
}

func (l *load) call(conn *grpc.ClientConn) {
	pid, err := rpctest.Call(l.t.Context(), conn, rpctest.Unary, "quick")
	if err != nil {
		l.lost.Add(1)
		l.first.CompareAndSwap(nil, &err)
		return
	}
	l.answered.Add(1)
	if _, known := l.by.LoadOrStore(pid, true); !known {
		select {
		case l.news <- struct{}{}:
		default:
		}
	}
}

// waitFor waits until a server has answered a call.
func (l *load) waitFor(p *process) {
	l.t.Helper()
	for {
		if _, ok := l.by.Load(fmt.Sprint(p.cmd.Process.Pid)); ok {
			return
		}
		select {
		case <-l.news:
		case <-time.After(patience):
			l.t.Fatal("a server does not get any calls")
		}
	}
}

// restart replaces a server by a new one with the same address.
func (l *load) restart(i int) {
	l.t.Helper()
	old := l.servers[i]
	old.signal(syscall.SIGTERM)
	old.exit(0)
	l.servers[i] = l.start(old.addr)
	l.waitFor(l.servers[i])
}

func (l *load) end() (lost, answered int64) {
	l.cancel()
	l.clients.Wait()
	for _, p := range l.servers {
		p.signal(syscall.SIGTERM)
		p.exit(0)
	}
	return l.lost.Load(), l.answered.Load()
}
