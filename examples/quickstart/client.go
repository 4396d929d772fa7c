package main

import (
	"context"
	"errors"
	"io"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	shopv1 "github.com/grpc-resilience/grpc-resilience/examples/shop/v1"
	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// client is a customer of the shop.
type client struct {
	conn    *grpc.ClientConn
	orders  shopv1.OrdersClient
	catalog shopv1.CatalogClient
	health  healthpb.HealthClient
}

// dial makes a guarded client: the guard's options go in front of your own.
func dial(guard *interceptors.Guard, addr string, extra ...grpc.DialOption) (*client, error) {
	extra = append(extra, grpc.WithTransportCredentials(insecure.NewCredentials()))
	conn, err := grpc.NewClient(addr, guard.DialOptions(extra...)...)
	if err != nil {
		return nil, err
	}
	return &client{
		conn:    conn,
		orders:  shopv1.NewOrdersClient(conn),
		catalog: shopv1.NewCatalogClient(conn),
		health:  healthpb.NewHealthClient(conn),
	}, nil
}

// retrying switches gRPC's built-in retry on. Its own backoff is so short that
// five attempts are over long before a rate limit lets one through: only a client
// that obeys the server's pushback gets there.
var retrying = grpc.WithDefaultServiceConfig(`{"methodConfig": [{
	"name": [{"service": "shop.v1.Catalog"}],
	"retryPolicy": {
		"maxAttempts": 5,
		"initialBackoff": "0.001s", "maxBackoff": "0.001s", "backoffMultiplier": 1,
		"retryableStatusCodes": ["RESOURCE_EXHAUSTED"]
	}
}]}`)

// The methods of the shop by their short and full names.
const (
	place  = shopv1.Orders_Place_FullMethodName
	get    = shopv1.Orders_Get_FullMethodName
	search = shopv1.Orders_Search_FullMethodName
	watch  = shopv1.Orders_Watch_FullMethodName
	chat   = shopv1.Orders_Chat_FullMethodName
	bulk   = shopv1.Orders_Import_FullMethodName
	list   = shopv1.Catalog_List_FullMethodName
)

// methods lists them all.
var methods = []string{place, get, search, watch, chat, bulk, list}

// call makes one call of a method from its beginning to its end.
func (c *client) call(ctx context.Context, method string) (err error) {
	switch method {
	case place:
		_, err = c.place(ctx)
	case get:
		err = c.get(ctx, delivered)
	case search:
		_, err = c.orders.Search(ctx, &shopv1.SearchRequest{Text: "ada", Limit: 1})
	case watch:
		err = c.watch(ctx, delivered)
	case chat:
		err = c.chat(ctx, delivered)
	case bulk:
		err = c.bulk(ctx)
	case list:
		_, err = c.catalog.List(ctx, &shopv1.ListRequest{})
	}
	return err
}

// round makes one call of each method, all at the same time.
func (c *client) round(ctx context.Context, methods []string) []error {
	errs := make(chan error, len(methods))
	for _, m := range methods {
		go func() { errs <- c.call(ctx, m) }()
	}
	return gather(len(methods), errs)
}

func (c *client) place(ctx context.Context) (order string, err error) {
	resp, err := c.orders.Place(ctx, &shopv1.PlaceRequest{Customer: "grace", Items: []*shopv1.Item{{Sku: "tea", Quantity: 2}}})
	return resp.GetOrder().GetId(), err
}

func (c *client) get(ctx context.Context, order string) error {
	_, err := c.orders.Get(ctx, &shopv1.GetRequest{OrderId: order})
	return err
}

func (c *client) watch(ctx context.Context, order string) error {
	stream, err := c.orders.Watch(ctx, &shopv1.WatchRequest{OrderId: order})
	if err != nil {
		return err
	}
	_, err = lastWords(stream.Recv)
	return err
}

func (c *client) chat(ctx context.Context, order string) error {
	stream, err := c.orders.Chat(ctx)
	if err != nil {
		return err
	}
	if err := ask(stream, order); err != nil {
		return err
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	_, err = lastWords(stream.Recv)
	return err
}

func (c *client) bulk(ctx context.Context) error {
	stream, err := c.orders.Import(ctx)
	if err != nil {
		return err
	}
	for range 3 {
		if err := stream.Send(&shopv1.ImportRequest{Customer: "linus"}); err != nil {
			break // the reason comes from CloseAndRecv
		}
	}
	_, err = stream.CloseAndRecv()
	return err
}

// ask sends a message and waits for the answer.
func ask(stream grpc.BidiStreamingClient[shopv1.ChatRequest, shopv1.ChatResponse], order string) error {
	if err := stream.Send(&shopv1.ChatRequest{OrderId: order, Text: "where is it?"}); err != nil && !errors.Is(err, io.EOF) {
		return err // after io.EOF the reason comes from Recv
	}
	_, err := stream.Recv()
	return err
}

// lastWords receives until the stream ends and returns the last message; the
// error is nil if the stream ended with OK.
func lastWords[M any](recv func() (M, error)) (last M, err error) {
	for {
		m, err := recv()
		if errors.Is(err, io.EOF) {
			return last, nil
		}
		if err != nil {
			return last, err
		}
		last = m
	}
}

// refusal reads the details that every rejection carries: who refused a call,
// why, and when to come back.
func refusal(err error) (reason interceptors.Reason, retry time.Duration) {
	for _, detail := range status.Convert(err).Details() {
		switch d := detail.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() == interceptors.Domain {
				reason = interceptors.Reason(d.GetReason())
			}
		case *errdetails.RetryInfo:
			retry = d.GetRetryDelay().AsDuration()
		}
	}
	return reason, retry
}
