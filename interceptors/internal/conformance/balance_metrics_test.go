package conformance

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// Two channels know the same endpoints: what they know is added up, and no more than
// 200 endpoints are shown.
func TestEndpointMetrics(t *testing.T) {
	s, provider := newScraper(t)
	g := mustGuard(t, "client: {load_balancing: {breaker: {consecutive_failures: 1}, rate_limit_per_endpoint: {requests_per_second: 0.001, burst: 1}}}", provider)
	listeners := map[string]interface {
		DialContext(context.Context) (net.Conn, error)
	}{}
	for name, code := range map[string]codes.Code{"e000": codes.Unavailable, "e001": codes.OK} {
		srv, lis := rpctest.NewServer(&rpctest.Service{Unary: func(_ context.Context, req *rpctest.Message) (*rpctest.Message, error) {
			return req, status.Error(code, "")
		}}), rpctest.Listen()
		served := make(chan error, 1)
		go func() { served <- srv.Serve(lis) }()
		defer func() {
			srv.Stop()
			<-served
		}()
		listeners[name] = lis
	}
	var conns []*grpc.ClientConn
	var resolvers []*manual.Resolver
	for range 2 {
		r := manual.NewBuilderWithScheme("fleet")
		r.InitialState(resolver.State{Endpoints: endpoints("e000", "e001")})
		conn, err := grpc.NewClient("fleet:///shop", g.DialOptions(grpc.WithResolvers(r), grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
				if lis := listeners[address]; lis != nil {
					return lis.DialContext(ctx)
				}
				return nil, fmt.Errorf("nobody at %s", address)
			}))...)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.Connect()
		conns, resolvers = append(conns, conn), append(resolvers, r)
	}
	of := func(address string, more ...string) string {
		return labels(append(more, "resilience_endpoint", address, "resilience_target", "fleet:///shop", "rpc_system_name", "grpc"))
	}
	for deadline := time.Now().Add(30 * time.Second); s.scrape()["resilience_endpoint_state"+of("e000", "state", "ready")] < 2 ||
		s.last["resilience_endpoint_state"+of("e001", "state", "ready")] < 2; {
		if time.Now().After(deadline) {
			t.Fatal("not connected")
		}
		time.Sleep(time.Millisecond)
	}
	for _, conn := range conns {
		for range 3 {
			_, _ = rpctest.Call(t.Context(), conn, rpctest.Unary, "x")
		}
	}
	got := s.scrape()
	for name, want := range map[string]float64{
		"resilience_endpoint_state" + of("e000", "state", "ejected"):                                                            2,
		"resilience_endpoint_state" + of("e000", "state", "ready"):                                                              0,
		"resilience_endpoint_state" + of("e001", "state", "ready"):                                                              2,
		"resilience_endpoint_ejections_total" + of("e000", "cause", "consecutive_failures"):                                     2,
		"resilience_endpoint_inflight" + of("e001"):                                                                             0,
		"resilience_endpoint_weight_ratio" + of("e001"):                                                                         1,
		"resilience_endpoint_weight_ratio" + of("e000"):                                                                         0,
		"resilience_endpoint_limited_total" + labels([]string{"resilience_target", "fleet:///shop", "rpc_system_name", "grpc"}): 2,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s: %v (there: %v), want %v", name, v, ok, want)
		}
	}
	if v := got["resilience_endpoint_latency_seconds"+of("e001")]; v <= 0 {
		t.Errorf("latency %v", v)
	}
	names := []string{"e000", "e001"}
	for i := range 300 {
		names = append(names, fmt.Sprintf("f%03d", i))
	}
	resolvers[0].UpdateState(resolver.State{Endpoints: endpoints(names...)})
	shown := 0
	for name := range s.scrape() {
		if strings.HasPrefix(name, "resilience_endpoint_inflight{") {
			shown++
		}
	}
	if shown != 200 {
		t.Errorf("%d endpoints are shown", shown)
	}
}

func endpoints(names ...string) (all []resolver.Endpoint) {
	for _, name := range names {
		all = append(all, resolver.Endpoint{Addresses: []resolver.Address{{Addr: name}}})
	}
	return all
}
