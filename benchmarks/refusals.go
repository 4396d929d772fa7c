package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// A refusal is a call that is refused each time.
type refusal struct {
	name   string
	what   string
	reason interceptors.Reason // "": not ours
	many   int                 // refusals that one call stands for; 0: one
	paced  bool                // as of its arm
	make   func() (call func() error, free func())
}

const (
	queueTimeout = "unary client: QUEUE_TIMEOUT"
	onTheWire    = "unary server: RATE_LIMITED, and its status as bytes"
)

// refusals are the gates of an arm, one by one.
func (a arm) refusals() (list []refusal) {
	ours := slices.Contains([]string{clientArm, clientEngineArm, serverArm, serverEngineArm, clientStreamArm, serverStreamArm}, a.name)
	if !ours && !slices.Contains([]string{hystrixArm, hystrixDo, gobreakerArm, byHandArm, failsafeClient, failsafeServer, middlewareServer, middlewareStream}, a.name) {
		return nil // much the same as one of these
	}
	for _, g := range a.gates {
		r := refusal{name: a.name + ": " + string(g), paced: a.paced, make: func() (func() error, func()) {
			call, _, free := a.refusing(g)
			return call, free
		}}
		if ours {
			r.reason = interceptors.Reason(g)
		}
		list = append(list, r)
	}
	return list
}

// moreRefusals are what ours refuses for beside the gates of the arms.
func moreRefusals() []refusal {
	return []refusal{
		{name: "unary client: CONCURRENCY_LIMITED, the queue is full", reason: interceptors.ReasonConcurrencyLimited, make: func() (func() error, func()) {
			return queue("max_queue: 1", 1)
		}},
		{name: queueTimeout, reason: interceptors.ReasonQueueTimeout, many: 100,
			what: "100 calls at once, each on a goroutine that is started for it, wait 1 ms: what that costs is in the CPU.",
			make: func() (func() error, func()) {
				one, free := queue("max_queue: 1000000, max_queue_wait: 1ms", 0)
				return func() error {
					var all sync.WaitGroup
					errs := make([]error, 100)
					for i := range errs {
						all.Go(func() { errs[i] = one() })
					}
					all.Wait()
					if slices.Contains(errs, nil) {
						return nil
					}
					return errs[0]
				}, free
			}},
		{name: "unary client: BUDGET_TOO_SMALL", reason: interceptors.ReasonBudgetTooSmall, make: func() (func() error, func()) {
			intercept := parsed("client: {rules: [{methods: ['*'], minimum_budget: 1h}]}").UnaryClientInterceptor()
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
			return func() error { return intercept(ctx, method, nil, nil, nil, nil) }, cancel
		}},
		{name: "unary server: BUDGET_TOO_SMALL", reason: interceptors.ReasonBudgetTooSmall, make: func() (func() error, func()) {
			intercept := parsed("server: {rules: [{methods: ['*'], minimum_budget: 1h}]}").UnaryServerInterceptor()
			ctx, cancel := context.WithTimeout(served, 30*time.Minute)
			info := &grpc.UnaryServerInfo{FullMethod: method}
			return func() error {
				_, err := intercept(ctx, nil, info, nil)
				return err
			}, cancel
		}},
		{name: "unary server: DRAINING", reason: interceptors.ReasonDraining, make: func() (func() error, func()) {
			drained := onServer(func(l limits) grpc.UnaryServerInterceptor {
				g := guard(l, breakerBlock, limitBlocks)
				must(g, g.Shutdown(context.Background(), grpc.NewServer()))
				return g.UnaryServerInterceptor()
			})
			return drained(wide, nothing), func() {}
		}},
		{name: onTheWire, what: "what gRPC makes of it: the status with its details, marshalled.", reason: interceptors.ReasonRateLimited, make: func() (func() error, func()) {
			call, _, free := armNamed(serverArm).refusing(rateLimited)
			// gRPC does not copy the status to marshal it, and this program has to: once.
			same := status.Convert(call()).Proto()
			return func() error {
				err := call()
				_ = status.Convert(err)
				must(proto.Marshal(same))
				return err
			}, free
		}},
	}
}

// cheap is whether a refusal has to be one allocation: on a client, by the window
// engine (hystrix-go makes some for its report), if it has not waited.
func (r refusal) cheap() bool {
	return r.reason != "" && strings.HasPrefix(r.name, "unary client") && !strings.HasPrefix(r.name, clientEngineArm) && r.name != queueTimeout
}

// queue returns a call that finds the only place taken, and so many calls waiting.
func queue(settings string, waiting int) (call func() error, free func()) {
	g := parsed("client: {rules: [{methods: ['*'], concurrency_limit: {max_in_flight: 1, " + settings + "}}]}")
	end := make(chan struct{})
	call = onClient(func(limits) grpc.UnaryClientInterceptor { return g.UnaryClientInterceptor() })(wide, func() error {
		<-end
		return nil
	})
	for range 1 + waiting {
		go func() { _ = call() }()
	}
	for {
		if m := g.Snapshot().Methods; len(m) == 1 && m[0].ConcurrencyLimit.InFlight == 1 && m[0].ConcurrencyLimit.Queued == waiting {
			return call, func() { close(end) }
		}
		time.Sleep(time.Millisecond)
	}
}

func (r refusal) subject() (s subject, free func()) {
	call, free := r.make()
	return subject{name: "refused: " + r.name, many: r.many, paced: r.paced, calls: func() func() error {
		return func() error {
			if call() == nil {
				return errors.New("was admitted")
			}
			return nil
		}
	}}, free
}
