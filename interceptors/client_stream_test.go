package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

const oneStream = "breaker: {}, concurrency_limit: {max_streams: 1}"

// clientStreams is a guarded client of a scripted server.
func clientStreams(t *testing.T, blocks string, extra ...grpc.DialOption) (*interceptors.Guard, *grpc.ClientConn) {
	t.Helper()
	g := mustGuard(t, fmt.Sprintf("client: {rules: [{methods: ['*'], %s}]}", blocks))
	return g, rpctest.Start(t, script(), nil, g.DialOptions(extra...))
}

// wantHeld checks that a stream method holds its one permit.
func wantHeld(t *testing.T, g *interceptors.Guard, method string) {
	t.Helper()
	synctest.Wait()
	m := gatesOf(t, g, interceptors.Client, method)
	if m.ConcurrencyLimit.Streams != 1 || m.Counts.Admitted-m.Counts.Success-m.Counts.Failure-m.Counts.Neutral-m.Counts.Dropped != 1 {
		t.Errorf("%+v, %+v; want one stream in flight", *m.ConcurrencyLimit, m.Counts)
	}
}

func TestCase01_AbandonedUntilTheContextEnds(t *testing.T) {
	deadline := func(d time.Duration) func(ctx context.Context) (context.Context, context.CancelFunc) {
		return func(ctx context.Context) (context.Context, context.CancelFunc) { return context.WithTimeout(ctx, d) }
	}
	cases := []struct {
		name, blocks string
		context      func(context.Context) (context.Context, context.CancelFunc)
		cancel       bool
		want         ended
	}{
		{"cancelled", oneStream, context.WithCancel, true, ended{neutral: 1}},
		{"deadline", oneStream, deadline(time.Second), false, ended{failure: 1}},
		{"short deadline", oneStream, deadline(49 * time.Millisecond), false, ended{neutral: 1}},
		{"stream_timeout", oneStream + ", stream_timeout: 1s", context.WithCancel, false, ended{failure: 1}},
		{"cancelled before stream_timeout", oneStream + ", stream_timeout: 1s", context.WithCancel, true, ended{neutral: 1}},
	}
	for _, method := range []string{rpctest.Bidi, rpctest.ServerStream, rpctest.ClientStream} {
		for _, c := range cases {
			t.Run(method+" "+c.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					g, conn := clientStreams(t, c.blocks)
					ctx, cancel := c.context(t.Context())
					defer cancel()
					streamOpen(t, ctx, conn, method, "hang")
					wantHeld(t, g, method)
					if c.cancel {
						cancel()
					}
					pass(2 * time.Second)
					wantEnded(t, g, interceptors.Client, method, c.want)
				})
			})
		}
	}
}

func TestCase02_AbandonedUntilTheChannelIsClosed(t *testing.T) {
	for _, method := range []string{rpctest.Bidi, rpctest.ServerStream, rpctest.ClientStream} {
		t.Run(method, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, conn := clientStreams(t, oneStream)
				streamOpen(t, context.Background(), conn, method, "hang")
				wantHeld(t, g, method)
				if err := conn.Close(); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				wantEnded(t, g, interceptors.Client, method, ended{neutral: 1})
			})
		})
	}
}

func TestCase01_AbandonedUntilTheTimeoutOfTheServiceConfig(t *testing.T) {
	for _, method := range []string{rpctest.Bidi, rpctest.ServerStream, rpctest.ClientStream} {
		t.Run(method, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, conn := clientStreams(t, oneStream, grpc.WithDefaultServiceConfig(`{"methodConfig": [{"name": [{}], "timeout": "1s"}]}`))
				streamOpen(t, context.Background(), conn, method, "hang")
				pass(time.Second - 1)
				wantHeld(t, g, method)
				pass(1) // gRPC has a context of its own for this
				wantEnded(t, g, interceptors.Client, method, ended{failure: 1})
			})
		})
	}
}

func TestCase03_AbandonedForGoodIsSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, conn := clientStreams(t, oneStream)
		streamOpen(t, context.Background(), conn, rpctest.Bidi, "")
		time.Sleep(time.Hour)
		wantHeld(t, g, rpctest.Bidi)
		if _, err := rpctest.Open(t.Context(), conn, rpctest.Bidi); !errors.Is(err, interceptors.ErrConcurrencyLimited) {
			t.Errorf("%v, want a rejection: the place is taken", err)
		}
	})
}

func TestCase04_ServerHasEndedAndTheClientOnlySends(t *testing.T) {
	ends := map[string]struct {
		end  func(s grpc.ClientStream, cancel func())
		want ended
	}{
		"Recv":   {func(s grpc.ClientStream, _ func()) { _, _ = rpctest.Recv(s) }, ended{failure: 1}},
		"cancel": {func(_ grpc.ClientStream, cancel func()) { cancel() }, ended{neutral: 1}},
	}
	for name, e := range ends {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, conn := clientStreams(t, oneStream)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				s := streamOpen(t, ctx, conn, rpctest.Bidi, "UNAVAILABLE")
				if err := rpctest.Send(s, ""); err != io.EOF {
					t.Errorf("Send to a stream that has ended: %v, want io.EOF", err)
				}
				wantHeld(t, g, rpctest.Bidi)
				e.end(s, cancel)
				synctest.Wait()
				wantEnded(t, g, interceptors.Client, rpctest.Bidi, e.want)
			})
		})
	}
}

func TestCase05_OneAnswerEndsAClientStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, conn := clientStreams(t, oneStream)
		for range 3 {
			s := streamOpen(t, t.Context(), conn, rpctest.ClientStream, "")
			wantHeld(t, g, rpctest.ClientStream)
			if err := s.CloseSend(); err != nil {
				t.Fatal(err)
			}
			if text, err := rpctest.Recv(s); text != "bye" || err != nil {
				t.Fatal(text, err)
			}
		}
		wantEnded(t, g, interceptors.Client, rpctest.ClientStream, ended{success: 3})
	})
}

func TestCase06_TwoAnswersToAClientStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, "client: {rules: [{methods: ['*'], breaker: {}, concurrency_limit: {max_streams: 1}}]}")
		conn := rpctest.Start(t, script(), []grpc.ServerOption{grpc.UnknownServiceHandler(answerTwice)}, g.DialOptions())
		var again []grpc.ClientStream
		for range 3 {
			s, err := conn.NewStream(t.Context(), rpctest.StreamDesc(rpctest.ClientStream), twice)
			if err != nil {
				t.Fatal(err)
			}
			if err := rpctest.Send(s, ""); err != nil {
				t.Fatal(err)
			}
			if _, err := rpctest.Recv(s); status.Code(err) != codes.Internal {
				t.Fatalf("%v, want a cardinality violation", err)
			}
			again = append(again, s)
		}
		wantEnded(t, g, interceptors.Client, twice, ended{failure: 3})
		for _, s := range again {
			_, _ = rpctest.Recv(s) // returns when the handler does
		}
		wantEnded(t, g, interceptors.Client, twice, ended{failure: 3})
	})
}

func TestCase07_StreamThatCannotBeOpened(t *testing.T) {
	cases := []struct {
		name     string
		wait     bool
		deadline time.Duration
		cancel   bool
		want     ended
	}{
		{"no backend", false, time.Minute, false, ended{failure: 1}},
		{"deadline", true, time.Minute, false, ended{failure: 1}},
		{"cancelled", true, time.Minute, true, ended{neutral: 1}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := mustGuard(t, "client: {rules: [{methods: ['*'], "+oneStream+"}]}")
				conn, err := grpc.NewClient("passthrough:///nowhere", g.DialOptions(
					grpc.WithTransportCredentials(insecure.NewCredentials()),
					grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return nil, errors.New("nobody is there") }))...)
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = conn.Close() }()
				ctx, cancel := context.WithTimeout(t.Context(), c.deadline)
				defer cancel()
				if c.cancel {
					time.AfterFunc(time.Second, cancel)
				}
				finished := 0
				opts := []grpc.CallOption{grpc.WaitForReady(c.wait), grpc.OnFinish(func(error) { finished++ })}
				if _, err := rpctest.Open(ctx, conn, rpctest.Bidi, opts...); err == nil {
					t.Fatal("the stream was opened")
				}
				synctest.Wait()
				if finished == 0 {
					t.Error("gRPC did not call OnFinish: the test proves nothing")
				}
				wantEnded(t, g, interceptors.Client, rpctest.Bidi, c.want)
			})
		})
	}
}

// retrying opens a stream again, up to two times, when it fails before its first
// message.
func retrying(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	open := func() (grpc.ClientStream, error) { return streamer(ctx, desc, cc, method, opts...) }
	s, err := open()
	return &retriedStream{ClientStream: s, open: open}, err
}

type retriedStream struct {
	grpc.ClientStream
	open    func() (grpc.ClientStream, error)
	retries int
}

func (s *retriedStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	for ; status.Code(err) == codes.Unavailable && s.retries < 2; s.retries++ {
		if s.ClientStream, err = s.open(); err != nil {
			return err
		}
		err = s.ClientStream.RecvMsg(m)
	}
	return err
}

func TestCase07_InnerInterceptorRetries(t *testing.T) {
	cases := []struct {
		name     string
		failures int
		want     ended
	}{
		{"the third succeeds", 2, ended{success: 1}},
		{"all fail", 3, ended{failure: 1}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				attempts, finished := 0, 0
				flaky := &rpctest.Service{Stream: func(grpc.ServerStream) error {
					if attempts++; attempts <= c.failures {
						return status.Error(codes.Unavailable, "")
					}
					return nil
				}}
				g := mustGuard(t, "client: {rules: [{methods: ['*'], "+oneStream+"}]}")
				conn := rpctest.Start(t, flaky, nil, g.DialOptions(grpc.WithChainStreamInterceptor(retrying)))
				s, err := rpctest.Open(t.Context(), conn, rpctest.Bidi, grpc.OnFinish(func(error) { finished++ }))
				if err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				wantHeld(t, g, rpctest.Bidi)
				if _, err := rpctest.Recv(s); err == nil {
					t.Fatal("no error")
				}
				synctest.Wait()
				if attempts != 3 || finished != 3 {
					t.Errorf("%d attempts, %d OnFinish, want 3", attempts, finished)
				}
				wantEnded(t, g, interceptors.Client, rpctest.Bidi, c.want)
			})
		})
	}
}

