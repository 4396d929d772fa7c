package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// maxStates is the cap on states that are made by calls.
const maxStates = 4096

// channel is a channel that never connects.
func channel(t testing.TB, target string) *grpc.ClientConn {
	t.Helper()
	cc, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	return cc
}

// callOn makes a unary call on a channel, which ends with result.
func callOn(g *interceptors.Guard, cc *grpc.ClientConn, method string, result error) error {
	return g.UnaryClientInterceptor()(context.Background(), method, nil, nil, cc,
		func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return result })
}

// serveOn makes the server handle a unary call, which ends with result.
func serveOn(g *interceptors.Guard, method string, result error) error {
	_, err := g.UnaryServerInterceptor()(context.Background(), nil, &grpc.UnaryServerInfo{FullMethod: method},
		func(context.Context, any) (any, error) { return nil, result })
	return err
}

var errDown = status.Error(codes.Unavailable, "down")

func TestChannelsToOneTargetShareState(t *testing.T) {
	g := mustGuard(t, "client: {rules: [{methods: ['*'], "+strict+"}]}")
	same := []string{"dns:///example.com:443", "example.com:443", "example.com:443"}
	if err := callOn(g, channel(t, same[0]), rpctest.Unary, errDown); err != errDown {
		t.Fatal(err)
	}
	for _, target := range same {
		if err := callOn(g, channel(t, target), rpctest.Unary, nil); !errors.Is(err, interceptors.ErrBreakerOpen) {
			t.Errorf("%s: %v, want the breaker of the other channel", target, err)
		}
	}
	for _, target := range []string{"example.com:444", "passthrough:///example.com:443", "dns://8.8.8.8/example.com:443"} {
		if err := callOn(g, channel(t, target), rpctest.Unary, nil); err != nil {
			t.Errorf("%s: %v, want a breaker of its own", target, err)
		}
	}
	if err := callOn(g, channel(t, same[0]), rpctest.Other, nil); err != nil {
		t.Errorf("another method: %v", err)
	}
	var targets []string
	for _, m := range g.Snapshot().Methods {
		targets = append(targets, m.Target+m.Method)
	}
	want := "dns:///example.com:443" + rpctest.Other + " dns:///example.com:443" + rpctest.Unary + " dns:///example.com:444" + rpctest.Unary +
		" dns://8.8.8.8/example.com:443" + rpctest.Unary + " passthrough:///example.com:443" + rpctest.Unary
	if got := strings.Join(targets, " "); got != want {
		t.Errorf("states of\n%s, want\n%s", got, want)
	}
	checkIdle(t, g)
}

func TestScopeRuleIsPerTarget(t *testing.T) {
	g := mustGuard(t, `client: {rules: [
		{methods: ["*"], rate_limit: {requests_per_second: 0.001, burst: 1}},
		{methods: ["/a.A/*", "/b.B/M"], rate_limit: {requests_per_second: 0.001, burst: 2, scope: rule}}]}`)
	for _, target := range []string{"one", "two"} {
		cc := channel(t, target)
		for _, call := range []struct {
			method string
			passes bool
		}{
			{"/a.A/M", true}, {"/b.B/M", true}, {"/a.A/N", false}, {"/b.B/M", false}, // two for them all
			{"/c.C/M", true}, {"/c.C/M", false}, {"/c.C/N", true}, // one for each
		} {
			if err := callOn(g, cc, call.method, nil); (err == nil) != call.passes {
				t.Errorf("%s %s: %v, want it to pass: %v", target, call.method, err, call.passes)
			}
		}
	}
	checkIdle(t, g)
}

func TestFirstCallsAtOnceShareOneState(t *testing.T) {
	g := mustGuard(t, "server: {rules: [{methods: ['*'], breaker: {}}]}")
	var calls sync.WaitGroup
	for range 50 {
		calls.Go(func() {
			for i := range 20 {
				_ = serveOn(g, fmt.Sprintf("/a.A/M%d", i), nil)
			}
		})
	}
	calls.Wait()
	s := g.Snapshot()
	if len(s.Methods) != 20 {
		t.Errorf("%d states, want 20", len(s.Methods))
	}
	for _, m := range s.Methods {
		if m.Counts.Success != 50 {
			t.Errorf("%s: %d calls, want 50", m.Method, m.Counts.Success)
		}
	}
}

