package interceptors_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
)

// mustReload gives the guard another policy in YAML.
func mustReload(t testing.TB, g *interceptors.Guard, yaml string) {
	t.Helper()
	if err := reload(g, yaml); err != nil {
		t.Fatal(err)
	}
}

func reload(g *interceptors.Guard, yaml string) error {
	p, err := interceptors.Parse("policy.yaml", []byte(yaml))
	if err != nil {
		return err
	}
	return g.Reload(p)
}

// reload gives the arm's only rule other blocks.
func (a arm) reload(t *testing.T, g *interceptors.Guard, blocks string) {
	t.Helper()
	mustReload(t, g, fmt.Sprintf("%s: {rules: [{name: the-rule, methods: ['*'], %s}]}", a.side, blocks))
	synctest.Wait()
}

func TestCase22_LimitLoweredUnderLoad(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		d := newDesk()
		g, conn := a.setup(t, "concurrency_limit: {max_in_flight: 4, max_streams: 4, max_queue: 2}", d.service())
		for i := range 6 {
			a.start(t.Context(), conn, fmt.Sprint(i))
		}
		a.reload(t, g, "concurrency_limit: {max_in_flight: 2, max_streams: 2, max_queue: 2}")
		// It ends nobody, and admits nobody until fewer than two are in flight.
		for _, want := range []struct{ held, seen int }{{3, 4}, {2, 4}, {2, 5}, {2, 6}, {1, 6}, {0, 6}} {
			if err := a.call(t.Context(), conn, "full"); want.seen < 5 && reasonOf(err) != interceptors.ReasonConcurrencyLimited {
				t.Errorf("a newcomer: %v", err)
			}
			if got := d.next(nil); a.held(t, g) != want.held || len(got) != want.seen {
				t.Errorf("%d in flight, %d have been admitted, want %+v", a.held(t, g), len(got), want)
			}
			if want.seen >= 5 {
				break // a newcomer would wait from here on
			}
		}
		for a.held(t, g) > 0 {
			d.next(nil)
		}
		if got := d.seen(); len(got) != 6 || !slices.IsSorted(got[4:]) {
			t.Errorf("admitted %q, those who waited in order", got)
		}
		if l := a.state(t, g).ConcurrencyLimit; l.Limit != 2 {
			t.Errorf("the limit is %d", l.Limit)
		}
		checkIdle(t, g)
	})
}

func TestCase22_LimitRaisedWakesWaiters(t *testing.T) {
	for _, blocks := range []string{
		"concurrency_limit: {max_in_flight: 3, max_streams: 3, max_queue: 4}",
		"concurrency_limit: {max_in_flight: 3, max_streams: 3}",            // whoever waits already goes on waiting
		"concurrency_limit: {max_in_flight: 3, scope: rule, max_queue: 4}", // of another kind: the old limit is gone
		"concurrency_limit: {disabled: true}, breaker: {}",                 // gone
		"concurrency_limit: {max_streams: 4, max_queue: 4}",
	} {
		t.Run(blocks, func(t *testing.T) {
			eachArm(t, func(t *testing.T, a arm) {
				d := newDesk()
				g, conn := a.setup(t, "concurrency_limit: {max_in_flight: 1, max_streams: 1, max_queue: 4}", d.service())
				for i := range 5 {
					a.start(t.Context(), conn, fmt.Sprint(i))
				}
				a.reload(t, g, blocks)
				want := 3
				switch {
				case strings.Contains(blocks, "rule"), strings.Contains(blocks, "disabled"), !strings.Contains(blocks, "max_in_flight") && a.unary():
					want = 5 // nothing holds those who waited
				case !strings.Contains(blocks, "max_in_flight"):
					want = 4
				}
				if got := d.seen(); len(got) != want {
					t.Errorf("%q are in flight, want %d", got, want)
				}
				for range 5 {
					d.next(nil)
				}
				checkIdle(t, g)
			})
		})
	}
}

