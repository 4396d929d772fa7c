package interceptors_test

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

const (
	up      = healthpb.HealthCheckResponse_SERVING
	down    = healthpb.HealthCheckResponse_NOT_SERVING
	unknown = healthpb.HealthCheckResponse_SERVICE_UNKNOWN
)

// optimist is a health service of somebody's own: everything is always well, and
// its watchers are told so every second.
type optimist struct {
	healthpb.UnimplementedHealthServer
}

func (optimist) Check(context.Context, *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	return &healthpb.HealthCheckResponse{Status: up}, nil
}

func (optimist) List(context.Context, *healthpb.HealthListRequest) (*healthpb.HealthListResponse, error) {
	return &healthpb.HealthListResponse{Statuses: map[string]*healthpb.HealthCheckResponse{"": {Status: up}, "shop": {Status: up}}}, nil
}

func (optimist) Watch(_ *healthpb.HealthCheckRequest, ss grpc.ServerStreamingServer[healthpb.HealthCheckResponse]) error {
	for {
		if err := ss.Send(&healthpb.HealthCheckResponse{Status: up}); err != nil {
			return err
		}
		select {
		case <-time.After(time.Second):
		case <-ss.Context().Done():
			return ss.Context().Err()
		}
	}
}

// healths are the health services that a drain has to speak for. A code other
// than OK is what Check answers for a service that is not known.
var healths = map[string]struct {
	register    func(srv *grpc.Server)
	services    []string // that List knows
	unknown     codes.Code
	unknownWith healthpb.HealthCheckResponse_ServingStatus // what Watch tells of it
}{
	"registered before": {
		register: func(srv *grpc.Server) {
			h := health.NewServer()
			h.SetServingStatus("shop", up)
			healthpb.RegisterHealthServer(srv, h)
		},
		services: []string{"", "shop"}, unknown: codes.NotFound, unknownWith: unknown,
	},
	"registered by Serve": {
		register: func(*grpc.Server) {},
		services: []string{""}, unknown: codes.NotFound, unknownWith: unknown,
	},
	"of somebody's own": {
		register: func(srv *grpc.Server) { healthpb.RegisterHealthServer(srv, optimist{}) },
		services: []string{"", "shop"}, unknown: codes.OK, unknownWith: up,
	},
}

// serveHealth is serveDrain for an echoing server with more registered.
func serveHealth(t *testing.T, policy string, register func(srv *grpc.Server)) *running {
	t.Helper()
	g := mustGuard(t, policy, interceptors.WithSignals())
	r := &running{guard: g, srv: rpctest.NewServer(&rpctest.Service{}, g.ServerOptions()...), lis: rpctest.Listen()}
	register(r.srv)
	r.serve(t)
	return r
}

// eachHealth runs a test on a server with each of them.
func eachHealth(t *testing.T, f func(t *testing.T, name string, r *running, client healthpb.HealthClient)) {
	t.Helper()
	for name, h := range healths {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				// With gates, and in their way: health must not be matched by "*".
				r := serveHealth(t, "server: {drain: {announce: 5s, grace: 15s}, rules: [{methods: ['*'], minimum_budget: 1h, timeout: 1h, stream_timeout: 1s}]}", h.register)
				f(t, name, r, healthpb.NewHealthClient(r.conn))
			})
		})
	}
}

func TestHealthCheckAndListInEachPhase(t *testing.T) {
	eachHealth(t, func(t *testing.T, name string, r *running, client healthpb.HealthClient) {
		check := func(want healthpb.HealthCheckResponse_ServingStatus) {
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			for _, service := range healths[name].services {
				got, err := client.Check(ctx, &healthpb.HealthCheckRequest{Service: service})
				if err != nil || got.GetStatus() != want {
					t.Errorf("%s: Check of %q: %v, %v; want %v", phaseOf(r.guard), service, got, err, want)
				}
			}
			got, err := client.Check(ctx, &healthpb.HealthCheckRequest{Service: "nobody"})
			if status.Code(err) != healths[name].unknown || err == nil && got.GetStatus() != want {
				t.Errorf("%s: Check of an unknown service: %v, %v", phaseOf(r.guard), got, err)
			}
			all, err := client.List(ctx, &healthpb.HealthListRequest{})
			if err != nil || len(all.GetStatuses()) != len(healths[name].services) {
				t.Errorf("%s: List: %v, %v", phaseOf(r.guard), all, err)
			}
			for _, service := range healths[name].services {
				if got := all.GetStatuses()[service].GetStatus(); got != want {
					t.Errorf("%s: List has %v for %q, want %v", phaseOf(r.guard), got, service, want)
				}
			}
		}
		check(up)
		r.stop()
		synctest.Wait()
		check(down) // announce
		time.Sleep(4 * time.Second)
		r.silence(t)
		time.Sleep(2 * time.Second)
		check(down) // grace
		r.end(t, 3*time.Second)
	})
}

