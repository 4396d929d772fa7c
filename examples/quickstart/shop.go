package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	shopv1 "github.com/grpc-resilience/grpc-resilience/examples/shop/v1"
)

// shop is the service: plain business code that knows nothing of guards, but
// for the channel that tells its long streams when to go home.
type shop struct {
	shopv1.UnimplementedOrdersServer
	shopv1.UnimplementedCatalogServer

	warehouse, index *backend // Place needs the one, Search the other
	closing          <-chan struct{}

	mu     sync.Mutex
	orders []*shopv1.Order // guarded by mu; an order never changes
}

// The shop has one order that has been delivered. One number crashes whatever
// handles it, with a panic that says more than a client should read.
const (
	delivered = "order-1"
	cursed    = "order-666"
	secret    = "shard-7.db.internal"
)

func newShop(closing <-chan struct{}) *shop {
	return &shop{
		warehouse: newBackend("warehouse"),
		index:     newBackend("index"),
		closing:   closing,
		orders:    []*shopv1.Order{{Id: delivered, Customer: "ada", Status: shopv1.OrderStatus_ORDER_STATUS_DELIVERED}},
	}
}

// Place takes an order for which the warehouse has the goods.
func (s *shop) Place(ctx context.Context, req *shopv1.PlaceRequest) (*shopv1.PlaceResponse, error) {
	if err := s.warehouse.ask(ctx); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	order := &shopv1.Order{
		Id:       fmt.Sprintf("order-%d", len(s.orders)+1000),
		Customer: req.GetCustomer(),
		Items:    req.GetItems(),
		Status:   shopv1.OrderStatus_ORDER_STATUS_PLACED,
		PlacedAt: timestamppb.Now(),
	}
	s.orders = append(s.orders, order)
	return &shopv1.PlaceResponse{Order: order}, nil
}

// Get returns one order.
func (s *shop) Get(_ context.Context, req *shopv1.GetRequest) (*shopv1.GetResponse, error) {
	order, err := s.find(req.GetOrderId())
	if err != nil {
		return nil, err
	}
	return &shopv1.GetResponse{Order: order}, nil
}

// Search returns the orders of customers whose name contains the text.
func (s *shop) Search(ctx context.Context, req *shopv1.SearchRequest) (*shopv1.SearchResponse, error) {
	if err := s.index.ask(ctx); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	resp := &shopv1.SearchResponse{}
	for _, order := range s.orders {
		full := req.GetLimit() > 0 && len(resp.Orders) == int(req.GetLimit())
		if !full && strings.Contains(order.GetCustomer(), req.GetText()) {
			resp.Orders = append(resp.Orders, order)
		}
	}
	return resp, nil
}

// Watch sends the order and waits for news of it, unless it has been delivered.
// This shop never ships what it takes, so only its closing ends the wait.
func (s *shop) Watch(req *shopv1.WatchRequest, stream grpc.ServerStreamingServer[shopv1.WatchResponse]) error {
	order, err := s.find(req.GetOrderId())
	if err != nil {
		return err
	}
	if err := stream.Send(&shopv1.WatchResponse{Order: order}); err != nil {
		return err
	}
	if order.GetStatus() == shopv1.OrderStatus_ORDER_STATUS_DELIVERED {
		return nil
	}
	select {
	case <-s.closing:
		return nil
	case <-stream.Context().Done():
		return status.FromContextError(stream.Context().Err()).Err()
	}
}

const farewell = "we are closing, thank you"

// Chat answers each message, and says good-bye when the shop closes.
func (s *shop) Chat(stream grpc.BidiStreamingServer[shopv1.ChatRequest, shopv1.ChatResponse]) error {
	requests, ended := receive(stream)
	for {
		select {
		case req := <-requests:
			order, err := s.find(req.GetOrderId())
			if err != nil {
				return err
			}
			if err := stream.Send(&shopv1.ChatResponse{Text: "about " + order.GetId() + ": " + req.GetText()}); err != nil {
				return err
			}
		case err := <-ended:
			return err
		case <-s.closing:
			return stream.Send(&shopv1.ChatResponse{Text: farewell})
		}
	}
}

// receive turns Recv, which nothing but a message or the stream's end can wake,
// into channels. Its goroutine ends with the handler: that ends the context.
func receive(stream grpc.BidiStreamingServer[shopv1.ChatRequest, shopv1.ChatResponse]) (<-chan *shopv1.ChatRequest, <-chan error) {
	requests, ended := make(chan *shopv1.ChatRequest), make(chan error, 1)
	go func() {
		for {
			req, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				err = nil // the client has said all
			}
			if req == nil {
				ended <- err
				return
			}
			select {
			case requests <- req:
			case <-stream.Context().Done():
				return
			}
		}
	}()
	return requests, ended
}

// Import counts orders that come in bulk.
func (s *shop) Import(stream grpc.ClientStreamingServer[shopv1.ImportRequest, shopv1.ImportResponse]) error {
	var n uint32
	for {
		switch _, err := stream.Recv(); {
		case errors.Is(err, io.EOF):
			return stream.SendAndClose(&shopv1.ImportResponse{Imported: n})
		case err != nil:
			return err
		}
		n++
	}
}

// List returns the products.
func (s *shop) List(context.Context, *shopv1.ListRequest) (*shopv1.ListResponse, error) {
	return &shopv1.ListResponse{Products: []*shopv1.Product{
		{Sku: "tea", Name: "Tea, 100 g", Price: 450},
		{Sku: "pot", Name: "Tea pot", Price: 2900},
	}}, nil
}

func (s *shop) find(id string) (*shopv1.Order, error) {
	if id == cursed {
		panic(id + " is corrupt on " + secret)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, order := range s.orders {
		if order.GetId() == id {
			return order, nil
		}
	}
	return nil, status.Errorf(codes.NotFound, "there is no order %q", id)
}

// condition is how a backend is.
type condition string

const (
	up    condition = "up"
	slow  condition = "slow"  // takes ten times as long
	down  condition = "down"  // fails
	stuck condition = "stuck" // does not answer until it is up or down again
)

// latency is how long a backend takes to answer, or to fail.
const latency = 10 * time.Millisecond

// backend is something that the shop depends on.
type backend struct {
	name string

	mu      sync.Mutex
	state   condition     // guarded by mu
	changed chan struct{} // guarded by mu; closed when state changes
}

func newBackend(name string) *backend {
	return &backend{name: name, state: up, changed: make(chan struct{})}
}

func (b *backend) become(state condition) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.state = state
	close(b.changed)
	b.changed = make(chan struct{})
}

func (b *backend) read() (condition, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.state, b.changed
}

func (b *backend) ask(ctx context.Context) error {
	state, changed := b.read()
	for state == stuck {
		select {
		case <-changed:
			state, changed = b.read()
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
	takes := latency
	if state == slow {
		takes *= 10
	}
	select {
	case <-time.After(takes):
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
	if state == down {
		return status.Errorf(codes.Unavailable, "the %s is down", b.name)
	}
	return nil
}