func TestCase22_RateRaisedWakesWaiters(t *testing.T) {
	for _, blocks := range []string{
		"rate_limit: {requests_per_second: 1000, burst: 1, max_wait: 1h}",
		"rate_limit: {algorithm: pacing, requests_per_second: 1000, burst: 0, max_wait: 1h}",
		"rate_limit: {requests_per_second: 1000, burst: 1}", // who waits keeps its max_wait
		"breaker: {}",
	} {
		t.Run(blocks, func(t *testing.T) {
			eachArm(t, func(t *testing.T, a arm) {
				g, conn := a.setup(t, "rate_limit: {requests_per_second: 0.01, burst: 1, max_wait: 1h}", &rpctest.Service{})
				var waiters []*pending
				for i := range 6 {
					waiters = append(waiters, a.start(t.Context(), conn, fmt.Sprint(i)))
				}
				pass(50 * time.Second)
				if got := a.state(t, g).RateLimit.Waiting; got != 5 {
					t.Fatalf("%d wait", got)
				}
				a.reload(t, g, blocks)
				pass(5 * time.Millisecond)
				for i, w := range waiters {
					if !w.ended() || w.result().err != nil {
						t.Errorf("call %d: ended %v, %v", i, w.ended(), w.result().err)
					}
				}
				checkIdle(t, g)
			})
		})
	}
}

func TestCase22_RateLoweredRefusesWhoWouldBeLate(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		g, conn := a.setup(t, "rate_limit: {requests_per_second: 10, burst: 1, max_wait: 1s}", &rpctest.Service{})
		var waiters []*pending
		for i := range 6 {
			waiters = append(waiters, a.start(t.Context(), conn, fmt.Sprint(i)))
		}
		a.reload(t, g, "rate_limit: {requests_per_second: 2.5, burst: 1, max_wait: 1s}")
		// A token each 400 ms now: two turns come in time.
		for i, w := range waiters[1:] {
			if late := i >= 2; late != w.ended() || late && (reasonOf(w.result().err) != interceptors.ReasonRateLimited || w.result().took != 0) {
				t.Errorf("waiter %d: ended %v after %v: %v", i, w.ended(), w.result().took, w.result().err)
			}
		}
		pass(time.Second)
		for i, w := range waiters[1:3] {
			if took := time.Duration(i+1) * 400 * time.Millisecond; w.result().err != nil || !near(w.result().took, took) {
				t.Errorf("waiter %d took %v, want %v: %v", i, w.result().took, took, w.result().err)
			}
		}
		if got := a.state(t, g); got.RateLimit.Rate != 2.5 {
			t.Errorf("%+v", *got.RateLimit)
		}
		checkIdle(t, g)
	})
}

// Tokens are kept: a reload neither refills the bucket nor empties it.
func TestReloadKeepsTokens(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		g, conn := a.setup(t, "rate_limit: {requests_per_second: 1, burst: 10}", &rpctest.Service{})
		for range 6 {
			a.must(t, conn, "")
		}
		want := func(tokens float64) {
			t.Helper()
			if got := a.state(t, g).RateLimit.Available; got != tokens {
				t.Errorf("%v tokens, want %v", got, tokens)
			}
		}
		for range 3 {
			a.reload(t, g, "rate_limit: {requests_per_second: 1, burst: 10}, breaker: {}")
			want(4)
		}
		a.reload(t, g, "rate_limit: {requests_per_second: 2, burst: 100}")
		want(4)
		a.reload(t, g, "rate_limit: {requests_per_second: 4, burst: 2}")
		want(2)
		a.reload(t, g, "rate_limit: {algorithm: pacing, requests_per_second: 4, burst: 0}")
		want(1)
		a.must(t, conn, "")
		if err := a.call(t.Context(), conn, ""); reasonOf(err) != interceptors.ReasonRateLimited {
			t.Errorf("the pacer: %v", err)
		}
		a.reload(t, g, "rate_limit: {requests_per_second: 4, burst: 8}")
		want(0)
		pass(500 * time.Millisecond)
		want(2)
		checkIdle(t, g)
	})
}

