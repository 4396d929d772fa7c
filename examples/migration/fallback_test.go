package migration

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/afex/hystrix-go/hystrix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	shopv1 "github.com/grpc-resilience/grpc-resilience/examples/shop/v1"
	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// What docs/migration/from-hystrix-go.md shows of fallbacks and dashboards.

func dialWithGuard(target string, creds grpc.DialOption) (*interceptors.Guard, *grpc.ClientConn, error) {
	guard, err := interceptors.Load("policy.yaml", interceptors.WithFallback("/shop.v1.Orders/Place", placeLater))
	if err != nil {
		return nil, nil, err
	}
	conn, err := grpc.NewClient(target, guard.DialOptions(creds)...)
	return guard, conn, err
}

func placeLater(_ context.Context, _ string, req, reply any, cause error) error {
	reply.(*shopv1.PlaceResponse).Order = later(req.(*shopv1.PlaceRequest))
	return nil
}

func dashboardBefore(mux *http.ServeMux) (stop func()) {
	stream := hystrix.NewStreamHandler()
	stream.Start()
	mux.Handle("/hystrix.stream", stream)
	return stream.Stop
}

func dashboardAfter(mux *http.ServeMux, guard *interceptors.Guard) (stop func()) {
	mux.Handle("/hystrix.stream", guard.HystrixStream())
	return func() {}
}

// The checks.

// TestConvert: the page's command makes the page's policy of the page's settings.
func TestConvert(t *testing.T) {
	command := squeeze(strings.ReplaceAll(blocks(t, hystrixPage, "sh")[0], "\\\n", " "))
	command, output, ok := strings.Cut(command, " > ")
	args := strings.Fields(command)
	if !ok || output != "policy.yaml" || args[0] != "go" {
		t.Fatalf("not the command that is checked: %s", command)
	}
	settings := filepath.Join(t.TempDir(), "hystrix.json")
	if err := os.WriteFile(settings, []byte(blocks(t, hystrixPage, "json")[0]), 0o600); err != nil {
		t.Fatal(err)
	}
	if last := len(args) - 1; args[last] == filepath.Base(settings) {
		args[last] = settings
	}
	var errs bytes.Buffer
	run := exec.CommandContext(t.Context(), args[0], args[1:]...)
	run.Stderr = &errs
	made, err := run.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, &errs)
	}
	got, err := interceptors.Parse("made", made)
	if err != nil {
		t.Fatal(err)
	}
	shown, err := interceptors.Parse(hystrixPage, []byte(blocks(t, hystrixPage, "yaml")[0]))
	if err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(got, shown) {
		t.Errorf("the command makes another policy:\n%s", made)
	}
}

func TestFallbackPage(t *testing.T) {
	order := &shopv1.PlaceRequest{Customer: "ada"}
	check := func(t *testing.T, place func(context.Context) (*shopv1.PlaceResponse, error)) {
		resp, err := place(t.Context())
		want(t, "the call", err, nil)
		want(t, "its answer", resp.GetOrder().GetId(), "later")
		want(t, "its customer", resp.GetOrder().GetCustomer(), "ada")
	}
	t.Run("before", func(t *testing.T) {
		t.Cleanup(hystrix.Flush)
		orders := open(t, &shop{place: fail}, nil)
		check(t, func(ctx context.Context) (*shopv1.PlaceResponse, error) { return placeWithHystrix(ctx, orders, order) })
	})
	for i, engine := range []string{"engine hystrix", "engine window"} {
		t.Run(engine, func(t *testing.T) {
			inFolder(t, blocks(t, hystrixPage, "yaml")[i])
			guard, conn, err := dialWithGuard(listen(t, &shop{place: fail}), insecureCreds)
			if err != nil {
				t.Fatal(err)
			}
			orders := shopv1.NewOrdersClient(conn)
			check(t, func(ctx context.Context) (*shopv1.PlaceResponse, error) { return orders.Place(ctx, order) })
			if err := errors.Join(conn.Close(), guard.Close()); err != nil {
				t.Error(err)
			}
		})
	}
}

// hystrix-go asks a fallback for every error, ours for failures; and what it
// returns is what the caller gets.
func TestFallbackIsNotAskedForMissing(t *testing.T) {
	asked, errAnswer := 0, errors.New("no answer")
	answer := func() error { asked++; return errAnswer }
	name := command(t, hystrix.CommandConfig{})
	err := hystrix.DoC(t.Context(), name, missing, func(context.Context, error) error { return answer() })
	want(t, "hystrix-go has asked", asked, 1)
	want(t, "its error is the fallback's", errors.Is(err, errAnswer), false)

	asked = 0
	g := mustGuard(t, `client: {rules: [{methods: ["*"], breaker: {}}]}`,
		interceptors.WithFallback("*", func(context.Context, string, any, any, error) error { return answer() }))
	i := g.UnaryClientInterceptor()
	want(t, "NOT_FOUND", through(t.Context(), i, placeMethod, missing), errMissing)
	want(t, "the guard has asked for NOT_FOUND", asked, 0)
	want(t, "a failure", through(t.Context(), i, placeMethod, fail), errAnswer)
	want(t, "the guard has asked for a failure", asked, 1)

	ctx, cancel := context.WithCancel(t.Context())
	err = through(ctx, i, placeMethod, func(ctx context.Context) error {
		cancel()
		return status.FromContextError(ctx.Err()).Err()
	})
	want(t, "a cancelled call", status.Code(err), codes.Canceled)
	want(t, "the guard has asked for a cancelled call", asked, 1)
}

// Each stream has an event of the method, under a name of its own.
func TestDashboardPage(t *testing.T) {
	g := mustGuard(t, blocks(t, hystrixPage, "yaml")[0])
	conn := openConn(t, new(shop), nil, g.DialOptions()...)
	want(t, "a call", placed(t.Context(), shopv1.NewOrdersClient(conn)), nil)
	target := conn.CanonicalTarget()
	for way, c := range map[string]struct {
		mount func(*http.ServeMux) (stop func())
		name  string
	}{
		"before": {dashboardBefore, g.HystrixName(interceptors.Client, target, placeMethod)},
		"after":  {func(mux *http.ServeMux) func() { return dashboardAfter(mux, g) }, target + " shop.v1.Orders/Place"},
	} {
		t.Run(way, func(t *testing.T) {
			mux := http.NewServeMux()
			stop := c.mount(mux)
			defer func() {
				stop() // or hystrix-go's would race with that of a second run
				eventually(t, "the stream stops", func() bool { return len(goroutines("hystrix.(*StreamHandler).loop")) == 0 })
			}()
			srv := httptest.NewServer(mux)
			defer srv.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, srv.URL+"/hystrix.stream", nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := srv.Client().Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			var seen []byte
			for buf := make([]byte, 4096); !bytes.Contains(seen, []byte(`"name":"`+c.name+`"`)); {
				n, err := resp.Body.Read(buf)
				seen = append(seen, buf[:n]...)
				if err != nil || len(seen) > 1<<17 {
					t.Fatalf("%v, and no %s in\n%.3000s", err, c.name, seen)
				}
			}
		})
	}
}
