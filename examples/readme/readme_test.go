// Package readme holds the code of the README and of docs/, so that it compiles
// and runs, and checks that they show it as it stands here.
package readme

import (
	"context"
	"crypto/tls"
	"errors"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/reflect/protoreflect"

	shopv1 "github.com/grpc-resilience/grpc-resilience/examples/shop/v1"
	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/supervise"
	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
)

const root = "../.."

// TestGoBlocksCompile: each go block of the papers is in this file, line by line.
func TestGoBlocksCompile(t *testing.T) {
	source, err := os.ReadFile("readme_test.go")
	if err != nil {
		t.Fatal(err)
	}
	code := squeeze(string(source))
	for _, block := range blocks(t, "go") {
		if !strings.Contains(code, squeeze(block.text)) {
			t.Errorf("%s: this go block does not stand in examples/readme/readme_test.go:\n%s", block.file, block.text)
		}
	}
}

// TestYAMLBlocksLoad: each yaml block of the papers is a policy that loads.
func TestYAMLBlocksLoad(t *testing.T) {
	for _, block := range blocks(t, "yaml") {
		p, err := interceptors.Parse(block.file, []byte(block.text))
		if err != nil {
			t.Errorf("%v\n%s", err, block.text)
			continue
		}
		guard, err := interceptors.New(p)
		if err != nil {
			t.Error(err)
			continue
		}
		if err := guard.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestEveryKeyIsDocumented: docs/policy.md has a row for each field of the schema.
func TestEveryKeyIsDocumented(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join(root, "docs", "policy.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []protoreflect.Name{"MethodPolicy", "Breaker", "RateLimit", "ConcurrencyLimit", "Drain"} {
		fields := resiliencev1.File_resilience_v1_policy_proto.Messages().ByName(name).Fields()
		for i := range fields.Len() {
			if row := "| `" + string(fields.Get(i).Name()) + "` |"; !strings.Contains(string(doc), row) {
				t.Errorf("docs/policy.md has no row %q (%s)", row, name)
			}
		}
	}
}

type block struct{ file, text string }

var fence = regexp.MustCompile("(?ms)^```([a-z]*)\n(.*?)^```")

// blocks returns the fenced blocks of a language in README.md and docs.
func blocks(t *testing.T, language string) []block {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	var found []block
	for _, file := range append(files, filepath.Join(root, "README.md")) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range fence.FindAllStringSubmatch(string(text), -1) {
			if m[1] == language {
				found = append(found, block{filepath.Base(file), m[2]})
			}
		}
	}
	if len(found) == 0 {
		t.Fatalf("no %s block found", language)
	}
	return found
}

var space = regexp.MustCompile(`\s+`)

func squeeze(s string) string { return strings.TrimSpace(space.ReplaceAllString(s, " ")) }

// What follows is shown in the papers.

func dashboard(guard *interceptors.Guard) {
	http.Handle("/hystrix.stream", guard.HystrixStream())
}

func fourLines(ctx context.Context, target string, creds grpc.DialOption, listener net.Listener) error {
	guard, err := interceptors.Load("policy.yaml")                   // every mistake of the file, with line and column
	conn, err := grpc.NewClient(target, guard.DialOptions(creds)...) // the client side
	srv := grpc.NewServer(guard.ServerOptions()...)                  // the server side
	err = guard.Serve(ctx, srv, listener)                            // until SIGTERM: drains, then returns
	_ = conn
	return err
}

func headless(guard *interceptors.Guard, creds grpc.DialOption) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("dns:///shop:8080", guard.DialOptions(creds,
		grpc.WithDefaultServiceConfig(`{
			"loadBalancingConfig": [{"round_robin": {}}],
			"healthCheckConfig": {"serviceName": ""},
			"methodConfig": [{
				"name": [{"service": "shop.v1.Orders", "method": "Get"}, {"service": "shop.v1.Orders", "method": "Search"}],
				"retryPolicy": {
					"maxAttempts": 3, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2,
					"retryableStatusCodes": ["UNAVAILABLE"]
				}
			}]
		}`),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: time.Second, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 3 * time.Second},
			MinConnectTimeout: 20 * time.Second,
		}),
	)...)
	return conn, err
}