func TestCase40_BreakerKeepsItsState(t *testing.T) {
	const blocks = "breaker: {request_volume_threshold: 4, sleep_window: 10s, max_sleep_window: 40s}"
	same := []string{ // as far as the breaker goes
		blocks,
		blocks + ", timeout: 7s",
		blocks + ", concurrency_limit: {max_in_flight: 3, max_streams: 3}",
		blocks + ", rate_limit: {requests_per_second: 1000}",
	}
	eachArm(t, func(t *testing.T, a arm) {
		g, conn := a.setup(t, blocks, script())
		next := 0
		again := func() {
			for range same {
				next++
				a.reload(t, g, same[next%len(same)])
			}
		}
		for range 3 {
			_ = a.call(t.Context(), conn, "UNAVAILABLE")
			again()
		}
		if b := a.state(t, g).Breaker; b.Requests != 3 || b.Failures != 3 || b.State != "closed" {
			t.Fatalf("closed: %+v", *b)
		}
		slow := a.start(t.Context(), conn, "1s UNAVAILABLE") // its result counts
		again()
		pass(time.Second)
		if !slow.ended() {
			t.Fatal("the call has not ended")
		}
		a.wantState(t, g, "open")
		again()
		pass(4 * time.Second)
		if b := a.state(t, g).Breaker; b.RetryAfter != 6 {
			t.Fatalf("open: %+v", *b)
		}
		a.mustNot(t, conn)
		pass(6 * time.Second)
		probe := a.start(t.Context(), conn, "1s UNAVAILABLE")
		again()
		a.wantState(t, g, "half_open")
		a.mustNot(t, conn) // the probe keeps its slot
		pass(time.Second)
		if !probe.ended() {
			t.Fatal("the probe has not ended")
		}
		again()
		if b := a.state(t, g).Breaker; b.State != "open" || b.RetryAfter != 20 {
			t.Fatalf("open again, for twice as long: %+v", *b)
		}
		a.reload(t, g, "breaker: {request_volume_threshold: 4, sleep_window: 5s}") // as long as this allows
		if b := a.state(t, g).Breaker; b.State != "open" || b.RetryAfter != 5 {
			t.Fatalf("open, with a shorter sleep window: %+v", *b)
		}
		pass(5 * time.Second)
		a.must(t, conn, "")
		a.wantState(t, g, "closed")
		checkIdle(t, g)
	})
}

func TestReloadSetsTheBreaker(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		g, conn := a.setup(t, "breaker: {request_volume_threshold: 4, error_percent_threshold: 100}", script())
		a.must(t, conn, "")
		_ = a.call(t.Context(), conn, "UNAVAILABLE")
		_ = a.call(t.Context(), conn, "UNAVAILABLE")
		a.reload(t, g, "breaker: {request_volume_threshold: 4}")
		a.wantState(t, g, "closed")
		_ = a.call(t.Context(), conn, "UNAVAILABLE") // 3 of 4
		a.wantState(t, g, "open")
		a.reload(t, g, "timeout: 1s")
		a.must(t, conn, "")
		if s := a.state(t, g); s.Breaker != nil || s.Counts.Admitted != 5 {
			t.Errorf("without a breaker: %+v", s)
		}
		a.reload(t, g, "breaker: {}") // a new one
		a.must(t, conn, "")
		if b := a.state(t, g).Breaker; b.State != "closed" || b.Requests != 1 {
			t.Errorf("%+v", *b)
		}
		a.reload(t, g, "breaker: {window: 20s}") // a new window
		if b := a.state(t, g).Breaker; b.Requests != 0 {
			t.Errorf("%+v", *b)
		}
		checkIdle(t, g)
	})
}

// A breaker that is taken away while a call is under way may still change its state.
func TestReloadTakesTheBreakerOfACall(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		g, conn := a.setup(t, "breaker: {request_volume_threshold: 1}", script())
		slow := a.start(t.Context(), conn, "1s UNAVAILABLE")
		a.reload(t, g, "timeout: 1h, stream_timeout: 1h")
		pass(time.Second)
		if !slow.ended() {
			t.Error("the call has not ended")
		}
		a.must(t, conn, "")
		if s := a.state(t, g); s.Counts.Failure != 1 || s.Counts.Success != 1 {
			t.Errorf("%+v", s.Counts)
		}
		checkIdle(t, g)
	})
}