func TestCase09_HeaderOfAStatusWithoutHeaders(t *testing.T) {
	cases := []struct {
		name, text string
		want       ended
	}{
		{"error", "UNAVAILABLE", ended{failure: 1}},
		{"not found", "NOT_FOUND", ended{success: 1}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, conn := clientStreams(t, oneStream)
				s := streamOpen(t, t.Context(), conn, rpctest.Bidi, c.text)
				if md, err := s.Header(); md != nil || err != nil {
					t.Fatalf("%v, %v; want nothing, the status is for Recv", md, err)
				}
				wantEnded(t, g, interceptors.Client, rpctest.Bidi, c.want) // gRPC holds nothing any more, nor do we
				for range 2 {
					if _, err := rpctest.Recv(s); err == nil {
						t.Error("no error")
					}
				}
				wantEnded(t, g, interceptors.Client, rpctest.Bidi, c.want)
			})
		})
	}
	t.Run("headers", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			g, conn := clientStreams(t, oneStream)
			s := streamOpen(t, t.Context(), conn, rpctest.Bidi, "")
			if md, err := s.Header(); md == nil || err != nil {
				t.Fatal(md, err)
			}
			wantHeld(t, g, rpctest.Bidi)
		})
	})
	t.Run("inner interceptor fails it", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			broken := func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
				s, err := streamer(ctx, desc, cc, method, opts...)
				return headerless{s}, err
			}
			g, conn := clientStreams(t, oneStream, grpc.WithChainStreamInterceptor(broken))
			s := streamOpen(t, t.Context(), conn, rpctest.Bidi, "")
			if _, err := s.Header(); err == nil {
				t.Fatal("no error")
			}
			wantEnded(t, g, interceptors.Client, rpctest.Bidi, ended{failure: 1})
		})
	})
}

type headerless struct{ grpc.ClientStream }

func (headerless) Header() (metadata.MD, error) { return nil, status.Error(codes.Internal, "") }

func TestCase09_RecvAfterTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, conn := clientStreams(t, oneStream)
		for _, text := range []string{"UNAVAILABLE", ""} {
			s := streamOpen(t, t.Context(), conn, rpctest.Bidi, text)
			_ = s.CloseSend()
			for range 5 {
				_, _ = rpctest.Recv(s)
			}
			_ = rpctest.Send(s, "")
			_, _ = s.Header()
		}
		wantEnded(t, g, interceptors.Client, rpctest.Bidi, ended{success: 1, failure: 1})
	})
}

func TestCase09_EverythingEndsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, conn := clientStreams(t, "breaker: {}, concurrency_limit: {max_streams: 1}, stream_timeout: 1s")
		const rounds = 300
		for i := range rounds {
			ctx, cancel := context.WithCancel(t.Context())
			s := streamOpen(t, ctx, conn, rpctest.Bidi, "1s UNAVAILABLE") // and the timeout at the same time
			var together sync.WaitGroup
			for _, end := range []func(){
				func() { _, _ = rpctest.Recv(s) },
				func() { time.Sleep(time.Second); _ = s.SendMsg("not a message") },
				func() { time.Sleep(time.Second); cancel() },
				func() { _, _ = s.Header() },
			} {
				together.Go(end)
			}
			together.Wait()
			synctest.Wait()
			if c := gatesOf(t, g, interceptors.Client, rpctest.Bidi).Counts; c.Success+c.Failure+c.Neutral+c.Dropped != uint64(i+1) {
				t.Fatalf("after %d streams: %+v", i+1, c)
			}
			checkIdle(t, g)
		}
	})
}

func TestStreamTimeoutIsGivenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var inner context.Context
		g, conn := clientStreams(t, oneStream+", stream_timeout: 1h", grpc.WithChainStreamInterceptor(
			func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
				inner = ctx
				return streamer(ctx, desc, cc, method, opts...)
			}))
		s := streamOpen(t, t.Context(), conn, rpctest.Bidi, "NOT_FOUND")
		if inner.Err() != nil {
			t.Error("the context has ended before the stream")
		}
		_, _ = rpctest.Recv(s)
		if inner.Err() == nil {
			t.Error("the stream has ended, but its context and timer have not")
		}
		checkIdle(t, g)
	})
}

func TestCallOptionsAreTheCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, "client: {rules: [{methods: ['*'], "+oneStream+"}]}")
		opts := make([]grpc.CallOption, 1, 2)
		_, _ = g.StreamClientInterceptor()(t.Context(), rpctest.StreamDesc(rpctest.Bidi), nil, rpctest.Bidi,
			func(_ context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, _ string, inner ...grpc.CallOption) (grpc.ClientStream, error) {
				if len(inner) != 2 {
					t.Errorf("%d options, want the caller's and ours", len(inner))
				}
				return nil, io.EOF
			}, opts...)
		if opts[:2][1] != nil {
			t.Error("ours was written into the caller's slice")
		}
	})
}