// statusesOf is what a Watch receives until it ends, with SERVING in a row once,
// and how it ended.
func statusesOf(w grpc.ServerStreamingClient[healthpb.HealthCheckResponse]) (got []healthpb.HealthCheckResponse_ServingStatus, end error) {
	for {
		m, err := w.Recv()
		if err != nil {
			return got, err
		}
		if n := len(got); n == 0 || m.GetStatus() != up || got[n-1] != up {
			got = append(got, m.GetStatus())
		}
	}
}

func TestCase32_HealthWatch(t *testing.T) {
	eachHealth(t, func(t *testing.T, name string, r *running, client healthpb.HealthClient) {
		began := time.Now()
		watch := func(service string, want ...healthpb.HealthCheckResponse_ServingStatus) <-chan struct{} {
			t.Helper()
			opened := time.Since(began)
			done := make(chan struct{})
			w, err := client.Watch(t.Context(), &healthpb.HealthCheckRequest{Service: service})
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				defer close(done)
				got, err := statusesOf(w)
				if opened > 15*time.Second && len(got) == 0 {
					got = want // it may have been ended before it was told
				}
				if !slices.Equal(got, want) {
					t.Errorf("Watch of %q opened after %v received %v, want %v", service, opened, got, want)
				}
				if after := time.Since(began); status.Code(err) != codes.Unavailable || after != max(15*time.Second, opened) {
					t.Errorf("Watch of %q opened after %v ended after %v with %v", service, opened, after, err)
				}
			}()
			return done
		}
		watches := []<-chan struct{}{
			watch("", up, down),
			watch("nobody", healths[name].unknownWith, down),
		}
		time.Sleep(10 * time.Second)
		r.stop()
		time.Sleep(4 * time.Second)
		watches = append(watches, watch("", down), watch("nobody", down))
		r.silence(t)
		time.Sleep(2 * time.Second)
		watches = append(watches, watch("", down))
		r.end(t, 3*time.Second)
		for _, w := range watches {
			<-w
		}
	})
}

// A watcher that does not read must not keep the drain from another one. Its
// connection is closed by the cut, which finds no handler.
func TestCase32_HealthWatchThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := serveHealth(t, drainPolicy, func(srv *grpc.Server) { healthpb.RegisterHealthServer(srv, flood{}) })
		full := rpctest.Dial(t, r.lis, grpc.WithStaticStreamWindowSize(1<<16), grpc.WithStaticConnWindowSize(1<<16))
		for range 2 {
			if _, err := healthpb.NewHealthClient(full).Watch(t.Context(), &healthpb.HealthCheckRequest{Service: "flood"}); err != nil {
				t.Fatal(err)
			}
		}
		reads, err := healthpb.NewHealthClient(r.conn).Watch(t.Context(), &healthpb.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		r.stop()
		for _, want := range []healthpb.HealthCheckResponse_ServingStatus{up, down} {
			if m, err := reads.Recv(); err != nil || m.GetStatus() != want {
				t.Errorf("the watcher that reads received %v, %v, want %v", m, err, want)
			}
		}
		r.end(t, 20*time.Second)
	})
}

// brief is a health service whose Watch ends by itself, a second after it began,
// while a goroutine that it left behind still sends.
type brief struct {
	healthpb.UnimplementedHealthServer
}

func (brief) Watch(_ *healthpb.HealthCheckRequest, ss grpc.ServerStreamingServer[healthpb.HealthCheckResponse]) error {
	go func() {
		for ss.Send(&healthpb.HealthCheckResponse{Status: up}) == nil {
			time.Sleep(time.Second)
		}
	}()
	time.Sleep(time.Second)
	return nil
}