func TestCase40_ReloadWithAnErrorChangesNothing(t *testing.T) {
	const policy = `{
client: {rules: [{methods: ['*'], breaker: {request_volume_threshold: 1}, rate_limit: {requests_per_second: 0.001, burst: 2}}, {methods: [/x.Y/Z], rate_limit: {external: mine}}]},
server: {drain: {announce: 3s, grace: 10s, cut: 1s}, rules: [{methods: [/test.v1.Test/*], concurrency_limit: {max_in_flight: 2}, timeout: 2s}]}}`
	for name, c := range map[string]struct {
		yaml string
		want []string
	}{
		"values out of range": {
			"{client: {rules: [{methods: ['*'], breaker: {error_percent_threshold: 50}}]}, server: {drain: {cut: 1s}}}",
			[]string{"client.rules[1].methods[0]", "server.drain.cut"},
		},
		"a limiter that nobody gave": {
			"{client: {rules: [{methods: ['*'], breaker: {}, rate_limit: {external: yours}}]}, server: {rules: [{methods: ['*'], rate_limit: {external: theirs}}]}}",
			[]string{`client.rules[0].rate_limit.external: found "yours"`, `server.rules[0].rate_limit.external: found "theirs"`},
		},
		"a fallback that nothing needs": {
			"client: {rules: [{methods: [/x.Y/*], breaker: {}}]}",
			[]string{`WithFallback: no client rule is for "/test.v1.Test/Unary"`},
		},
		"a method that the server lacks": {
			"{client: {rules: [{methods: ['*'], breaker: {}}]}, server: {rules: [{methods: [/test.v1.Test/Unari, /test.v1.Test/Bidi], timeout: 1s}]}}",
			[]string{"server.rules: the server has no method /test.v1.Test/Unari"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := serveDrain(t, policy, script(),
					interceptors.WithLimiter("mine", limiterFunc(func(context.Context) error { return nil })),
					interceptors.WithFallback(rpctest.Unary, func(_ context.Context, _ string, _, _ any, cause error) error { return cause }))
				conn := rpctest.Dial(t, r.lis, r.guard.DialOptions()...)
				_, _ = rpctest.Call(t.Context(), conn, rpctest.Unary, "UNAVAILABLE")
				before := jsonOf(t, r.guard)
				p, err := interceptors.Parse("policy.yaml", []byte(c.yaml))
				if err != nil {
					t.Fatal(err)
				}
				if name == "values out of range" { // which Parse would find
					p.Client.Rules = append(p.Client.Rules, &resiliencev1.MethodPolicy{Methods: []string{"nonsense"}})
					p.Server.Drain.Cut = durationpb.New(-time.Second)
				}
				if err = r.guard.Reload(p); err == nil {
					t.Fatal("no error")
				}
				for _, want := range c.want {
					if !strings.Contains(err.Error(), want) {
						t.Errorf("the error lacks %q:\n%v", want, err)
					}
				}
				if after := jsonOf(t, r.guard); after != before {
					t.Errorf("before\n%s\nafter\n%s", before, after)
				}
				if _, err := rpctest.Call(t.Context(), conn, rpctest.Unary, ""); reasonOf(err) != interceptors.ReasonBreakerOpen {
					t.Errorf("the breaker is open: %v", err)
				}
				if _, err := rpctest.Call(t.Context(), conn, rpctest.Other, ""); err != nil { // not yet known: what is found is the old rule
					t.Error(err)
				}
				if m := gatesOf(t, r.guard, interceptors.Client, rpctest.Other); m.RateLimit == nil || m.RateLimit.Available != 1 {
					t.Errorf("%+v", m)
				}
				if _, err := rpctest.Call(t.Context(), r.conn, rpctest.Unary, "hang"); status.Code(err) != codes.DeadlineExceeded {
					t.Errorf("the server's timeout: %v", err)
				}
				r.stop()
				r.end(t, 3*time.Second)
			})
		})
	}
}