const capped = `{rules: [
	{methods: ["*"], breaker: {request_volume_threshold: 1}, rate_limit: {requests_per_second: 0.001, burst: 2}},
	{methods: ["/a.A/*"], breaker: {request_volume_threshold: 1}, rate_limit: {disabled: true}},
	{methods: ["/a.A/Named"], breaker: {request_volume_threshold: 1}}]}`

// others finds the states of what is beyond the cap.
func others(g *interceptors.Guard) (found []interceptors.MethodSnapshot) {
	for _, m := range g.Snapshot().Methods {
		if m.Method == "_OTHER" {
			found = append(found, m)
		}
	}
	return found
}

func TestMethodsBeyondTheCap(t *testing.T) {
	for _, side := range []string{"client", "server"} {
		t.Run(side, func(t *testing.T) {
			g := mustGuard(t, side+": "+capped)
			cc := channel(t, "example.com")
			call := func(method string, result error) error {
				if side == "server" {
					return serveOn(g, method, result)
				}
				return callOn(g, cc, method, result)
			}
			for i := range maxStates {
				_ = call(fmt.Sprintf("/b.B/M%d", i), nil)
			}
			if n := len(g.Snapshot().Methods); n != maxStates || len(others(g)) != 0 {
				t.Fatalf("%d states, %d of them for others", n, len(others(g)))
			}
			// One state for all that are beyond: without a breaker, with the limits.
			for i := range 2 {
				if err := call(fmt.Sprintf("/c.C/M%d", i), errDown); err != errDown {
					t.Errorf("other %d: %v", i, err)
				}
			}
			err := call("/c.C/M2", nil)
			if reasonOf(err) != interceptors.ReasonRateLimited {
				t.Errorf("%v, want the rate limit that the others have used up", err)
			}
			if info := detailOf[*errdetails.ErrorInfo](err); info.GetMetadata()["method"] != "/c.C/M2" {
				t.Errorf("%v, want the method's own name", info)
			}
			if err := call("/b.B/M0", nil); err != nil {
				t.Errorf("a method from before: %v", err)
			}
			// One for each rule.
			for range 3 {
				if err := call("/a.A/M", errDown); err != errDown {
					t.Errorf("%v: the other rule has no limit", err)
				}
			}
			if found := others(g); len(found) != 2 || found[0].Breaker != nil || found[1].Breaker != nil {
				t.Errorf("states of others: %+v", found)
			}
			// A method that the policy names always has its own.
			if err := call("/a.A/Named", errDown); err != errDown {
				t.Error(err)
			}
			if err := call("/a.A/Named", nil); reasonOf(err) != interceptors.ReasonBreakerOpen {
				t.Errorf("%v, want its breaker open", err)
			}
			checkIdle(t, g)
		})
	}
}

func TestRulesOfOneNameBeyondTheCap(t *testing.T) {
	g := mustGuard(t, `server: {rules: [
		{name: same, methods: ["/a.A/*"], rate_limit: {requests_per_second: 0.001, burst: 1}},
		{name: same, methods: ["/b.B/*"], rate_limit: {requests_per_second: 0.001, burst: 2}}]}`)
	for i := range maxStates {
		_ = serveOn(g, fmt.Sprintf("/a.A/M%d", i), nil)
	}
	for _, call := range []struct {
		method string
		passes bool
	}{{"/a.A/X", true}, {"/a.A/Y", false}, {"/b.B/X", true}, {"/b.B/Y", true}, {"/b.B/Z", false}} {
		if err := serveOn(g, call.method, nil); (err == nil) != call.passes {
			t.Errorf("%s: %v, want it to pass: %v", call.method, err, call.passes)
		}
	}
	if n := len(others(g)); n != 2 {
		t.Errorf("%d states of others, want one for each rule", n)
	}
	checkIdle(t, g)
}

