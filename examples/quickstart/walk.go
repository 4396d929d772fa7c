package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
)

// walk goes from section to section and writes down what it counts.
type walk struct {
	pace
	policy *resiliencev1.Policy
	guard  *interceptors.Guard
	shop   *child
	client *client
	fleet  *fleet

	show    *progress
	rows    []row
	opening time.Time // not later than when the breaker of Place opened
}

// walkThrough makes the walk. It always returns rows: what went wrong on the way
// is a claim that did not hold.
func walkThrough(ctx context.Context, policy *resiliencev1.Policy, p pace, shop *child, out *os.File) []row {
	began := time.Now()
	w := &walk{pace: p, policy: policy, shop: shop}
	err := w.all(ctx, out)
	took := time.Since(began)
	counted := took.Round(100 * time.Millisecond).String()
	if err != nil {
		counted = err.Error()
	}
	w.claimThat(err == nil && took < p.limit, "the walk comes to its end", "within "+p.limit.String(), counted)
	return w.rows
}

func (w *walk) all(ctx context.Context, out *os.File) (err error) {
	show := newProgress(out)
	w.show = show
	w.guard, err = interceptors.New(w.policy,
		interceptors.WithLogger(slog.New(slog.NewTextHandler(show, withoutTime))),
		interceptors.WithFallback(search, noOrders))
	if err != nil {
		return err
	}
	defer w.guard.Close()
	if w.client, err = dial(w.guard, w.shop.addr); err != nil {
		return err
	}
	defer w.client.conn.Close()
	show.watch(w.guard)
	defer show.close()
	defer func() { w.fleet.close() }()

	for i, s := range []struct {
		title string
		walk  func(context.Context) error
	}{
		{"Healthy traffic", w.healthy},
		{"Place fails: its breaker opens", w.outage},
		{"Place heals: its breaker closes", w.healing},
		{"Search fails: its hystrix circuit opens, a fallback answers, it heals", w.circuit},
		{"Get gets more load than it is paced for", w.pacing},
		{"List gets more load than its rate limit", w.rateLimit},
		{"Search gets more load than its concurrency limit", w.concurrencyLimit},
		{"Handlers panic", w.panics},
		{"SIGTERM with calls in flight", w.drain},
		{"Two servers are replaced, one after the other, under load", w.rolling},
		{"One of two servers is killed with calls in flight", w.crash},
		{"One of three replicas turns slow, then it is killed", w.replicas},
	} {
		show.step(fmt.Sprintf("%d %s", i+1, s.title))
		if err := s.walk(ctx); err != nil {
			return err // the rest would only say the same again
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

// withoutTime is for logs that are read as they happen.
var withoutTime = &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
	if a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}}

// claim adds a row that holds if what was counted reads like what was expected.
func (w *walk) claim(claim, expected, counted string) {
	w.claimThat(expected == counted, claim, expected, counted)
}

func (w *walk) claimThat(holds bool, claim, expected, counted string) {
	w.rows = append(w.rows, row{Claim: claim, Expected: expected, Counted: counted, OK: holds})
}

// claimAll adds a row that holds if the result of every call matches, and if
// there was a call.
func (w *walk) claimAll(claim string, errs []error, match func(error) bool) {
	n, matching := len(errs), count(errs, match)
	expected := outOf(n, n)
	if n == 0 {
		expected = "at least one"
	}
	w.claimThat(n > 0 && matching == n, claim, expected, outOf(matching, n))
}

func outOf(n, all int) string { return fmt.Sprintf("%d of %d", n, all) }

// arrivals returns how many calls of the methods the handlers have seen while f
// ran.
func (w *walk) arrivals(ctx context.Context, f func(), methods ...string) (n int, err error) {
	before, err := w.shop.look(ctx)
	if err != nil {
		return 0, err
	}
	f()
	after, err := w.shop.look(ctx)
	for _, m := range methods {
		n += after.Methods[m].Started - before.Methods[m].Started
	}
	return n, err
}

// state is what the client's guard says of a method's breaker.
func (w *walk) state(method string) string {
	for _, m := range w.guard.Snapshot().Methods {
		if m.Method == method && m.Breaker != nil {
			return m.Breaker.State
		}
	}
	return "none"
}

// closed counts the breakers of methods that are closed.
func (w *walk) closed(methods []string) int {
	n := 0
	for _, m := range methods {
		if w.state(m) == "closed" {
			n++
		}
	}
	return n
}

// rule finds a rule of the policy by its name.
func rule(rules []*resiliencev1.MethodPolicy, name string) *resiliencev1.MethodPolicy {
	for _, r := range rules {
		if r.GetName() == name {
			return r
		}
	}
	return nil
}

// times makes calls one after the other.
func times(n int, call func() error) []error {
	errs := make([]error, n)
	for i := range errs {
		errs[i] = call()
	}
	return errs
}

// together makes calls at the same time; what they return comes over the channel.
func together(n int, call func() error) <-chan error {
	errs := make(chan error, n)
	for range n {
		go func() { errs <- call() }()
	}
	return errs
}

// gather waits for what calls return.
func gather(n int, errs <-chan error) []error { return times(n, func() error { return <-errs }) }

// crowd is n callers that call again and again for a while, with a breath in
// between.
func crowd(ctx context.Context, n int, spell time.Duration, call func() error) (errs []error) {
	var mu sync.Mutex // guards errs
	var callers sync.WaitGroup
	for end := time.Now().Add(spell); n > 0; n-- {
		callers.Go(func() {
			for time.Now().Before(end) && ctx.Err() == nil {
				err := call()
				mu.Lock()
				errs = append(errs, err)
				mu.Unlock()
				pause(ctx, 20*time.Millisecond)
			}
		})
	}
	callers.Wait()
	return errs
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

func count(errs []error, match func(error) bool) int {
	n := 0
	for _, err := range errs {
		if match(err) {
			n++
		}
	}
	return n
}

func isOK(err error) bool { return err == nil }

// failures leaves out the calls that went well.
func failures(errs []error) (bad []error) {
	for _, err := range errs {
		if err != nil {
			bad = append(bad, err)
		}
	}
	return bad
}

// refusedFor matches rejections by either side.
func refusedFor(code codes.Code, why interceptors.Reason) func(error) bool {
	return func(err error) bool {
		reason, _ := refusal(err)
		return reason == why && status.Code(err) == code
	}
}