// A Watch ends at the same time as the drain begins: nothing hangs, and nothing
// of it is left.
func TestCase32_HealthWatchThatEndsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := serveHealth(t, drainPolicy, func(srv *grpc.Server) { healthpb.RegisterHealthServer(srv, brief{}) })
		for range 50 {
			w, err := healthpb.NewHealthClient(r.conn).Watch(t.Context(), &healthpb.HealthCheckRequest{})
			if err != nil {
				t.Fatal(err)
			}
			go func() { _, _ = statusesOf(w) }()
		}
		synctest.Wait()
		time.Sleep(time.Second)
		r.stop()
		r.end(t, 5*time.Second)
	})
}

// idleWatch is a health service that tells its watchers nothing.
type idleWatch struct {
	healthpb.UnimplementedHealthServer
}

func (idleWatch) Watch(_ *healthpb.HealthCheckRequest, ss grpc.ServerStreamingServer[healthpb.HealthCheckResponse]) error {
	<-ss.Context().Done()
	return ss.Context().Err()
}

// mutedStream panics when something is sent.
type mutedStream struct{ grpc.ServerStream }

func (mutedStream) SendMsg(any) error { panic("boom") }

// The drain tells a watcher on a goroutine of its own, where nobody recovers.
func TestCase32_HealthWatchWhoseStreamPanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, drainPolicy, interceptors.WithSignals())
		outer := grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
			return handler(srv, mutedStream{ss})
		})
		r := &running{guard: g, srv: rpctest.NewServer(&rpctest.Service{}, append([]grpc.ServerOption{outer}, g.ServerOptions()...)...), lis: rpctest.Listen()}
		healthpb.RegisterHealthServer(r.srv, idleWatch{})
		r.serve(t)
		w, err := healthpb.NewHealthClient(r.conn).Watch(t.Context(), &healthpb.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		r.stop()
		r.end(t, 5*time.Second)
		if _, err := w.Recv(); status.Code(err) != codes.Unavailable {
			t.Errorf("the watcher has %v", err)
		}
	})
}

// slowStream is a stream whose SendMsg takes a second.
type slowStream struct {
	handStream
	sending, sent int
}

func (s *slowStream) SendHeader(metadata.MD) error { return nil }

func (s *slowStream) SendMsg(any) error {
	s.sending++
	time.Sleep(time.Second)
	s.sent++
	return nil
}

// gRPC forbids the use of a stream whose handler has returned.
func TestCase32_DrainTellsNoWatcherThatHasEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, drainPolicy)
		ss := &slowStream{handStream: handStream{ctx: t.Context()}}
		err := g.StreamServerInterceptor()(nil, ss, &grpc.StreamServerInfo{FullMethod: healthpb.Health_Watch_FullMethodName},
			func(any, grpc.ServerStream) error {
				go func() { _ = g.Shutdown(t.Context(), grpc.NewServer()) }()
				synctest.Wait() // it tells the watcher
				return nil
			})
		if err != nil || ss.sending != 1 || ss.sent != 1 {
			t.Errorf("%v; when the stream was given back, %d messages had been begun and %d sent, want 1", err, ss.sending, ss.sent)
		}
		time.Sleep(time.Minute)
		if ss.sending != 1 {
			t.Errorf("%d messages, want none that is later", ss.sending)
		}
	})
}

// Only health is answered for: another service may have these messages too, to
// tell of the health of others.
func TestCase32_OnlyHealthIsAnsweredFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, drainPolicy)
		if err := g.Shutdown(t.Context(), grpc.NewServer()); err != nil {
			t.Fatal(err)
		}
		for method, want := range map[string]healthpb.HealthCheckResponse_ServingStatus{
			healthpb.Health_Check_FullMethodName: down,
			"/fleet.v1.Fleet/Check":              up,
		} {
			got, err := g.UnaryServerInterceptor()(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: method},
				func(context.Context, any) (any, error) { return &healthpb.HealthCheckResponse{Status: up}, nil })
			if err != nil || got.(*healthpb.HealthCheckResponse).GetStatus() != want {
				t.Errorf("%s: %v, %v, want %v", method, got, err, want)
			}
		}
	})
}

// flood tells the watchers of one service more than they can take unread.
type flood struct {
	healthpb.UnimplementedHealthServer
}

func (flood) Watch(req *healthpb.HealthCheckRequest, ss grpc.ServerStreamingServer[healthpb.HealthCheckResponse]) error {
	n := 1
	if req.GetService() == "flood" {
		n = 20_000
	}
	for range n {
		if err := ss.Send(&healthpb.HealthCheckResponse{Status: up}); err != nil {
			return err
		}
	}
	<-ss.Context().Done()
	return ss.Context().Err()
}
