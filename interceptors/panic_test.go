package interceptors_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// badError is an error that cannot be read.
type badError struct{}

func (badError) Error() string { panic("secret in Error") }

// strictError cannot be compared with an error of another type.
type strictError struct{ code int }

func (e *strictError) Error() string        { return "strict" }
func (e *strictError) Is(target error) bool { return e.code == target.(*strictError).code }

// crash is one way in which a handler goes wrong.
type crash struct {
	name   string
	do     func() error
	panics uint64 // that are recovered
	value  any    // of the last one, as the panic handler sees it; nil: not compared
}

var errSecret = errors.New("secret error")

var crashes = []crash{
	{"panic", func() error { panic("secret") }, 1, "secret"},
	{"panic with an error", func() error { panic(errSecret) }, 1, errSecret},
	{"panic of nil", func() error { panic(nil) }, 1, nil},
	{"runtime error", func() error { none := ""; _ = 1 / len(none); return nil }, 1, nil},
	{"panic with an error that cannot be read", func() error { panic(badError{}) }, 1, badError{}},
	{"returned error that cannot be read", func() error { return badError{} }, 1, "secret in Error"},
	{"wrapped error that cannot be read", func() error { return lazyError{badError{}} }, 1, "secret in Error"},
	{"returned error that cannot be compared", func() error { return &strictError{} }, 1, nil},
	{"panic in a deferred function", func() error { defer func() { panic("secret") }(); return nil }, 1, "secret"},
	{"panic in a deferred function of a panic", func() error { defer func() { panic("secret 2") }(); panic("secret 1") }, 1, "secret 2"},
	{"Goexit", func() error { runtime.Goexit(); return nil }, 1, interceptors.ErrGoexit},
	{"Goexit in a deferred function of a panic", func() error { defer runtime.Goexit(); panic("secret") }, 1, interceptors.ErrGoexit},
	{"panic in a deferred function of Goexit", func() error { defer func() { panic("secret") }(); runtime.Goexit(); return nil }, 2, interceptors.ErrGoexit},
}

// lazyError reads the error that it wraps when it is asked.
type lazyError struct{ error }

func (e lazyError) Unwrap() error { return e.error }
func (e lazyError) Error() string { return "place: " + e.error.Error() }

// moments are when a handler of a stream goes wrong.
var moments = []struct {
	name     string
	messages int // that the client gets before
	reach    func(ss grpc.ServerStream) error
	unary    func(ctx context.Context) error // nil: a unary call has no such moment
}{
	{
		"at once", 0,
		func(grpc.ServerStream) error { return nil },
		func(context.Context) error { return nil },
	}, {
		"after headers", 0,
		func(ss grpc.ServerStream) error { return ss.SendHeader(metadata.Pairs("k", "v")) },
		func(ctx context.Context) error { return grpc.SendHeader(ctx, metadata.Pairs("k", "v")) },
	}, {
		"after messages", 3,
		func(ss grpc.ServerStream) error {
			return errors.Join(rpctest.Send(ss, "1"), rpctest.Send(ss, "2"), rpctest.Send(ss, "3"))
		},
		nil,
	},
}

// gatedServer has every gate, so that leaks show.
const gatedServer = `server: {rules: [{methods: ['*'], timeout: 1h, stream_timeout: 1h, breaker: {request_volume_threshold: 1000},
	rate_limit: {requests_per_second: 1000}, concurrency_limit: {max_in_flight: 2, max_streams: 2, max_queue: 2}}]}`

func TestCase25_UnaryPanics(t *testing.T) {
	for _, m := range moments {
		if m.unary == nil {
			continue
		}
		for _, c := range crashes {
			t.Run(m.name+"/"+c.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWitness(t)
					w.serve(t, &rpctest.Service{Unary: func(ctx context.Context, req *rpctest.Message) (*rpctest.Message, error) {
						if req.GetValue() == "fine" {
							return req, nil
						}
						if err := m.unary(ctx); err != nil {
							return nil, err
						}
						return req, c.do()
					}})
					_, err := rpctest.Call(t.Context(), w.conn, rpctest.Unary, "crash")
					w.check(t, c, rpctest.Unary, err)
				})
			})
		}
	}
}

