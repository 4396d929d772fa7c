package interceptors_test

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// arm is one of the four interceptors, with the method that it is tried on.
type arm struct {
	name, side, method string
}

var arms = []arm{
	{"client unary", "client", rpctest.Unary},
	{"client stream", "client", rpctest.Bidi},
	{"server unary", "server", rpctest.Unary},
	{"server stream", "server", rpctest.Bidi},
}

func (a arm) unary() bool { return a.method == rpctest.Unary || a.method == rpctest.Other }

// eachArm runs a test on every arm, in virtual time.
func eachArm(t *testing.T, f func(t *testing.T, a arm)) {
	t.Helper()
	onArms(t, arms, f)
}

// eachServerArm is eachArm for what only a server does.
func eachServerArm(t *testing.T, f func(t *testing.T, a arm)) {
	t.Helper()
	onArms(t, arms[2:], f)
}

func onArms(t *testing.T, arms []arm, f func(t *testing.T, a arm)) {
	t.Helper()
	for _, a := range arms {
		t.Run(a.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { f(t, a) })
		})
	}
}

// setup serves s and connects to it; blocks are those of the arm's only rule.
func (a arm) setup(t *testing.T, blocks string, s *rpctest.Service, opts ...interceptors.Option) (*interceptors.Guard, *grpc.ClientConn) {
	t.Helper()
	g := mustGuard(t, fmt.Sprintf("%s: {rules: [{name: the-rule, methods: ['*'], %s}]}", a.side, blocks), opts...)
	if a.side == "client" {
		return g, rpctest.Start(t, s, nil, g.DialOptions())
	}
	return g, rpctest.Start(t, s, g.ServerOptions(), nil)
}

// call makes one call and returns how it ended; a stream sends one message and
// receives until it ends.
func (a arm) call(ctx context.Context, conn grpc.ClientConnInterface, text string, opts ...grpc.CallOption) error {
	if a.unary() {
		_, err := rpctest.Call(ctx, conn, a.method, text, opts...)
		return err
	}
	s, err := rpctest.Open(ctx, conn, a.method, opts...)
	if err != nil {
		return err
	}
	// What fails here is told by Recv.
	_ = rpctest.Send(s, text)
	_ = s.CloseSend()
	for {
		switch _, err := rpctest.Recv(s); err {
		case nil:
		case io.EOF:
			return nil
		default:
			return err
		}
	}
}

// pending is a call that was started.
type pending struct{ end atomic.Pointer[callEnd] }

type callEnd struct {
	err  error
	took time.Duration
}

func (p *pending) ended() bool { return p.end.Load() != nil }

// result returns how the call ended, nothing if it has not.
func (p *pending) result() callEnd {
	if e := p.end.Load(); e != nil {
		return *e
	}
	return callEnd{}
}

// start makes a call in the background and waits until it is at rest.
func (a arm) start(ctx context.Context, conn grpc.ClientConnInterface, text string) *pending {
	p, began := new(pending), time.Now()
	go func() {
		err := a.call(ctx, conn, text)
		p.end.Store(&callEnd{err, time.Since(began)})
	}()
	synctest.Wait()
	return p
}

// pass lets virtual time go by and waits until everything is at rest.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// state is the snapshot of the arm's method.
func (a arm) state(t *testing.T, g *interceptors.Guard) interceptors.MethodSnapshot {
	t.Helper()
	synctest.Wait()
	for _, m := range g.Snapshot().Methods {
		if m.Method == a.method {
			return m
		}
	}
	t.Fatalf("%s is not in the snapshot", a.method)
	return interceptors.MethodSnapshot{}
}

// held is the number of permits of the concurrency limit that are out.
func (a arm) held(t *testing.T, g *interceptors.Guard) int {
	t.Helper()
	l := a.state(t, g).ConcurrencyLimit
	return l.InFlight + l.Streams
}

// desk is a handler that holds every call until it is told to let one go.
type desk struct {
	open chan error // each value ends one call

	mu    sync.Mutex
	calls []string // in the order in which the handler was entered
}

func newDesk() *desk { return &desk{open: make(chan error)} }

func (d *desk) hold(ctx context.Context, text string) error {
	d.mu.Lock()
	d.calls = append(d.calls, text)
	d.mu.Unlock()
	select {
	case err := <-d.open:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// next ends one call, waits until everything is at rest, and returns the calls
// that have reached the handler so far.
func (d *desk) next(err error) []string {
	d.open <- err
	synctest.Wait()
	return d.seen()
}

func (d *desk) seen() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.calls)
}

func (d *desk) service() *rpctest.Service {
	return bothKinds(d.hold)
}

// bothKinds serves unary calls and streams with one function, which gets the
// request or the first message.
func bothKinds(f func(ctx context.Context, text string) error) *rpctest.Service {
	return &rpctest.Service{
		Unary: func(ctx context.Context, req *rpctest.Message) (*rpctest.Message, error) {
			return req, f(ctx, req.GetValue())
		},
		Stream: func(ss grpc.ServerStream) error {
			text, err := rpctest.Recv(ss)
			if err != nil {
				return err
			}
			return f(ss.Context(), text)
		},
	}
}

// reasonOf returns the reason in an error's ErrorInfo, "" without one.
func reasonOf(err error) interceptors.Reason {
	info := detailOf[*errdetails.ErrorInfo](err)
	if info.GetDomain() != interceptors.Domain {
		return ""
	}
	return interceptors.Reason(info.GetReason())
}

// detailOf returns the detail of a type in an error's status, nil without one.
func detailOf[T any](err error) (found T) {
	for _, d := range status.Convert(err).Details() {
		if d, ok := d.(T); ok {
			found = d
		}
	}
	return found
}

// retryInfo returns when an error's status says that a retry has a chance, 0 if
// it does not say.
func retryInfo(err error) time.Duration {
	return detailOf[*errdetails.RetryInfo](err).GetRetryDelay().AsDuration()
}
