package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"

	"google.golang.org/grpc"

	shopv1 "github.com/grpc-resilience/grpc-resilience/examples/shop/v1"
	"github.com/grpc-resilience/grpc-resilience/interceptors"
	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
)

// serveShop is the child process: a shop whose server is guarded by the policy.
// It returns when a drain has ended.
//
// Everything that a guarded server needs is in this function; what the walk
// needs besides is the ledger and the remote control.
func serveShop(policy *resiliencev1.Policy, commands io.Reader, reports, logs io.Writer) error {
	guard, err := interceptors.New(policy, interceptors.WithLogger(slog.New(slog.NewTextHandler(logs, nil))))
	if err != nil {
		return err
	}
	defer guard.Close()

	// Interceptors of your own follow ours: the ledger sees what the guard lets in.
	book := newLedger()
	srv := grpc.NewServer(guard.ServerOptions(
		grpc.ChainUnaryInterceptor(book.unary),
		grpc.ChainStreamInterceptor(book.stream),
	)...)
	shop := newShop(guard.Draining())
	shopv1.RegisterOrdersServer(srv, shop)
	shopv1.RegisterCatalogServer(srv, shop)

	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	remote := &remote{shop: shop, book: book, guard: guard, addr: lis.Addr().String(), reports: json.NewEncoder(reports)}
	go func() {
		remote.obey(commands)
		os.Exit(exitOrphan) // the parent is gone: nobody would stop this process
	}()

	// From here until SIGTERM, and through the drain that it starts.
	err = guard.Serve(context.Background(), srv, lis)
	remote.report()
	return err
}

// exitOrphan is the exit code of a shop whose parent has died.
const exitOrphan = 3

// report is what the shop tells the walk: once when it listens, once after each
// command, and once when it has drained.
type report struct {
	PID     int
	Addr    string
	Methods map[string]tally // by full name: what the handlers have seen

	// Calls that wait for a concurrency limit, by full name. This is the guard's
	// own word: the walk waits by it, but never counts by it.
	Queued map[string]int
}

// calls are those that handlers have begun and ended, of all methods.
func (r report) calls() (begun, ended int) {
	for _, t := range r.Methods {
		begun, ended = begun+t.Started, ended+t.Ended
	}
	return begun, ended
}

// inFlight is the number of calls that handlers have not ended.
func (r report) inFlight() int {
	begun, ended := r.calls()
	return begun - ended
}

// remote lets the parent break the shop and look into its books, over a pipe.
type remote struct {
	shop  *shop
	book  *ledger
	guard *interceptors.Guard
	addr  string

	mu      sync.Mutex
	reports *json.Encoder // guarded by mu
}

// obey reports, then does what each line says and reports again, until the pipe
// is closed. A command is a part of the shop and how it shall be, such as
// "warehouse down"; an empty one only asks for the report.
func (r *remote) obey(commands io.Reader) {
	r.report()
	for lines := bufio.NewScanner(commands); lines.Scan(); {
		var part string
		var state condition
		switch _, _ = fmt.Sscan(lines.Text(), &part, &state); part {
		case "warehouse":
			r.shop.warehouse.become(state)
		case "index":
			r.shop.index.become(state)
		}
		r.report()
	}
}

func (r *remote) report() {
	rep := report{PID: os.Getpid(), Addr: r.addr, Methods: r.book.read(), Queued: map[string]int{}}
	for _, m := range r.guard.Snapshot().Methods {
		if m.ConcurrencyLimit != nil {
			rep.Queued[m.Method] = m.ConcurrencyLimit.Queued
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	_ = r.reports.Encode(rep) // fails only if the parent is gone, and then obey ends
}