func TestCase25_StreamPanics(t *testing.T) {
	for _, m := range moments {
		for _, c := range crashes {
			t.Run(m.name+"/"+c.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWitness(t)
					w.serve(t, &rpctest.Service{Stream: func(ss grpc.ServerStream) error {
						if err := m.reach(ss); err != nil {
							return err
						}
						return c.do()
					}})
					s, err := rpctest.Open(t.Context(), w.conn, rpctest.Bidi)
					if err != nil {
						t.Fatal(err)
					}
					for range m.messages {
						if _, err := rpctest.Recv(s); err != nil {
							t.Fatalf("what was sent before the panic did not arrive: %v", err)
						}
					}
					_, err = rpctest.Recv(s)
					w.check(t, c, rpctest.Bidi, err)
				})
			})
		}
	}
}

func TestCase25_PanicAfterTheCallerHasGone(t *testing.T) {
	for _, c := range crashes {
		t.Run(c.name, func(t *testing.T) {
			eachServerArm(t, func(t *testing.T, a arm) {
				w := newWitness(t)
				w.serve(t, bothKinds(func(ctx context.Context, text string) error {
					if text == "fine" {
						return nil
					}
					<-ctx.Done()
					return c.do()
				}))
				ctx, cancel := context.WithCancel(t.Context())
				p := a.start(ctx, w.conn, "crash")
				cancel()
				synctest.Wait()
				if status.Code(p.result().err) != codes.Canceled {
					t.Errorf("the caller has %v", p.result().err)
				}
				w.checkInside(t, c, a.method)
			})
		})
	}
}

// witness is a guarded server, and what it logs and tells of panics.
type witness struct {
	guard *interceptors.Guard
	conn  *grpc.ClientConn

	mu     sync.Mutex
	log    bytes.Buffer
	values []any
	stacks []string
	told   []string // methods
}

func newWitness(t *testing.T) *witness {
	w := new(witness)
	w.guard = mustGuard(t, gatedServer, interceptors.WithLogger(slog.New(slog.NewJSONHandler(w, nil))),
		interceptors.WithPanicHandler(func(_ context.Context, method string, p any, stack []byte) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.values, w.stacks, w.told = append(w.values, p), append(w.stacks, string(stack)), append(w.told, method)
		}))
	return w
}

func (w *witness) serve(t *testing.T, s *rpctest.Service) {
	w.conn = rpctest.Start(t, s, w.guard.ServerOptions(), nil)
}

func (w *witness) Write(line []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.Write(line)
}

// check checks what everyone has learnt of a crash.
func (w *witness) check(t *testing.T, c crash, method string, err error) {
	t.Helper()
	if status.Code(err) != codes.Internal || status.Convert(err).Message() != "internal error" {
		t.Errorf("the client has %v, want INTERNAL and a fixed text", err)
	}
	info := detailOf[*errdetails.ErrorInfo](err)
	if info.GetReason() != "PANIC" || info.GetDomain() != interceptors.Domain || info.GetMetadata()["method"] != method {
		t.Errorf("ErrorInfo %v", info)
	}
	last := w.checkInside(t, c, method)
	if incident := info.GetMetadata()["incident"]; len(incident) != 16 || last.Incident != incident {
		t.Errorf("the client has incident %q, the log %q", incident, last.Incident)
	}
}

// logged is one line of the log.
type logged struct{ Msg, Method, Incident, Panic, Stack string }

