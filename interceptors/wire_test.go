package interceptors_test

import (
	"context"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// wireStream is a stream that sends in gRPC's way: a status claims the headers
// before it is on the wire, and a message that comes in between finds them sent.
// Then, at the worst moment, it lets a message go ahead.
type wireStream struct {
	grpc.ServerStream
	ctx      context.Context
	inflight bool // the first message waits for the worst moment: it is being encoded

	worst chan struct{} // closed when a status has claimed the headers
	sent  chan struct{} // closed when the handler has sent its message

	end     sync.Once
	mu      sync.Mutex
	claimed bool
	frames  []string
}

func (s *wireStream) put(frame string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.frames = append(s.frames, frame)
}

// claim reports whether the headers have yet to be sent.
func (s *wireStream) claim() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	first := !s.claimed
	s.claimed = true
	return first
}

func (s *wireStream) Context() context.Context {
	return grpc.NewContextWithServerTransportStream(s.ctx, transportStream{stream: s})
}

func (s *wireStream) SendHeader(metadata.MD) error {
	if !s.claim() {
		return status.Error(codes.Internal, "the headers have been sent")
	}
	s.put("headers")
	return nil
}

func (s *wireStream) SendMsg(any) error {
	if s.inflight {
		<-s.worst
	}
	_ = s.SendHeader(nil)
	s.put("message")
	return nil
}

// transportStream is the stream as gRPC's own functions see it.
type transportStream struct {
	grpc.ServerTransportStream
	stream *wireStream
}

func (t transportStream) WriteStatus(*status.Status) error {
	s := t.stream
	s.end.Do(func() { // a drain ends it in each phase
		s.claim()
		close(s.worst)
		if s.inflight {
			<-s.sent
		}
		for i := 0; i < 10_000 && !isClosed(s.sent); i++ {
			runtime.Gosched() // long enough for a message that nothing holds back
		}
		s.put("status")
	})
	return nil
}

// cuttable returns the context of calls that a guard's Serve takes for its own, and
// what makes it drain.
func cuttable(t *testing.T, g *interceptors.Guard) (ctx context.Context, drain func()) {
	t.Helper()
	r := &running{guard: g, srv: grpc.NewServer(), lis: rpctest.Listen()}
	r.serve(t)
	r.silence(t) // or gRPC would be done before the cut: it has no call
	t.Cleanup(func() {
		<-r.served
	})
	return peer.NewContext(t.Context(), &peer.Peer{LocalAddr: r.lis.Addr()}), g.Drain
}

func TestAMessageDoesNotOvertakeItsHeaders(t *testing.T) {
	for name, c := range map[string]struct {
		method string
		policy string
		ended  codes.Code
	}{
		"stream that ends at its time":   {rpctest.Bidi, "rules: [{methods: ['*'], stream_timeout: 1s}]", codes.DeadlineExceeded},
		"health watch that a drain ends": {healthpb.Health_Watch_FullMethodName, "", codes.Unavailable},
		"stream that a drain cuts":       {rpctest.Bidi, "", codes.Unavailable},
	} {
		for _, inflight := range []bool{false, true} {
			t.Run(map[bool]string{false: "first message after it", true: "first message in flight"}[inflight]+"/"+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					g := mustGuard(t, "server: {drain: {announce: 0s, grace: 0s}, "+c.policy+"}", interceptors.WithSignals())
					ctx, drain := cuttable(t, g)
					s := &wireStream{ctx: ctx, inflight: inflight, worst: make(chan struct{}), sent: make(chan struct{})}
					early := !inflight && c.method == healthpb.Health_Watch_FullMethodName // later the drain would send the first message
					if early {
						drain()
						synctest.Wait()
					}
					go func() {
						_ = g.StreamServerInterceptor()(nil, s, &grpc.StreamServerInfo{FullMethod: c.method}, func(_ any, ss grpc.ServerStream) error {
							if !inflight {
								<-s.worst
							}
							err := ss.SendMsg(&healthpb.HealthCheckResponse{})
							close(s.sent)
							if !inflight && status.Code(err) != c.ended {
								t.Errorf("SendMsg after the end: %v, want %v", err, c.ended)
							}
							return nil
						})
					}()
					synctest.Wait()
					if !early && c.policy == "" {
						drain()
					}
					<-s.sent
					synctest.Wait()
					want := []string{"status"}
					if inflight {
						want = []string{"headers", "message", "status"}
					}
					if !slices.Equal(s.frames, want) {
						t.Errorf("on the wire: %v, want %v", s.frames, want)
					}
				})
			})
		}
	}
}

// heldStatus is the transport stream of a unary call; its status takes a while.
type heldStatus struct {
	grpc.ServerTransportStream
	began    chan struct{}
	released chan struct{}
}

func (h heldStatus) WriteStatus(*status.Status) error {
	close(h.began)
	<-h.released
	return nil
}

// gRPC sends the answer of a unary call when the interceptor has returned: not
// while the drain writes its status.
func TestAnAnswerWaitsForTheStatusOfTheCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, "server: {drain: {announce: 0s, grace: 0s}}", interceptors.WithSignals())
		ctx, drain := cuttable(t, g)
		held := heldStatus{began: make(chan struct{}), released: make(chan struct{})}
		returned := make(chan struct{})
		go func() {
			defer close(returned)
			_, _ = g.UnaryServerInterceptor()(grpc.NewContextWithServerTransportStream(ctx, held), nil, &grpc.UnaryServerInfo{FullMethod: rpctest.Unary},
				func(context.Context, any) (any, error) {
					<-held.began
					return nil, nil
				})
		}()
		drain()
		<-held.began
		for range 1000 {
			runtime.Gosched() // long enough for an interceptor that nothing holds back
		}
		if isClosed(returned) {
			t.Error("the interceptor has returned before the status was written")
		}
		close(held.released)
		<-returned
		checkIdle(t, g)
	})
}