func TestHeadlessClientIsValid(t *testing.T) {
	guard, err := interceptors.Load("policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	defer guard.Close()
	conn, err := headless(guard, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err) // gRPC parses the service config
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
}

func place(ctx context.Context, client shopv1.OrdersClient, order *shopv1.PlaceRequest) {
	_, err := client.Place(ctx, order)
	var rejected *interceptors.RejectedError
	if errors.As(err, &rejected) {
		log.Printf("%s says no (%s), again in %v", rejected.Rule, rejected.Reason, rejected.RetryAfter)
	}
	if errors.Is(err, interceptors.ErrBreakerOpen) {
		// answer from a cache
	}
}

func fallbacks() (*interceptors.Guard, error) {
	guard, err := interceptors.Load("policy.yaml",
		// A reply made here. Returning an error fails the call with it; returning cause gives up.
		interceptors.WithFallback("/shop.v1.Orders/Search", func(ctx context.Context, method string, req, reply any, cause error) error {
			if !errors.Is(cause, interceptors.ErrBreakerOpen) {
				return cause
			}
			reply.(*shopv1.SearchResponse).Orders = nil // nothing found
			return nil
		}),
		// The last good reply to the same request, if it is not older than this. Everybody may see every order: the caller is not in the key.
		interceptors.LastGood("/shop.v1.Orders/Get", interceptors.LastGoodConfig{MaxAge: 5 * time.Minute, Key: interceptors.WholeRequest}),
	)
	return guard, err
}

func TestFallbacksAreCovered(t *testing.T) {
	guard, err := fallbacks()
	if err != nil {
		t.Fatal(err)
	}
	if err := guard.Close(); err != nil {
		t.Error(err)
	}
}

func watch(guard *interceptors.Guard, stream shopv1.Orders_WatchServer, updates <-chan *shopv1.WatchResponse) error {
	for {
		select {
		case update := <-updates:
			if err := stream.Send(update); err != nil {
				return err
			}
		case <-guard.Draining():
			return nil // the client reconnects, elsewhere
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

func reload(guard *interceptors.Guard) {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	for range hangup {
		text, err := os.ReadFile("policy.yaml")
		if err != nil {
			log.Print(err)
			continue
		}
		policy, err := interceptors.Parse("policy.yaml", text)
		if err == nil {
			err = guard.Reload(policy)
		}
		if err != nil {
			log.Printf("the policy stays as it was:\n%v", err) // every mistake, with line and column
		}
	}
}

func behindHTTP(ctx context.Context, guard *interceptors.Guard, listener net.Listener, config *tls.Config) error {
	srv := grpc.NewServer(guard.ServerOptions()...)
	web := &http.Server{Handler: srv, TLSConfig: config}
	terminated, stop := signal.NotifyContext(ctx, syscall.SIGTERM)
	defer stop()
	go web.ServeTLS(listener, "", "")
	<-terminated.Done()
	err := guard.ShutdownHTTP(ctx, web)
	return err
}

func chain(guard *interceptors.Guard, tracing stats.Handler, accessLog, authenticate grpc.UnaryServerInterceptor) *grpc.Server {
	srv := grpc.NewServer(append(
		[]grpc.ServerOption{
			grpc.StatsHandler(tracing),            // otelgrpc.NewServerHandler(): sees everything, wherever it stands
			grpc.ChainUnaryInterceptor(accessLog), // outside: logs rejections and recovered panics too
		},
		guard.ServerOptions(
			grpc.ChainUnaryInterceptor(authenticate), // inside: only for calls that were admitted
		)...,
	)...)
	return srv
}

func background(ctx context.Context, guard *interceptors.Guard, srv *grpc.Server, listener net.Listener, publish func(context.Context) error) error {
	workers, err := supervise.New(
		supervise.WithDraining(guard.Draining()),                // from grace on nothing is restarted
		supervise.WithEscalation(func(error) { guard.Drain() }), // a worker that was given up ends the process
	)
	if err != nil {
		return err
	}
	err = workers.Add(supervise.Worker{Name: "outbox", Run: publish}) // starts it; Kind: supervise.Permanent
	if err != nil {
		return err
	}
	err = guard.Serve(ctx, srv, listener)                       // the workers run on while it drains
	return errors.Join(err, workers.Stop(context.Background())) // the last added first, each within its StopTimeout
}

func beside(ctx context.Context, order *shopv1.PlaceRequest, mail func(context.Context, *shopv1.PlaceRequest)) {
	supervise.Go(context.WithoutCancel(ctx), func(ctx context.Context) { mail(ctx, order) })
}

// TestAWorkerDrainsItsServer: what the paper says of a worker that is given up.
func TestAWorkerDrainsItsServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		guard, err := interceptors.New(&resiliencev1.Policy{}, interceptors.WithSignals())
		if err != nil {
			t.Fatal(err)
		}
		runs := 0
		err = background(t.Context(), guard, grpc.NewServer(guard.ServerOptions()...), bufconn.Listen(1<<20), func(context.Context) error {
			runs++
			return errors.New("the broker is gone")
		})
		if err != nil || runs != 6 {
			t.Errorf("%d runs, Serve: %v", runs, err)
		}
	})
}

// failingShop fails every order.
type failingShop struct {
	shopv1.UnimplementedOrdersServer
}

func (failingShop) Place(context.Context, *shopv1.PlaceRequest) (*shopv1.PlaceResponse, error) {
	return nil, status.Error(codes.Unavailable, "the warehouse is on fire")
}

func TestBreakerOpens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		guard, err := interceptors.Load("policy.yaml")
		if err != nil {
			t.Fatal(err)
		}
		listener := bufconn.Listen(1 << 20)
		srv := grpc.NewServer(guard.ServerOptions()...)
		shopv1.RegisterOrdersServer(srv, failingShop{})
		go srv.Serve(listener)
		defer srv.Stop()

		conn, err := grpc.NewClient("passthrough:///shop", guard.DialOptions(
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
		)...)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		orders := shopv1.NewOrdersClient(conn)
		for range 20 {
			orders.Place(t.Context(), &shopv1.PlaceRequest{})
		}
		_, err = orders.Place(t.Context(), &shopv1.PlaceRequest{})
		if !errors.Is(err, interceptors.ErrBreakerOpen) {
			t.Errorf("got %v, want an open breaker", err)
		}
	})
}

var _, _, _, _, _, _ = fourLines, place, watch, reload, chain, beside // called by readers only
