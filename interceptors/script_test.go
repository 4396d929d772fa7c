package interceptors_test

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// script is a service that does what each message asks for, word by word: wait
// for a time ("2s") or for a hold, hang until the call's context ends ("hang"), or
// fail with a status code ("UNAVAILABLE"). What it got through is echoed.
func script() *rpctest.Service {
	return &rpctest.Service{
		Unary: func(ctx context.Context, req *rpctest.Message) (*rpctest.Message, error) {
			return req, obey(ctx, req.GetValue())
		},
		Stream: func(ss grpc.ServerStream) error {
			method, _ := grpc.Method(ss.Context())
			for {
				text, err := rpctest.Recv(ss)
				if err != nil {
					if method == rpctest.ClientStream {
						return rpctest.Send(ss, "bye")
					}
					return nil
				}
				if err := obey(ss.Context(), text); err != nil {
					return err
				}
				if method == rpctest.ClientStream {
					continue
				}
				if err := rpctest.Send(ss, text); err != nil {
					return err
				}
			}
		},
	}
}

func obey(ctx context.Context, text string) error {
	for _, word := range strings.Fields(text) {
		var code codes.Code
		if word == "hang" {
			<-ctx.Done()
			return status.FromContextError(ctx.Err()).Err()
		} else if held, ok := heldWords.Load(word); ok {
			select {
			case <-held.(chan struct{}):
			case <-ctx.Done():
				return status.FromContextError(ctx.Err()).Err()
			}
		} else if d, err := time.ParseDuration(word); err == nil {
			time.Sleep(d)
		} else if code.UnmarshalJSON([]byte(strconv.Quote(word))) == nil {
			return status.Error(code, "as asked for")
		}
	}
	return nil
}

var (
	heldWords sync.Map // of chan struct{}, by the word
	holding   atomic.Uint64
)

// holdWord returns a word at which a script waits until release is called.
func holdWord(t *testing.T) (word string, release func()) {
	word = fmt.Sprintf("hold-%d", holding.Add(1))
	held := make(chan struct{})
	heldWords.Store(word, held)
	release = sync.OnceFunc(func() { close(held) })
	t.Cleanup(release)
	return word, release
}

// streamOpen opens a stream and sends a text.
func streamOpen(t *testing.T, ctx context.Context, conn grpc.ClientConnInterface, method, text string) grpc.ClientStream {
	t.Helper()
	s, err := rpctest.Open(ctx, conn, method)
	if err != nil {
		t.Fatal(err)
	}
	if err := rpctest.Send(s, text); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
	return s
}

// sideOf is the side that the arm is on.
func (a arm) sideOf() interceptors.Side {
	if a.side == "client" {
		return interceptors.Client
	}
	return interceptors.Server
}

// byHand calls the arm's interceptor with f as what is further in: the invoker,
// the handler, or the first RecvMsg of a stream.
func (a arm) byHand(ctx context.Context, g *interceptors.Guard, f func(ctx context.Context) error) error {
	switch a.name {
	case "client unary":
		return g.UnaryClientInterceptor()(ctx, a.method, new(rpctest.Message), new(rpctest.Message), nil,
			func(ctx context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
				return f(ctx)
			})
	case "client stream":
		s, err := g.StreamClientInterceptor()(ctx, rpctest.StreamDesc(a.method), nil, a.method,
			func(ctx context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
				return &handStream{ctx: ctx, f: f}, nil
			})
		if err != nil {
			return err
		}
		if err = s.RecvMsg(nil); err == io.EOF {
			return nil
		}
		return err
	case "server unary":
		_, err := g.UnaryServerInterceptor()(ctx, nil, &grpc.UnaryServerInfo{FullMethod: a.method},
			func(ctx context.Context, _ any) (any, error) { return nil, f(ctx) })
		return err
	default:
		return g.StreamServerInterceptor()(nil, &handStream{ctx: ctx}, &grpc.StreamServerInfo{FullMethod: a.method},
			func(_ any, ss grpc.ServerStream) error { return f(ss.Context()) })
	}
}

// handStream is a stream of byHand, on either side.
type handStream struct {
	grpc.ClientStream
	grpc.ServerStream
	ctx     context.Context
	f       func(ctx context.Context) error
	trailer metadata.MD
}

func (s *handStream) Context() context.Context { return s.ctx }
func (s *handStream) Trailer() metadata.MD     { return s.trailer }
func (s *handStream) SendMsg(any) error        { return nil }

func (s *handStream) RecvMsg(any) error {
	if err := s.f(s.ctx); err != nil {
		return err
	}
	return io.EOF
}
