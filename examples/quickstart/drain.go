package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	shopv1 "github.com/grpc-resilience/grpc-resilience/examples/shop/v1"
)

// talk is a chat that goes on.
type talk = grpc.BidiStreamingClient[shopv1.ChatRequest, shopv1.ChatResponse]

func (w *walk) drain(ctx context.Context) error {
	const each = 3 // calls of each kind that SIGTERM finds in flight
	order, err := w.client.place(ctx)
	if err != nil {
		return fmt.Errorf("cannot place an order to watch: %w", err)
	}
	// Unary calls that a stuck warehouse keeps in their handlers, streams that
	// have nothing new to say, and talks that go on.
	if _, err := w.shop.set(ctx, "warehouse", stuck); err != nil {
		return err
	}
	placed := together(each, func() error { return w.client.call(ctx, place) })
	watched := together(each, func() error { return w.client.watch(ctx, order) })
	var talks []talk
	asked := times(each, func() error {
		stream, err := w.client.orders.Chat(ctx)
		if err != nil {
			return err
		}
		talks = append(talks, stream)
		return ask(stream, order)
	})
	busy, err := w.shop.await(ctx, patience, func(r report) bool { return r.inFlight() == 3*each })
	if err != nil {
		return err
	}
	watcher, err := w.client.health.Watch(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		return err
	}
	heard := fmt.Sprintf("%v, %v", news(watcher.Recv), w.check(ctx))
	w.claim("drain: before it, unary calls and streams in flight", fmt.Sprint(3*each), fmt.Sprint(busy.inFlight()))
	w.claim("drain: before it, health Watch, Check", "SERVING, SERVING", heard)

	if err := w.shop.terminate(); err != nil {
		return err
	}

	// Announce. The clients that were here and those that come now are served.
	checked := w.check(ctx)
	for end := time.Now().Add(time.Second); checked != notServing && time.Now().Before(end) && ctx.Err() == nil; checked = w.check(ctx) {
		pause(ctx, 5*time.Millisecond)
	}
	newcomer, err := dial(w.guard, w.shop.addr)
	if err != nil {
		return err
	}
	defer newcomer.conn.Close()
	var fresh []error
	for _, c := range []*client{w.client, newcomer} {
		fresh = append(fresh, c.round(ctx, []string{get, search, watch, chat, bulk, list})...)
	}
	for _, t := range talks {
		asked = append(asked, ask(t, order))
	}
	w.claim("drain: announce, health Check", notServing, checked)
	w.claimAll("drain: announce, new calls that are OK", fresh, isOK)
	w.claimAll("drain: announce, messages of bidi streams answered", asked, isOK)
	w.claim("drain: announce, health Watch", notServing, news(watcher.Recv))

	// Grace. The shop asks its streams to end; the stuck calls come free late.
	gone := gather(each, watched)
	var parted []error
	for _, t := range talks {
		last, err := lastWords(t.Recv)
		if err == nil && last.GetText() != farewell {
			err = errors.New("ended without a farewell")
		}
		parted = append(parted, err)
	}
	_, err = w.shop.set(ctx, "warehouse", up) // if the shop is gone already, the calls tell
	answered := gather(each, placed)
	w.claimAll("drain: grace, server streams that end with OK", gone, isOK)
	w.claimAll("drain: grace, bidi streams that end with a farewell", parted, isOK)
	w.claimAll("drain: grace, unary calls that are OK", answered, isOK)

	code, waitErr := w.shop.wait(ctx)
	begun, ended := w.shop.latest.calls()
	w.claimThat(begun > 0 && begun == ended, "drain: of all that handlers have begun, they have ended", fmt.Sprint(begun), fmt.Sprint(ended))
	w.claim("drain: the server's process ends with", fmt.Sprintf("pid %d, exit code 0", w.shop.pid), fmt.Sprintf("pid %d, exit code %d", w.shop.latest.PID, code))
	return errors.Join(err, waitErr)
}

var notServing = healthpb.HealthCheckResponse_NOT_SERVING.String()

// check asks for the server's health on the connection that is open.
func (w *walk) check(ctx context.Context) string {
	return news(func() (*healthpb.HealthCheckResponse, error) {
		return w.client.health.Check(ctx, &healthpb.HealthCheckRequest{})
	})
}

// news waits for a word on the server's health.
func news(recv func() (*healthpb.HealthCheckResponse, error)) string {
	health, err := recv()
	if err != nil {
		return err.Error()
	}
	return health.GetStatus().String()
}
