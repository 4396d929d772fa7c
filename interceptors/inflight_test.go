package interceptors

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/policy"
)

// from is the context of a call by a peer.
func from(host string) context.Context {
	return peer.NewContext(context.Background(), &peer.Peer{Addr: &net.UnixAddr{Name: host}})
}

// callsOf lists the calls in flight.
func callsOf(f *inflight, now time.Duration) (calls []runningCall) {
	f.each(func(r *record) bool {
		calls = append(calls, r.call(now))
		return false
	})
	return calls
}

func TestInflightKnowsMethodAgeAndPeer(t *testing.T) {
	var f inflight
	search, place := "/shop.v1.Orders/Search", "/shop.v1.Orders/Place"
	a := f.begin(from("a"), &search, 1*time.Second, nil)
	b := f.begin(from("b"), &place, 3*time.Second, nil)
	nobody := f.begin(context.Background(), &place, 4*time.Second, nil)

	want := []runningCall{{search, 9 * time.Second, "a"}, {place, 7 * time.Second, "b"}, {place, 6 * time.Second, "unknown"}}
	check := func() {
		t.Helper()
		got := callsOf(&f, 10*time.Second)
		slices.SortFunc(got, func(x, y runningCall) int { return int(y.age - x.age) })
		if !slices.Equal(got, want) || f.count() != len(want) {
			t.Errorf("%d running: %v, want %v", f.count(), got, want)
		}
	}
	check()
	a.end()
	want = want[1:]
	check()
	c := f.begin(from("c"), &search, 5*time.Second, nil) // perhaps in the record of a
	want = append(want, runningCall{search, 5 * time.Second, "c"})
	check()
	b.end()
	nobody.end()
	c.end()
	want = nil
	check()
}

func TestInflightCostsNoAllocation(t *testing.T) {
	var f inflight
	ctx, method := from("a"), "/shop.v1.Orders/Place"
	if n := testing.AllocsPerRun(1000, func() { f.begin(ctx, &method, 0, nil).end() }); n != 0 {
		t.Errorf("%v allocations for a call, want 0", n)
	}
}

// A context may be large, and live as long as the pool.
func TestInflightForgetsTheContextOfACall(t *testing.T) {
	var f inflight
	method := "/shop.v1.Orders/Place"
	r := f.begin(from("a"), &method, 0, new(wire))
	r.end()
	if r.ctx != nil || r.wire != nil {
		t.Errorf("%v, %v are kept", r.ctx, r.wire)
	}
}

// Calls that come in waves, with the pool emptied by the collector in between,
// must not make the list grow: it follows the highest wave.
func TestInflightListIsBounded(t *testing.T) {
	var f inflight
	ctx, method := context.Background(), "/shop.v1.Orders/Place"
	const wave = 1000
	for range 20 {
		calls := make([]*record, wave)
		for i := range calls {
			calls[i] = f.begin(ctx, &method, 0, nil)
		}
		if got := f.count(); got != wave {
			t.Fatalf("%d calls are known, want %d", got, wave)
		}
		for _, r := range calls {
			r.end()
		}
		clear(calls)
		runtime.GC() // what was in the pool becomes its victim,
		runtime.GC() // which is dropped
	}
	if got := len(f.all); got > 3*wave {
		t.Errorf("the list has %d records after waves of %d calls", got, wave)
	}
}

// Records are reused by other goroutines while a drain reads them: under the
// race detector, a field that is not atomic shows here.
func TestInflightIsSafeForConcurrentUse(t *testing.T) {
	var f inflight
	methods := make([]string, 16)
	for i := range methods {
		methods[i] = fmt.Sprintf("/shop.v1.Orders/M%d", i)
	}
	var calls, reader sync.WaitGroup
	done := make(chan struct{})
	for i := range 8 {
		calls.Go(func() {
			ctx := from(fmt.Sprint(i))
			for range 2000 {
				a := f.begin(ctx, &methods[rand.IntN(len(methods))], time.Duration(i), nil)
				b := f.begin(ctx, &methods[rand.IntN(len(methods))], time.Duration(i), nil)
				a.end()
				b.end()
			}
		})
	}
	reader.Go(func() {
		for {
			for _, c := range callsOf(&f, time.Second) {
				if !slices.Contains(methods, c.method) || c.peer == "unknown" || c.age > time.Second {
					t.Errorf("a call that never was: %+v", c)
				}
			}
			select {
			case <-done:
				return
			default:
				runtime.Gosched()
			}
		}
	})
	calls.Wait()
	close(done)
	reader.Wait()
	if n := f.count(); n != 0 {
		t.Errorf("%d calls are still known after all have ended", n)
	}
}

func TestAddressesTellServersApart(t *testing.T) {
	tcp := func(addr string) net.Addr { return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(addr)) }
	unix := func(name string) net.Addr { return &net.UnixAddr{Net: "unix", Name: name} }
	for _, c := range []struct {
		lis, local net.Addr
		want       bool
	}{
		{tcp("127.0.0.1:80"), tcp("127.0.0.1:80"), true},
		{tcp("127.0.0.1:80"), tcp("[::ffff:127.0.0.1]:80"), true},
		{tcp("127.0.0.1:80"), tcp("127.0.0.1:81"), false},
		{tcp("127.0.0.1:80"), tcp("127.0.0.2:80"), false},
		{tcp("0.0.0.0:80"), tcp("127.0.0.2:80"), true},
		{tcp("[::]:80"), tcp("127.0.0.2:80"), true},
		{tcp("[::]:80"), tcp("127.0.0.2:81"), false},
		{unix("a"), unix("a"), true},
		{unix("a"), unix("b"), false},
		{unix("127.0.0.1:80"), tcp("127.0.0.1:80"), false},
		{nil, unix("a"), false},
		{unix("a"), nil, false},
		{nil, nil, false},
	} {
		if got := (listening{addr: c.lis}).at(c.local); got != c.want {
			t.Errorf("a listener at %v, a connection at %v: %v", c.lis, c.local, got)
		}
	}
}

func TestDrainForgetsWatchesThatHaveEnded(t *testing.T) {
	var d drain
	d.init(policy.Drain{})
	for range 3 {
		d.unwatch(d.watch(&serverStream{}))
	}
	if len(d.watches) != 0 {
		t.Errorf("%d watches are kept", len(d.watches))
	}
}

// The drain may only come to tell a watcher when its handler has just ended.
func TestDrainDoesNotTellAWatchThatHasEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var d drain
		d.init(policy.Drain{})
		ctx, cancel := context.WithCancel(t.Context())
		w := d.watch(&serverStream{ServerStream: deadStream{ctx: ctx, t: t}, ctx: ctx})
		d.current.Store(int32(announcing)) // without telling yet
		d.unwatch(w)
		go w.tell()
		synctest.Wait()
		cancel() // which gRPC does
		synctest.Wait()
	})
}

// deadStream must not be sent on.
type deadStream struct {
	grpc.ServerStream
	ctx context.Context
	t   *testing.T
}

func (s deadStream) Context() context.Context     { return s.ctx }
func (s deadStream) SendHeader(metadata.MD) error { return nil }

func (s deadStream) SendMsg(any) error {
	s.t.Error("a message was sent after the end")
	return nil
}