func TestNamesThatAreNotUTF8AreNotKept(t *testing.T) {
	for _, side := range []string{"client", "server"} {
		t.Run(side, func(t *testing.T) {
			g := mustGuard(t, side+": {rules: [{methods: ['*'], breaker: {}, concurrency_limit: {max_in_flight: 1}}]}")
			cc := channel(t, "example.com")
			for _, method := range []string{"/a.A/\xff", "/a.A/\xc3", "/\xed\xa0\x80/M", "/a.A/ü"} {
				if err := callOn(g, cc, method, nil); side == "client" && err != nil {
					t.Errorf("%q: %v", method, err)
				}
				if err := serveOn(g, method, nil); side == "server" && err != nil {
					t.Errorf("%q: %v", method, err)
				}
			}
			if all, o := g.Snapshot().Methods, others(g); len(all) != 2 || len(o) != 1 || o[0].Counts.Success != 3 {
				t.Errorf("%d states, %d of others; want that of /a.A/ü and one for the others", len(all), len(o))
			}
			checkIdle(t, g)
		})
	}
}

func TestTargetsBeyondTheCap(t *testing.T) {
	g := mustGuard(t, "client: "+capped)
	for i := range maxStates {
		_ = callOn(g, channel(t, fmt.Sprintf("passthrough:///%d", i)), "/b.B/M", nil)
	}
	for i, method := range []string{"/c.C/M", "/c.C/N", "/a.A/Named"} {
		if err := callOn(g, channel(t, fmt.Sprintf("passthrough:///x%d", i)), method, errDown); err != errDown {
			t.Error(err)
		}
	}
	cc := channel(t, "passthrough:///y")
	if err := callOn(g, cc, "/c.C/M", nil); reasonOf(err) != interceptors.ReasonRateLimited {
		t.Errorf("%v, want the rate limit that the others have used up", err)
	}
	if err := callOn(g, cc, "/a.A/Named", nil); err != nil {
		t.Errorf("%v: targets must not share a breaker", err)
	}
	for _, m := range others(g) {
		if m.Target != "_OTHER" || m.Breaker != nil {
			t.Errorf("state of others: %+v", m)
		}
	}
	const calls = 2000 // they must not copy the table of targets
	allocs := testing.AllocsPerRun(calls, func() { _ = callOn(g, cc, "/a.A/Named", nil) })
	if allocs > 20 {
		t.Errorf("%v allocations for a call to a target beyond the cap", allocs)
	}
	checkIdle(t, g)
}

func TestMillionsOfMethodsCostNothing(t *testing.T) {
	g := mustGuard(t, "server: {rules: [{methods: ['*'], breaker: {}, concurrency_limit: {max_in_flight: 10}}]}")
	call := func(from, to int) {
		for i := from; i < to; i++ {
			if err := serveOn(g, fmt.Sprintf("/hostile.Name/%d", i), nil); err != nil {
				t.Fatal(err)
			}
		}
		// One of a name that is long itself, and would be kept.
		if err := serveOn(g, "/"+strings.Repeat("x", 1<<20)+fmt.Sprint(from), nil); err != nil {
			t.Fatal(err)
		}
	}
	call(0, 100)
	if n := len(others(g)); n != 1 {
		t.Errorf("%d states for the name that is too long, want that of others", n)
	}
	call(100, 2*maxStates)
	before := heap()
	call(2*maxStates, 20_000)
	if grown := heap() - before; grown > 64<<10 {
		t.Errorf("the heap has grown by %d bytes", grown)
	}
	if n := len(g.Snapshot().Methods); n != maxStates+1 {
		t.Errorf("%d states", n)
	}
	checkIdle(t, g)
	runtime.KeepAlive(g)
}

