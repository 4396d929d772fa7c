package interceptors_test

import (
	"context"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

const allGates = `
client:
  rules:
    - methods: ["*"]
      breaker: {request_volume_threshold: 20, error_percent_threshold: 60, sleep_window: 5ms, half_open_probes: 2, slow_call_threshold: 1s}
      rate_limit: {requests_per_second: 500, burst: 5, max_wait: 5ms}
      concurrency_limit: {max_in_flight: 6, max_streams: 6, max_queue: 4, max_queue_wait: 5ms}
      timeout: 50ms
      stream_timeout: 100ms
      minimum_budget: 1ms
server:
  rules:
    - methods: ["*"]
      breaker: {request_volume_threshold: 20, error_percent_threshold: 60, sleep_window: 5ms, half_open_probes: 2}
      rate_limit: {requests_per_second: 500, burst: 5, max_wait: 5ms}
      concurrency_limit: {max_in_flight: 4, scope: rule, max_queue: 4, max_queue_wait: 5ms}
      timeout: 40ms
      stream_timeout: 90ms
`

// stress makes random calls and remembers how to end what it has abandoned.
type stress struct {
	conn   *grpc.ClientConn
	cancel context.CancelFunc
	ctx    context.Context // of abandoned streams
}

var stressTexts = []string{"", "", "", "1ms", "10ms", "UNAVAILABLE", "NOT_FOUND", "RESOURCE_EXHAUSTED", "2ms INTERNAL", "hang", "panic", "Goexit", "deaf"}

// stressful is script with handlers that panic, Goexit or ignore their context.
// It notes the most handlers that have run at once.
func stressful(most *atomic.Int64) *rpctest.Service {
	s, running := script(), atomic.Int64{}
	enter := func() {
		n := running.Add(1)
		for {
			seen := most.Load()
			if n <= seen || most.CompareAndSwap(seen, n) {
				return
			}
		}
	}
	unruly := func(text string) {
		switch text {
		case "panic":
			panic("boom")
		case "Goexit":
			runtime.Goexit()
		case "deaf":
			time.Sleep(150 * time.Millisecond)
		}
	}
	return &rpctest.Service{
		Unary: func(ctx context.Context, req *rpctest.Message) (*rpctest.Message, error) {
			enter()
			defer running.Add(-1)
			unruly(req.GetValue())
			return s.Unary(ctx, req)
		},
		Stream: func(ss grpc.ServerStream) error {
			enter()
			defer running.Add(-1)
			return s.Stream(unrulyStream{ss, unruly})
		},
	}
}

type unrulyStream struct {
	grpc.ServerStream
	unruly func(text string)
}

func (s unrulyStream) RecvMsg(m any) error {
	if err := s.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	s.unruly(m.(*rpctest.Message).GetValue())
	return nil
}

// one makes a random call. Whatever comes of it is fine, as long as it ends.
func (s *stress) one(rnd *rand.Rand) {
	ctx, cancel := context.WithCancel(s.ctx)
	switch rnd.IntN(4) {
	case 0:
		ctx, cancel = context.WithTimeout(s.ctx, time.Duration(rnd.IntN(int(30*time.Millisecond))))
	case 1:
		time.AfterFunc(time.Duration(rnd.IntN(int(10*time.Millisecond))), cancel)
	}
	abandon := false
	defer func() {
		if !abandon {
			cancel()
		}
	}()
	text := stressTexts[rnd.IntN(len(stressTexts))]
	method := []string{rpctest.Unary, rpctest.Other, rpctest.ServerStream, rpctest.ClientStream, rpctest.Bidi}[rnd.IntN(5)]
	if method == rpctest.Unary || method == rpctest.Other {
		_, _ = rpctest.Call(ctx, s.conn, method, text)
		return
	}
	stream, err := rpctest.Open(ctx, s.conn, method)
	if err != nil {
		return
	}
	abandon = rnd.IntN(4) == 0
	var sending sync.WaitGroup
	sending.Go(func() {
		_ = rpctest.Send(stream, text)
		_ = rpctest.Send(stream, "1ms")
		if !abandon {
			_ = stream.CloseSend()
		}
	})
	if rnd.IntN(3) == 0 {
		_, _ = stream.Header()
	}
	for err == nil && !abandon {
		_, err = rpctest.Recv(stream)
		if method == rpctest.ClientStream {
			break
		}
	}
	sending.Wait()
}

func TestStress(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	synctest.Test(t, func(t *testing.T) {
		var most atomic.Int64
		g := mustGuard(t, allGates)
		mines := atomic.Uint64{} // every 50th call blows up in an interceptor further in
		s := &stress{conn: rpctest.Start(t, stressful(&most), g.ServerOptions(), g.DialOptions(
			grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
				if mines.Add(1)%50 == 0 {
					panic("boom")
				}
				return invoker(ctx, method, req, reply, cc, opts...)
			}),
			grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
				if mines.Add(1)%50 == 0 {
					runtime.Goexit()
				}
				return streamer(ctx, desc, cc, method, opts...)
			})))}
		s.ctx, s.cancel = context.WithCancel(t.Context())
		defer s.cancel()

		const workers, calls = 24, 120
		var working sync.WaitGroup
		for w := range workers {
			working.Go(func() {
				rnd := rand.New(rand.NewPCG(seed, uint64(w)))
				for range calls {
					survive(func() { s.one(rnd) })
					time.Sleep(time.Duration(rnd.IntN(int(2 * time.Millisecond))))
				}
			})
		}
		done := make(chan struct{})
		go func() {
			for {
				select {
				case <-done:
					return
				case <-time.After(time.Millisecond):
					checkConsistent(t, g)
				}
			}
		}()
		working.Wait()
		close(done)
		s.cancel()
		pass(time.Second) // handlers that ignore their context end
		checkIdle(t, g)
		if n := most.Load(); n > 4 {
			t.Errorf("%d handlers ran at once, the limit is 4", n)
		}
		checkStressed(t, g)
	})
}

// checkConsistent checks what holds at any time.
func checkConsistent(t *testing.T, g *interceptors.Guard) {
	for _, m := range g.Snapshot().Methods {
		if c := m.Counts; c.Success+c.Failure+c.Neutral+c.Dropped > c.Admitted {
			t.Errorf("%v %s: more ended than admitted: %+v", m.Side, m.Method, c)
		}
		if l := m.ConcurrencyLimit; l.InFlight > 6 || l.Streams > 6 || l.InFlight < 0 || l.Streams < 0 || l.Queued > 8 {
			t.Errorf("%v %s: %+v", m.Side, m.Method, *l)
		}
	}
}

// checkStressed checks that every gate has said yes and no, or the test proves
// little.
func checkStressed(t *testing.T, g *interceptors.Guard) {
	var admitted uint64
	rejected := map[interceptors.Reason]uint64{}
	for _, m := range g.Snapshot().Methods {
		admitted += m.Counts.Admitted
		for reason, n := range m.Counts.Rejected {
			rejected[reason] += n
		}
	}
	t.Logf("%d admitted, rejected: %v", admitted, rejected)
	for _, reason := range []interceptors.Reason{interceptors.ReasonBreakerOpen, interceptors.ReasonRateLimited, interceptors.ReasonConcurrencyLimited, interceptors.ReasonQueueTimeout, interceptors.ReasonBudgetTooSmall} {
		if rejected[reason] == 0 {
			t.Errorf("nothing was rejected with %s", reason)
		}
	}
	if admitted < 100 {
		t.Errorf("only %d calls were admitted", admitted)
	}
}
