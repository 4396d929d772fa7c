package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// The sections on what clients lose when a server is restarted and when one
// crashes, with another beside it.

// fleet is several servers of the shop and a client of them all. The
// client is told of a server when that listens, and of its end when it has
// ended: later than a name service would.
type fleet struct {
	servers []*child // those that run
	names   *manual.Resolver
	client  *client
}

const fleetScheme = "fleet"

// inTurn makes a client call all servers of a name in turn, and has gRPC retry
// the one method that may run twice.
var inTurn = grpc.WithDefaultServiceConfig(`{
	"loadBalancingConfig": [{"round_robin": {}}],
	"methodConfig": [{
		"name": [{"service": "shop.v1.Orders", "method": "Search"}],
		"retryPolicy": {
			"maxAttempts": 3,
			"initialBackoff": "0.05s", "maxBackoff": "0.5s", "backoffMultiplier": 2,
			"retryableStatusCodes": ["UNAVAILABLE"]
		}
	}]
}`)

// startFleet starts n servers and a client of theirs.
func startFleet(ctx context.Context, guard *interceptors.Guard, n int, opts ...grpc.DialOption) (f *fleet, err error) {
	f = &fleet{names: manual.NewBuilderWithScheme(fleetScheme)}
	defer func() {
		if err != nil {
			f.close()
		}
	}()
	if f.client, err = dial(guard, fleetScheme+":///shop", append(opts, grpc.WithResolvers(f.names))...); err != nil {
		return nil, err
	}
	for range n {
		if _, err = f.add(ctx); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// add starts one more server.
func (f *fleet) add(ctx context.Context) (*child, error) {
	server, err := startChild(ctx)
	if err != nil {
		return nil, err
	}
	f.servers = append(f.servers, server)
	f.tell()
	return server, nil
}

// remove forgets a server that has ended.
func (f *fleet) remove(server *child) {
	server.kill() // it has ended: this only waits and closes
	f.servers = slices.DeleteFunc(f.servers, func(s *child) bool { return s == server })
	f.tell()
}

func (f *fleet) tell() {
	var state resolver.State
	for _, s := range f.servers {
		state.Addresses = append(state.Addresses, resolver.Address{Addr: s.addr})
	}
	f.names.UpdateState(state)
}

func (f *fleet) close() {
	if f == nil {
		return // it never started
	}
	if f.client != nil {
		f.client.conn.Close()
	}
	for _, s := range f.servers {
		s.kill()
	}
}

// load has n callers call without a pause until end is called, which returns what
// the calls returned.
func load(ctx context.Context, n int, call func() error) (end func() []error) {
	during, stop := context.WithCancel(ctx)
	var callers sync.WaitGroup
	results := make([][]error, n)
	for i := range results {
		callers.Go(func() {
			for during.Err() == nil {
				err := call()
				results[i] = append(results[i], err)
				if err != nil {
					pause(during, 20*time.Millisecond)
				}
			}
		})
	}
	return sync.OnceValue(func() []error {
		stop()
		callers.Wait()
		return slices.Concat(results...)
	})
}

// rolling replaces both servers under load, as a Deployment with maxSurge 1 and
// maxUnavailable 0 does: the next one is told to end when a new one answers.
func (w *walk) rolling(ctx context.Context) (err error) {
	if w.fleet, err = startFleet(ctx, w.guard, 2, inTurn); err != nil {
		return err
	}
	f, old := w.fleet, slices.Clone(w.fleet.servers)
	kinds := []string{place, watch, chat, bulk} // no limit is in their way
	var turn atomic.Uint32
	end := load(ctx, 8, func() error { return f.client.call(ctx, kinds[turn.Add(1)%uint32(len(kinds))]) })
	defer end()

	answers := func(r report) bool {
		_, ended := r.calls()
		return ended > 0
	}
	for _, server := range old {
		if _, err := server.await(ctx, patience, answers); err != nil {
			return err
		}
		fresh, err := f.add(ctx)
		if err != nil {
			return err
		}
		if _, err := fresh.await(ctx, patience, answers); err != nil {
			return err
		}
		if err := server.terminate(); err != nil {
			return err
		}
	}
	var exits []string
	var books []report
	for _, server := range old {
		code, err := server.wait(ctx)
		if err != nil {
			return err
		}
		exits, books = append(exits, fmt.Sprint(code)), append(books, server.latest)
		f.remove(server)
	}
	errs := end()
	used, ran := 0, 0
	for _, server := range f.servers {
		book, err := server.look(ctx)
		if err != nil {
			return err
		}
		if answers(book) {
			used++
		}
		books = append(books, book)
	}
	for _, book := range books {
		begun, _ := book.calls()
		ran += begun
	}
	w.claim("rolling restart: exit codes of the two old servers", "0, 0", strings.Join(exits, ", "))
	w.claim("rolling restart: new servers that get calls", outOf(2, 2), outOf(used, 2))
	w.claim("rolling restart: calls and streams that are lost", outOf(0, len(errs)), outOf(len(failures(errs)), len(errs)))
	w.claim("rolling restart: times that the four servers ran them", fmt.Sprint(len(errs)), fmt.Sprint(ran))
	return nil
}

// crash kills one of two servers with calls in flight, twice. Place may have
// taken its order or not: nobody may repeat it for the caller. Search may run
// twice, so gRPC asks the other server.
func (w *walk) crash(ctx context.Context) error {
	if err := w.kill(ctx, "crash, Place without retry", place, "warehouse", false); err != nil {
		return err
	}
	if _, err := w.fleet.add(ctx); err != nil {
		return err
	}
	return w.kill(ctx, "crash, Search with retry", search, "index", true)
}

// kill kills a server that has a call of each caller, stuck in a part of it.
func (w *walk) kill(ctx context.Context, claim, method, part string, retried bool) error {
	const callers = 4
	victim, other := w.fleet.servers[0], w.fleet.servers[1]
	others, err := other.look(ctx)
	if err != nil {
		return err
	}
	before := others.Methods[method].Started
	fresh, err := victim.set(ctx, part, stuck)
	if err != nil {
		return err
	}
	before += fresh.Methods[method].Started

	end := load(ctx, callers, func() error { return w.fleet.client.call(ctx, method) })
	defer end()
	held, err := victim.await(ctx, 2*patience, func(r report) bool { return r.Methods[method].inFlight() == callers })
	if err != nil {
		return err
	}
	if others, err = other.look(ctx); err != nil {
		return err
	}
	victim.kill()
	enough := others.Methods[method].Ended + 5*callers // the callers go on
	if _, err := other.await(ctx, patience, func(r report) bool { return r.Methods[method].Ended >= enough }); err != nil {
		return err
	}
	errs := end()
	w.fleet.remove(victim)
	if others, err = other.look(ctx); err != nil {
		return err
	}

	lost, again := callers, 0
	if retried {
		lost, again = 0, callers
	}
	bad := failures(errs)
	w.claim(claim+": the server ends by", "signal: killed", victim.fate())
	w.claim(claim+": calls in flight on it", fmt.Sprint(callers), fmt.Sprint(held.Methods[method].inFlight()))
	w.claim(claim+": calls that are lost", outOf(lost, len(errs)), outOf(len(bad), len(errs)))
	if !retried {
		w.claimAll(claim+": lost calls that get UNAVAILABLE", bad, func(err error) bool { return status.Code(err) == codes.Unavailable })
	}
	ran := held.Methods[method].Started + others.Methods[method].Started - before
	w.claim(claim+": times that the servers ran them", fmt.Sprint(len(errs)+again), fmt.Sprint(ran))
	return nil
}