func jsonOf(t *testing.T, g *interceptors.Guard) string {
	t.Helper()
	b, err := json.MarshalIndent(g.Snapshot(), "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// Calls of every kind on both sides while policies change: what the callers saw is
// what is counted, no permit is lost, and the breaker that no policy changes stays open.
func TestCase40_ReloadUnderLoad(t *testing.T) {
	const keep = "{methods: [/x.Y/Down], breaker: {request_volume_threshold: 1, sleep_window: 1h}}"
	policies := []string{
		"{methods: ['*'], breaker: {request_volume_threshold: 1000}, concurrency_limit: {max_in_flight: 3, max_streams: 2, max_queue: 4, max_queue_wait: 20ms}, rate_limit: {requests_per_second: 2000, burst: 5, max_wait: 10ms}}",
		"{methods: ['*'], breaker: {request_volume_threshold: 500, window: 1s}, concurrency_limit: {max_in_flight: 1, max_streams: 1, max_queue: 2}, rate_limit: {algorithm: pacing, requests_per_second: 5000, max_wait: 5ms}}",
		"{methods: ['*'], concurrency_limit: {max_in_flight: 9, max_queue: 9, scope: rule}, rate_limit: {requests_per_second: 3000, burst: 1, scope: rule, max_wait: 3ms}}",
		"{methods: ['*'], breaker: {request_volume_threshold: 1, sleep_window: 1ms, half_open_probes: 3}, timeout: 20ms}",
		"{methods: ['/x.Y/Other'], timeout: 1s}",
		"{methods: ['/test.v1.Test/*'], concurrency_limit: {max_in_flight: 2, max_streams: 9}}",
	}
	both := func(rule string) string {
		rules := "rules: [" + rule + "," + keep + "]"
		return "{client: {" + rules + "}, server: {" + rules + "}}"
	}
	g := mustGuard(t, both(policies[0]))
	if err := callOn(g, channel(t, "passthrough:///test"), "/x.Y/Down", status.Error(codes.Unavailable, "")); err == nil {
		t.Fatal("no error")
	}
	conn := rpctest.Start(t, script(), g.ServerOptions(), g.DialOptions())
	stop := make(chan struct{})
	var calls sync.WaitGroup
	var made, reached atomic.Uint64
	for i := range 12 {
		calls.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 1))
			for {
				select {
				case <-stop:
					return
				default:
				}
				a := arms[r.IntN(2)]
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(1+r.IntN(50))*time.Millisecond)
				text := []string{"", "1ms", "UNAVAILABLE", "hang", "NOT_FOUND"}[r.IntN(5)]
				err := a.call(ctx, conn, text)
				made.Add(1)
				if err == nil || status.Code(err) == codes.NotFound {
					reached.Add(1)
				}
				cancel()
			}
		})
	}
	done := time.After(1500 * time.Millisecond)
	n := 0
	for over := false; !over; n++ {
		mustReload(t, g, both(policies[n%len(policies)]))
		select {
		case <-done:
			over = true
		case <-time.After(time.Millisecond):
		}
	}
	close(stop)
	calls.Wait()
	if made.Load() < 100 || reached.Load() == 0 || n < 20 {
		t.Errorf("only %d calls, %d answered, %d reloads", made.Load(), reached.Load(), n)
	}
	wantState(t, g, interceptors.Client, "/x.Y/Down", "open")
	eventually(t, "the server's calls to end", func() bool { return g.Snapshot().Drain.InFlight == 0 })
	checkIdle(t, g)
	// And it still works.
	mustReload(t, g, both("{methods: ['*'], concurrency_limit: {max_in_flight: 1, max_streams: 1}}"))
	for _, a := range arms[:2] {
		for range 3 {
			if err := a.call(t.Context(), conn, ""); err != nil {
				t.Errorf("%s: %v", a.name, err)
			}
		}
	}
	checkIdle(t, g)
}

