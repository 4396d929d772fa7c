package interceptors_test

import (
	"context"
	"math/rand/v2"
	"net"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// one is a server that a guard serves, and when and how that ended.
type one struct {
	srv  *grpc.Server
	lis  [2]*faulty
	stop func()
	took chan time.Time
	err  error
}

// Whatever comes in whatever order, to two servers of one guard: both end in time,
// their ports are closed, and nothing is left.
func TestServeEndsInTimeWhateverComes(t *testing.T) {
	for seed := range uint64(40) {
		synctest.Test(t, func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 0))
			g := mustGuard(t, "server: {drain: {announce: 2s, grace: 3s, cut: 1s}, rules: [{methods: ['*'], concurrency_limit: {max_in_flight: 9, max_streams: 9}}]}", interceptors.WithSignals())
			ended := make(chan struct{})
			var servers [2]*one
			service := bothKinds(func(ctx context.Context, text string) error {
				switch text {
				case "deaf":
					<-ended
				case "stuck":
					<-ctx.Done()
				case "panics":
					panic("asked to")
				case "drains":
					g.Drain()
				case "shuts down":
					return g.Shutdown(ctx, servers[0].srv)
				}
				return ctx.Err()
			})
			var did []string
			var drains time.Time // a drain has begun, at the latest
			for i := range servers {
				s := &one{srv: rpctest.NewServer(service, g.ServerOptions()...), took: make(chan time.Time, 1)}
				var lis []net.Listener
				for j := range s.lis {
					s.lis[j] = faultyListener()
					lis = append(lis, s.lis[j])
				}
				ctx, cancel := context.WithCancel(t.Context())
				s.stop = cancel
				servers[i] = s
				go func() {
					s.err = g.Serve(ctx, s.srv, lis...)
					s.took <- time.Now()
				}()
			}
			synctest.Wait()
			calls := make(chan error, 100)
			for range 3 + random.IntN(12) {
				s := servers[random.IntN(2)]
				l := s.lis[random.IntN(2)]
				fault := func(err error) {
					select {
					case l.fault <- func() error { return err }:
					case <-time.After(time.Millisecond): // nobody accepts
					}
				}
				ops := []struct {
					name string
					do   func()
				}{
					{"fault", func() { fault(errAccept) }},
					{"temporary", func() { fault(syscall.EMFILE) }},
					{"close", func() { _ = l.Close() }},
					{"stop", s.stop},
					{"drain", g.Drain},
					{"srv.Stop", func() { go s.srv.Stop() }},
					{"srv.GracefulStop", func() { go s.srv.GracefulStop() }},
					{"snapshot", func() { g.Snapshot() }},
				}
				for _, text := range []string{"ends", "deaf", "stuck", "panics", "drains", "shuts down"} {
					for range 2 {
						ops = append(ops, struct {
							name string
							do   func()
						}{text, func() {
							conn := rpctest.Dial(t, l.Listener)
							a := arms[2+random.IntN(2)]
							go func() { calls <- a.call(t.Context(), conn, text) }()
						}})
					}
				}
				op := ops[random.IntN(len(ops))]
				did = append(did, op.name)
				op.do()
				if random.IntN(3) > 0 {
					time.Sleep(time.Duration(random.IntN(1500)) * time.Millisecond)
				}
				synctest.Wait()
				if drains.IsZero() && phaseOf(g) != "serving" {
					drains = time.Now()
				}
			}
			if drains.IsZero() {
				g.Drain()
				drains = time.Now()
			}
			for i, s := range servers {
				if late := (<-s.took).Sub(drains); late > 6*time.Second {
					t.Errorf("seed %d: server %d has ended after %v", seed, i, late)
				}
				for _, l := range s.lis {
					wantPortClosed(t, l.Listener)
				}
			}
			close(ended)
			time.Sleep(time.Minute)
			checkIdle(t, g)
			if t.Failed() {
				t.Logf("seed %d: %q: %v, %v", seed, did, servers[0].err, servers[1].err)
			}
		})
	}
}