// checkInside checks what this process has learnt, and that it lives.
func (w *witness) checkInside(t *testing.T, c crash, method string) (last logged) {
	t.Helper()
	synctest.Wait()
	if n := w.guard.Snapshot().Panics; n != c.panics {
		t.Errorf("%d panics counted, want %d", n, c.panics)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	lines := bytes.Split(bytes.TrimSpace(w.log.Bytes()), []byte("\n"))
	if len(lines) != int(c.panics) || len(w.values) != len(lines) {
		t.Fatalf("%d panics logged and %d told, want %d: %s", len(lines), len(w.values), c.panics, w.log.Bytes())
	}
	if err := json.Unmarshal(lines[len(lines)-1], &last); err != nil {
		t.Fatal(err)
	}
	if last.Msg != "handler panicked" || last.Method != method || last.Panic == "" {
		t.Errorf("logged %+v", last)
	}
	if !strings.Contains(last.Stack, "goroutine ") || last.Stack != w.stacks[len(w.stacks)-1] {
		t.Errorf("logged stack %q", last.Stack)
	}
	if got := w.values[len(w.values)-1]; c.value != nil && got != c.value {
		t.Errorf("the panic handler was told of %v, want %v", got, c.value)
	}
	if got := w.told[0]; got != method {
		t.Errorf("the panic handler was told of %s, want %s", got, method)
	}
	checkIdle(t, w.guard)
	if m := gatesOf(t, w.guard, interceptors.Server, method); m.Counts.Success+m.Counts.Dropped != 0 {
		t.Errorf("counted as %+v", m.Counts)
	}
	if _, err := rpctest.Call(t.Context(), w.conn, rpctest.Other, "fine"); err != nil {
		t.Errorf("the server does not live: %v", err)
	}
	return last
}

func TestCase26_NothingOfAPanicLeavesTheProcess(t *testing.T) {
	_, file, _, _ := runtime.Caller(0)
	secrets := []string{"secret", "goroutine", ".go:", "runtime", "main.", "interceptors.", filepath.Dir(file)}
	for _, c := range crashes {
		t.Run(c.name, func(t *testing.T) {
			eachServerArm(t, func(t *testing.T, a arm) {
				w := newWitness(t)
				w.serve(t, bothKinds(func(ctx context.Context, _ string) error {
					if err := errors.Join(grpc.SetHeader(ctx, metadata.Pairs("h", "v")), grpc.SetTrailer(ctx, metadata.Pairs("t", "v"))); err != nil {
						return err
					}
					return c.do()
				}))
				var header, trailer metadata.MD
				err := a.call(t.Context(), w.conn, "", grpc.Header(&header), grpc.Trailer(&trailer))
				if reasonOf(err) != "PANIC" || len(trailer) == 0 {
					t.Fatalf("%v, trailer %v", err, trailer)
				}
				said := fmt.Sprint(err, status.Convert(err).Proto(), header, trailer)
				for _, d := range status.Convert(err).Details() {
					said += fmt.Sprint(d)
				}
				for _, s := range secrets {
					if strings.Contains(said, s) {
						t.Errorf("%q has left the process: %s", s, said)
					}
				}
			})
		})
	}
}

func TestCase25_PanicIsAFailureOfTheMethod(t *testing.T) {
	for _, c := range crashes {
		t.Run(c.name, func(t *testing.T) {
			eachServerArm(t, func(t *testing.T, a arm) {
				g := mustGuard(t, "server: {rules: [{methods: ['*'], breaker: {failure_codes: [UNAVAILABLE]}}]}")
				conn := rpctest.Start(t, bothKinds(func(context.Context, string) error { return c.do() }), g.ServerOptions(), nil)
				_ = a.call(t.Context(), conn, "")
				synctest.Wait()
				wantEnded(t, g, interceptors.Server, a.method, ended{failure: 1})
			})
		})
	}
}

// A panic of an interceptor further in is a panic of the handler to us.
func TestCase25_PanicOfALaterInterceptor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, gatedServer)
		conn := rpctest.Start(t, clerk(), g.ServerOptions(
			grpc.ChainUnaryInterceptor(func(context.Context, any, *grpc.UnaryServerInfo, grpc.UnaryHandler) (any, error) { panic("secret") }),
			grpc.ChainStreamInterceptor(func(any, grpc.ServerStream, *grpc.StreamServerInfo, grpc.StreamHandler) error { panic("secret") }),
		), nil)
		for _, a := range arms[2:] {
			if err := a.call(t.Context(), conn, ""); status.Code(err) != codes.Internal || reasonOf(err) != "PANIC" {
				t.Errorf("%s: %v", a.name, err)
			}
		}
		synctest.Wait()
		checkIdle(t, g)
	})
}

