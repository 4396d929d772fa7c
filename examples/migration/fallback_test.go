//go:build fallback

package migration

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/afex/hystrix-go/hystrix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

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

func dashboardBefore(mux *http.ServeMux) {
	stream := hystrix.NewStreamHandler()
	stream.Start()
	mux.Handle("/hystrix.stream", stream)
}

func dashboardAfter(mux *http.ServeMux, guard *interceptors.Guard) {
	mux.Handle("/hystrix.stream", guard.HystrixStream())
}