// Counts go on over reloads: every call that was made is in one of them.
func TestReloadKeepsCounts(t *testing.T) {
	g := mustGuard(t, "server: {rules: [{methods: ['*'], concurrency_limit: {max_in_flight: 1000}}]}")
	var calls sync.WaitGroup
	for range 4 {
		calls.Go(func() {
			for range 500 {
				if err := serveOn(g, rpctest.Unary, nil); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range 200 {
		mustReload(t, g, fmt.Sprintf("server: {rules: [{methods: ['*'], breaker: {request_volume_threshold: %d}, concurrency_limit: {max_in_flight: %d}}]}", i+1, 1000+i))
	}
	calls.Wait()
	wantEnded(t, g, interceptors.Server, rpctest.Unary, ended{success: 2000})
}

func TestReloadRules(t *testing.T) {
	g := mustGuard(t, "server: {rules: [{methods: ['/a.A/*'], rate_limit: {requests_per_second: 0.001, burst: 5}}]}")
	calls := func(method string, passes int) {
		t.Helper()
		for i := range passes + 1 {
			if err := serveOn(g, method, nil); (err == nil) != (i < passes) {
				t.Fatalf("call %d of %s: %v, want %d to pass", i, method, err, passes)
			}
		}
	}
	calls("/a.A/M", 5)
	const all = "{methods: ['*'], rate_limit: {requests_per_second: 0.001, burst: 2}}"
	mustReload(t, g, "server: {rules: ["+all+", {methods: [/a.A/M], timeout: 1s}, {name: renamed, methods: ['/a.A/*'], rate_limit: {requests_per_second: 0.001, burst: 5}}]}")
	calls("/a.A/M", 0) // its limit goes on, under another name
	if err := serveOn(g, "/a.A/M", nil); !strings.Contains(err.Error(), "renamed") {
		t.Errorf("the rule is not named: %v", err)
	}
	calls("/b.B/M", 2) // a method that no rule was for
	mustReload(t, g, "server: {rules: ["+all+"]}")
	calls("/a.A/M", 0)
	mustReload(t, g, "server: {rules: [{methods: ['/c.C/*'], timeout: 1s}]}")
	for range 10 {
		if err := serveOn(g, "/a.A/M", nil); err != nil {
			t.Fatal(err)
		}
	}
	if s := g.Snapshot(); len(s.Methods) != 0 {
		t.Errorf("no rule is for them: %+v", s.Methods)
	}
	mustReload(t, g, "server: {rules: ["+all+"]}")
	calls("/a.A/M", 2) // anew
	if err := g.Reload(&resiliencev1.Policy{}); err != nil || serveOn(g, "/a.A/M", nil) != nil {
		t.Errorf("an empty policy: %v", err)
	}
}

// A rule with scope rule is known again by its patterns, wherever it stands.
func TestReloadKnowsSharedLimits(t *testing.T) {
	g := mustGuard(t, `server: {rules: [
		{methods: [/a.A/M, '/b.B/*'], rate_limit: {requests_per_second: 0.001, burst: 2, scope: rule}, concurrency_limit: {max_in_flight: 7, scope: rule}},
		{methods: ['/c.C/*'], rate_limit: {requests_per_second: 0.001, burst: 4, scope: rule}}]}`)
	calls := func(method string, passes int) {
		t.Helper()
		for i := range passes + 1 {
			if err := serveOn(g, method, nil); (err == nil) != (i < passes) {
				t.Fatalf("call %d of %s: %v, want %d to pass", i, method, err, passes)
			}
		}
	}
	calls("/a.A/M", 2)
	calls("/b.B/M", 0)
	calls("/c.C/M", 4)
	mustReload(t, g, `server: {rules: [
		{methods: ['/d.D/*'], rate_limit: {requests_per_second: 0.001, burst: 1, scope: rule}},
		{methods: ['/c.C/*', '/e.E/*'], rate_limit: {requests_per_second: 0.001, burst: 4, scope: rule}},
		{name: moved, methods: ['/b.B/*'], rate_limit: {requests_per_second: 0.001, burst: 3, scope: rule}},
		{methods: [/a.A/M], rate_limit: {requests_per_second: 0.001, burst: 2, scope: rule}}]}`)
	calls("/c.C/M", 0) // no tokens came
	calls("/e.E/M", 0) // who joins shares
	calls("/b.B/M", 0) // it goes on with the patterns that are left
	calls("/a.A/M", 2) // what was split off is new
	calls("/d.D/M", 1) // it does not stand where another rule stood
	if l := gatesOf(t, g, interceptors.Server, "/b.B/M").ConcurrencyLimit; l != nil {
		t.Errorf("the concurrency limit is gone: %+v", *l)
	}
	mustReload(t, g, "server: {rules: [{methods: ['*'], rate_limit: {requests_per_second: 0.001, burst: 1}}]}")
	calls("/c.C/M", 1) // of its own: another scope begins anew
	checkIdle(t, g)
}

// Methods beyond the cap share limits; a reload sets those too, and gives them no breaker.
func TestReloadBeyondTheCap(t *testing.T) {
	const rule = "{client: {}, server: {rules: [{methods: ['*'], breaker: {request_volume_threshold: 1}, rate_limit: {requests_per_second: 0.001, burst: %d}}%s]}}"
	g := mustGuard(t, fmt.Sprintf(rule, 5, ""))
	for i := range maxStates {
		if err := serveOn(g, fmt.Sprintf("/m.M/%d", i), nil); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 6 {
		if err := serveOn(g, fmt.Sprintf("/beyond.B/%d", i), status.Error(codes.Unavailable, "")); (reasonOf(err) == interceptors.ReasonRateLimited) != (i == 5) {
			t.Errorf("call %d: %v", i, err)
		}
	}
	mustReload(t, g, fmt.Sprintf(rule, 7, ", {methods: ['/svc.S/*'], concurrency_limit: {max_in_flight: 1}}, {methods: [/beyond.B/0], timeout: 1s}"))
	if err := serveOn(g, "/beyond.B/1", nil); reasonOf(err) != interceptors.ReasonRateLimited {
		t.Errorf("its tokens are kept: %v", err)
	}
	for i := range 7 { // it is named now
		if err := serveOn(g, "/beyond.B/0", nil); err != nil {
			t.Errorf("call %d: %v", i, err)
		}
	}
	s := g.Snapshot()
	if n := len(s.Methods); n != maxStates+2 {
		t.Errorf("%d states", n)
	}
	if m := gatesOf(t, g, interceptors.Server, "_OTHER"); m.Breaker != nil || m.RateLimit == nil {
		t.Errorf("%+v", m)
	}
	mustReload(t, g, "server: {rules: [{methods: ['/svc.S/*'], concurrency_limit: {max_in_flight: 1}}]}")
	if s := g.Snapshot(); len(s.Methods) != 0 {
		t.Errorf("%d states of methods that no rule is for", len(s.Methods))
	}
	if err := serveOn(g, "/svc.S/M", nil); err != nil { // there is room again
		t.Error(err)
	}
	gatesOf(t, g, interceptors.Server, "/svc.S/M")
	checkIdle(t, g)
}

// Whatever comes first, a first call or the reload, a method has what the last policy
// gives it.
func TestReloadDuringFirstCalls(t *testing.T) {
	g := mustGuard(t, "server: {}")
	var calls sync.WaitGroup
	for i := range 4 {
		calls.Go(func() {
			for n := range 400 {
				_ = serveOn(g, fmt.Sprintf("/s%d.S/%d", i, n), nil)
			}
		})
	}
	for i := range 60 {
		mustReload(t, g, []string{
			"server: {}", "server: {rules: [{methods: ['*'], breaker: {}}]}",
			"server: {rules: [{methods: ['/s1.S/*', '/s2.S/*'], rate_limit: {requests_per_second: 10000}}]}",
			"server: {rules: [{methods: ['/s1.S/*'], concurrency_limit: {max_in_flight: 9}}, {methods: ['/s3.S/*'], breaker: {}}]}",
		}[i%4])
	}
	calls.Wait()
	for _, m := range g.Snapshot().Methods {
		one, three := strings.HasPrefix(m.Method, "/s1."), strings.HasPrefix(m.Method, "/s3.")
		if !one && !three || (m.ConcurrencyLimit != nil) != one || (m.Breaker != nil) != three || m.RateLimit != nil {
			t.Fatalf("%+v", m)
		}
	}
	checkIdle(t, g)
}

func TestReloadWhileServing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g *interceptors.Guard
		s := &rpctest.Service{Unary: func(_ context.Context, req *rpctest.Message) (*rpctest.Message, error) {
			if req.GetValue() == "reload" { // a handler may
				return req, reload(g, "server: {drain: {announce: 30s, grace: 1s, cut: 1s}, rules: [{methods: [/test.v1.Test/Unary], concurrency_limit: {max_in_flight: 1}}]}")
			}
			return req, nil
		}}
		r := serveDrain(t, "server: {drain: {announce: 10m}}", s)
		g = r.guard
		synctest.Wait()
		if _, err := rpctest.Call(t.Context(), r.conn, rpctest.Unary, "reload"); err != nil {
			t.Fatal(err)
		}
		r.stop()
		pass(20 * time.Second)
		// A phase is as long as the policy said when it began; those to come, as it says then.
		mustReload(t, g, "server: {drain: {announce: 1s, grace: 5s, cut: 1s, reject_new: true}}")
		if _, err := rpctest.Call(t.Context(), r.conn, rpctest.Unary, ""); err != nil {
			t.Errorf("announced: %v", err)
		}
		stream := streamOpen(t, t.Context(), r.conn, rpctest.Bidi, "")
		if took, err := r.wait(); took != 15*time.Second || err == nil {
			t.Errorf("the drain went on for %v: %v", took, err)
		}
		_ = stream
	})
}

func TestReloadOfNoGuard(t *testing.T) {
	var none *interceptors.Guard
	if err := none.Reload(nil); err == nil || !strings.Contains(err.Error(), "nil *Guard") {
		t.Error(err)
	}
	g := mustGuard(t, "server: {}")
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	if err := g.Reload(&resiliencev1.Policy{}); err == nil || !strings.Contains(err.Error(), "closed") {
		t.Error(err)
	}
}

// reloadLog counts what is logged of reloads, and calls back.
type reloadLog struct {
	slog.Handler
	of    *interceptors.Guard
	lines atomic.Int32
}

func (l *reloadLog) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "policy reloaded" {
		l.of.Snapshot()
		if l.lines.Add(1) < 3 {
			return l.of.Reload(&resiliencev1.Policy{})
		}
	}
	return nil
}

func TestReloadIsLogged(t *testing.T) {
	l := &reloadLog{Handler: slog.NewTextHandler(t.Output(), nil)}
	l.of = mustGuard(t, "server: {}", interceptors.WithLogger(slog.New(l)))
	if err := l.of.Reload(&resiliencev1.Policy{}); err != nil || l.lines.Load() != 3 {
		t.Errorf("%d lines, %v", l.lines.Load(), err)
	}
	if err := l.of.Reload(nil); err == nil || l.lines.Load() != 3 {
		t.Errorf("%d lines, %v", l.lines.Load(), err)
	}
}

// A policy is copied: what is done to it afterwards has no effect.
func TestReloadCopiesThePolicy(t *testing.T) {
	g := mustGuard(t, "server: {}")
	rule := &resiliencev1.MethodPolicy{Methods: []string{"*"}, RateLimit: &resiliencev1.RateLimit{RequestsPerSecond: 1}}
	p := &resiliencev1.Policy{Server: &resiliencev1.ServerPolicy{Rules: []*resiliencev1.MethodPolicy{rule}}}
	if err := g.Reload(p); err != nil {
		t.Fatal(err)
	}
	rule.RateLimit.RequestsPerSecond, rule.Methods[0] = 7, "nonsense"
	_ = serveOn(g, "/a.A/M", nil)
	if m := gatesOf(t, g, interceptors.Server, "/a.A/M"); m.RateLimit == nil || m.RateLimit.Rate != 1 {
		t.Errorf("%+v", m)
	}
}

// Timeouts and the limiter given in Go are those of the policy that a call began with.
func TestReloadSetsTheRest(t *testing.T) {
	refuse := limiterFunc(func(context.Context) error { return errors.New("no") })
	eachArm(t, func(t *testing.T, a arm) {
		g, conn := a.setup(t, "timeout: 10s, stream_timeout: 10s", script(), interceptors.WithLimiter("mine", refuse))
		slow := a.start(t.Context(), conn, "hang")
		a.reload(t, g, "timeout: 2s, stream_timeout: 2s")
		quick := a.start(t.Context(), conn, "hang")
		pass(3 * time.Second)
		if slow.ended() || status.Code(quick.result().err) != codes.DeadlineExceeded || !near(quick.result().took, 2*time.Second) {
			t.Errorf("the first has ended: %v, the second after %v: %v", slow.ended(), quick.result().took, quick.result().err)
		}
		pass(7 * time.Second)
		if status.Code(slow.result().err) != codes.DeadlineExceeded {
			t.Errorf("the first: %v", slow.result().err)
		}
		a.reload(t, g, "rate_limit: {external: mine}")
		if err := a.call(t.Context(), conn, ""); reasonOf(err) != interceptors.ReasonRateLimited {
			t.Errorf("the limiter: %v", err)
		}
		a.reload(t, g, "minimum_budget: 1h")
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := a.call(ctx, conn, ""); reasonOf(err) != interceptors.ReasonBudgetTooSmall {
			t.Errorf("the budget: %v", err)
		}
		a.reload(t, g, "minimum_budget: 1s")
		a.must(t, conn, "")
		checkIdle(t, g)
	})
}

// What the Hystrix stream shows follows the policy.
func TestReloadIsShownOnTheDashboard(t *testing.T) {
	g := mustGuard(t, "server: {rules: [{methods: ['*'], rate_limit: {requests_per_second: 100}}]}")
	look(t, g)
	_ = serveOn(g, "/a.A/M", nil)
	if all := look(t, g); len(all) != 0 {
		t.Errorf("no breaker: %v", names(all))
	}
	mustReload(t, g, "server: {rules: [{methods: ['*'], breaker: {error_percent_threshold: 7}, concurrency_limit: {max_in_flight: 3}}]}")
	_ = serveOn(g, "/a.A/M", nil)
	e := only(t, look(t, g), "HystrixCommand", "a.A/M")
	if e["rollingCountSuccess"] != 1.0 || e["propertyValue_circuitBreakerErrorThresholdPercentage"] != 7.0 {
		t.Errorf("%v", e)
	}
	mustReload(t, g, "server: {rules: [{methods: ['*'], breaker: {error_percent_threshold: 8}}]}")
	all := look(t, g)
	if e := only(t, all, "HystrixCommand", "a.A/M"); len(all) != 1 || e["rollingCountSuccess"] != 1.0 || e["propertyValue_circuitBreakerErrorThresholdPercentage"] != 8.0 {
		t.Errorf("%v", all)
	}
	mustReload(t, g, "server: {rules: [{methods: ['*'], timeout: 1s}]}")
	if all := look(t, g); len(all) != 0 {
		t.Errorf("no breaker: %v", names(all))
	}
}