// Without any rule, and for methods that no rule is for, panics are recovered
// all the same.
func TestPanicsAreRecoveredWithoutRules(t *testing.T) {
	for _, c := range crashes {
		t.Run(c.name, func(t *testing.T) {
			eachServerArm(t, func(t *testing.T, a arm) {
				g := mustGuard(t, "server: {rules: [{methods: [/other.v1.Service/Method], timeout: 1s}]}")
				conn := rpctest.Start(t, bothKinds(func(context.Context, string) error { return c.do() }), g.ServerOptions(), nil)
				err := a.call(t.Context(), conn, "")
				if status.Code(err) != codes.Internal || reasonOf(err) != "PANIC" || g.Snapshot().Panics != c.panics {
					t.Errorf("%v, %d panics counted", err, g.Snapshot().Panics)
				}
				synctest.Wait()
				checkIdle(t, g)
			})
		})
	}
}

// Goexit, whoever calls it, leaves no caller without an answer, no permit out,
// and no stream that would hold up GracefulStop.
func TestCase25_Goexit(t *testing.T) {
	unavailable := func() error { return status.Error(codes.Unavailable, "") }
	for name, c := range map[string]struct {
		handler func() error
		opt     interceptors.Option
		limiter func()
		panics  uint64
	}{
		"handler": {handler: func() error { runtime.Goexit(); return nil }, panics: 1},
		"classifier": {
			handler: unavailable,
			opt: interceptors.WithClassifier(func(context.Context, interceptors.Side, string, error) interceptors.Outcome {
				runtime.Goexit()
				return interceptors.Success
			}),
			panics: 1,
		},
		"limiter": {limiter: runtime.Goexit, panics: 1},
		"logger":  {handler: unavailable, opt: interceptors.WithLogger(slog.New(quitter{})), panics: 1}, // of the breaker that opens
		"panic handler": {
			handler: func() error { panic("secret") },
			opt:     interceptors.WithPanicHandler(func(context.Context, string, any, []byte) { runtime.Goexit() }),
			panics:  2,
		},
	} {
		t.Run(name, func(t *testing.T) {
			eachServerArm(t, func(t *testing.T, a arm) {
				opts := []interceptors.Option{interceptors.WithLimiter("mine", limiterFunc(func(context.Context) error {
					if c.limiter != nil {
						c.limiter()
					}
					return nil
				}))}
				if c.opt != nil {
					opts = append(opts, c.opt)
				}
				g := mustGuard(t, "server: {rules: [{methods: ['*'], timeout: 1h, stream_timeout: 1h, rate_limit: {external: mine}, "+placeForOne+"}]}", opts...)
				srv, lis := rpctest.NewServer(bothKinds(func(context.Context, string) error { return c.handler() }), g.ServerOptions()...), rpctest.Listen()
				served := make(chan error)
				go func() { served <- srv.Serve(lis) }()
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				if err := a.call(ctx, rpctest.Dial(t, lis), ""); status.Code(err) != codes.Internal || reasonOf(err) != "PANIC" {
					t.Errorf("the client has %v, want INTERNAL", err)
				}
				srv.GracefulStop()
				if err := <-served; err != nil {
					t.Error(err)
				}
				if n := g.Snapshot().Panics; n != c.panics {
					t.Errorf("%d panics counted, want %d", n, c.panics)
				}
				checkIdle(t, g)
			})
		})
	}
}

// quitter is a slog.Handler that calls Goexit.
type quitter struct{ slog.Handler }

func (quitter) Enabled(context.Context, slog.Level) bool  { return true }
func (quitter) Handle(context.Context, slog.Record) error { runtime.Goexit(); return nil }