func heap() int64 {
	runtime.GC()
	runtime.GC() // what the first one's finalizers kept
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func TestIdleTargetsAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, `client: {rules: [
			{methods: ["*"], breaker: {request_volume_threshold: 2, window: 1s, sleep_window: 1s}, concurrency_limit: {max_in_flight: 1}},
			{methods: ["/slow.Slow/*"], rate_limit: {requests_per_second: 0.001, burst: 10}}]}`)
		fresh := 0
		live := func() string { // makes a state, which is when idle ones are looked for
			time.Sleep(time.Minute)
			fresh++
			if err := callOn(g, channel(t, "passthrough:///fresh"), fmt.Sprintf("/fresh.Fresh/%d", fresh), nil); err != nil {
				t.Fatal(err)
			}
			var names []string
			for _, m := range g.Snapshot().Methods {
				if name := strings.TrimPrefix(m.Target, "passthrough:///"); name != "fresh" {
					names = append(names, name)
				}
			}
			return strings.Join(names, " ")
		}
		idle, busy := channel(t, "passthrough:///idle"), channel(t, "passthrough:///busy")
		_ = callOn(g, idle, rpctest.Unary, nil)
		_ = callOn(g, channel(t, "passthrough:///open"), rpctest.Unary, errDown)
		_ = callOn(g, channel(t, "passthrough:///open"), rpctest.Unary, errDown)
		_ = callOn(g, channel(t, "passthrough:///tokens"), "/slow.Slow/M", nil)
		end := make(chan struct{})
		go func() {
			_ = g.UnaryClientInterceptor()(t.Context(), rpctest.Unary, nil, nil, channel(t, "passthrough:///running"),
				func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { <-end; return nil })
		}()
		synctest.Wait()
		_ = callOn(g, busy, rpctest.Unary, nil)

		if got, want := live(), "busy idle open running tokens"; got != want {
			t.Errorf("after one look: %s, want %s", got, want)
		}
		_ = callOn(g, busy, rpctest.Unary, nil)
		if got, want := live(), "busy open running tokens"; got != want {
			t.Errorf("after two looks: %s, want %s", got, want)
		}
		for range 20 {
			live() // the token comes back, and busy is busy no longer
		}
		if got, want := live(), "open running"; got != want {
			t.Errorf("after many looks: %s, want %s", got, want)
		}
		close(end)
		synctest.Wait()
		live()
		if got, want := live(), "open"; got != want {
			t.Errorf("after the call: %s, want %s", got, want)
		}
		// What was forgotten begins anew.
		if err := callOn(g, idle, rpctest.Unary, nil); err != nil {
			t.Error(err)
		}
		if c := g.Snapshot().Methods; len(c) == 0 {
			t.Error("no state")
		}
		checkIdle(t, g)
	})
}

func TestIdleTargetsAreForgottenByASnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, "client: {rules: [{methods: ['*'], minimum_budget: 1h, breaker: {}}]}")
		for i := range 3 {
			_ = callOn(g, channel(t, fmt.Sprint("passthrough:///", i)), rpctest.Unary, nil)
		}
		refused := channel(t, "passthrough:///refused")
		refuse := func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if err := g.UnaryClientInterceptor()(ctx, rpctest.Unary, nil, nil, refused, nil); !errors.Is(err, interceptors.ErrBudgetTooSmall) {
				t.Fatal(err)
			}
		}
		for i, want := range []int{4, 4, 1, 1, 1} { // the first look comes after a minute
			refuse()
			m := g.Snapshot().Methods
			if len(m) != want {
				t.Fatalf("look %d: %d states, want %d", i, len(m), want)
			}
			// A target whose calls are all rejected is in use.
			if n := m[len(m)-1].Counts.Rejected[interceptors.ReasonBudgetTooSmall]; n != uint64(i+1) {
				t.Errorf("look %d: %d rejections, want %d", i, n, i+1)
			}
			time.Sleep(time.Minute)
		}
		if m := g.Snapshot().Methods; len(m) != 0 {
			t.Errorf("%+v is idle", m)
		}
	})
}

func TestServerStateIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, "server: {rules: [{methods: ['*'], breaker: {}}]}")
		if err := serveOn(g, "/a.A/M", nil); err != nil {
			t.Fatal(err)
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		for i := range 5 { // new states, whose calls are not admitted
			time.Sleep(time.Hour)
			_, _ = g.UnaryServerInterceptor()(ended, nil, &grpc.UnaryServerInfo{FullMethod: fmt.Sprint("/a.A/", i)}, nil)
		}
		if n := len(g.Snapshot().Methods); n != 6 {
			t.Errorf("%d states, want 6", n)
		}
		wantEnded(t, g, interceptors.Server, "/a.A/M", oneSuccess)
	})
}
