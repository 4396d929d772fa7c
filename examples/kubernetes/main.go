// Command kubernetes is a small guarded server as it runs in a pod, with the
// manifests for it in shop.yaml. docs/operations.md says what each number in
// them is for; the tests here measure that, and check that the numbers fit.
//
//	go run . -listen 127.0.0.1:8080 -policy policy.yaml
package main

import (
	"context"
	"flag"
	"log"
	"net"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	shopv1 "github.com/grpc-resilience/grpc-resilience/examples/shop/v1"
	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

func main() {
	listen := flag.String("listen", ":8080", "`address` to serve on")
	policy := flag.String("policy", "/etc/shop/policy.yaml", "`file` with the policy")
	age := flag.Duration("max-connection-age", 0, "ask clients to reconnect after about this time, so that they spread over the pods (0: never)")
	flag.Parse()
	pod, err := os.Hostname() // in a pod, its name
	if err != nil {
		log.Fatal(err)
	}
	guard, err := interceptors.Load(*policy)
	if err != nil {
		log.Fatal(err)
	}
	if err := serve(guard, *listen, *age, &shop{pod: pod}); err != nil {
		log.Fatal(err) // the calls that the drain cut, among others
	}
}

// serve serves orders until SIGTERM, and through the drain.
func serve(guard *interceptors.Guard, listen string, age time.Duration, orders shopv1.OrdersServer) error {
	defer guard.Close()
	lis, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	log.Print("listening on ", lis.Addr())
	srv := grpc.NewServer(guard.ServerOptions(grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: age}))...)
	shopv1.RegisterOrdersServer(srv, orders)
	// Registers the health service that the readiness probe asks.
	return guard.Serve(context.Background(), srv, lis)
}

// shop knows every order, and who served it.
type shop struct {
	shopv1.UnimplementedOrdersServer
	pod string
}

// Get returns one order.
func (s *shop) Get(_ context.Context, req *shopv1.GetRequest) (*shopv1.GetResponse, error) {
	return &shopv1.GetResponse{Order: &shopv1.Order{Id: req.GetOrderId(), Customer: "served by " + s.pod}}, nil
}
