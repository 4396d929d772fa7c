package interceptors_test

import (
	"context"
	"errors"
	"io"
	"runtime"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// neverHystrix does not open, has one place, and finds any deadline too short to
// judge by.
const neverHystrix = "breaker: {engine: hystrix, request_volume_threshold: 1000000, min_deadline: 1h}, concurrency_limit: {max_in_flight: 1, max_streams: 1}"

// streamArms are the kinds of stream on the client.
var streamArms = []arm{
	{"bidi", "client", rpctest.Bidi},
	{"server stream", "client", rpctest.ServerStream},
	{"client stream", "client", rpctest.ClientStream},
}

// open opens a stream and sends a text, until one is admitted: a deadline may pass
// before.
func (r *rig) open(begin func() (context.Context, context.CancelFunc), text string) (grpc.ClientStream, context.CancelFunc) {
	r.t.Helper()
	var s grpc.ClientStream
	var cancel context.CancelFunc
	before := r.snapshot().Counts.Admitted
	eventually(r.t, "a stream is admitted", func() bool {
		var ctx context.Context
		ctx, cancel = begin()
		var err error
		if s, err = rpctest.Open(ctx, r.conn, r.method); err == nil {
			_ = rpctest.Send(s, text)
		}
		if r.snapshot().Counts.Admitted > before {
			return true
		}
		cancel()
		return false
	})
	r.t.Cleanup(cancel)
	return s, cancel
}

func (r *rig) cancelled() (context.Context, context.CancelFunc) {
	return context.WithCancel(context.Background())
}

func TestCase01_HystrixAbandonedUntilTheContextEnds(t *testing.T) {
	t.Parallel()
	const timeout = neverHystrix + ", stream_timeout: 30ms"
	soon := func() (context.Context, context.CancelFunc) {
		return context.WithTimeout(context.Background(), 30*time.Millisecond)
	}
	forGood := func() (context.Context, context.CancelFunc) { return context.Background(), func() {} }
	config := grpc.WithDefaultServiceConfig(`{"methodConfig": [{"name": [{}], "timeout": "0.030s"}]}`)
	cases := []struct {
		name, blocks string
		begin        func() (context.Context, context.CancelFunc) // nil: to be cancelled
		dial         []grpc.DialOption
		ended        ended
		words        words
	}{
		{"cancelled", neverHystrix, nil, nil, ended{neutral: 1}, words{cancelled: 1}},
		{"short deadline", neverHystrix, soon, nil, ended{neutral: 1}, words{expired: 1}},
		{"stream_timeout", timeout, forGood, nil, ended{failure: 1}, words{timeout: 1}},
		{"timeout of the service config", neverHystrix, forGood, []grpc.DialOption{config}, ended{failure: 1}, words{timeout: 1}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			onHystrixArms(t, streamArms, func(t *testing.T, a arm) {
				r := newRig(t, a, c.blocks, script(), c.dial...)
				if c.begin == nil {
					_, cancel := r.open(r.cancelled, "hang")
					if l := r.snapshot().ConcurrencyLimit; l.Streams != 1 {
						t.Errorf("%+v, want one stream", *l)
					}
					cancel()
				} else {
					r.open(c.begin, "hang")
				}
				r.ended(c.ended)
				r.heard(c.words)
			})
		})
	}
}

func TestCase02And03_HystrixAbandonedUntilTheChannelIsClosed(t *testing.T) {
	t.Parallel()
	onHystrixArms(t, streamArms, func(t *testing.T, a arm) {
		r := newRig(t, a, neverHystrix, script())
		r.open(func() (context.Context, context.CancelFunc) { return context.Background(), func() {} }, "hang")
		if _, err := rpctest.Open(t.Context(), r.conn, a.method); !errors.Is(err, interceptors.ErrConcurrencyLimited) {
			t.Errorf("%v, want a rejection: the place is taken", err)
		}
		r.heard(words{}) // a rejection of ours would be an error to hystrix-go
		if err := r.conn.Close(); err != nil {
			t.Fatal(err)
		}
		r.ended(ended{neutral: 1})
		r.heard(words{none: 1})
	})
}

func TestCase04_HystrixServerHasEndedAndTheClientOnlySends(t *testing.T) {
	t.Parallel()
	ends := map[string]struct {
		end   func(s grpc.ClientStream, cancel func())
		ended ended
		words words
	}{
		"Recv":   {func(s grpc.ClientStream, _ func()) { _, _ = rpctest.Recv(s) }, ended{failure: 1}, words{failure: 1}},
		"cancel": {func(_ grpc.ClientStream, cancel func()) { cancel() }, ended{neutral: 1}, words{cancelled: 1}},
	}
	for name, e := range ends {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, streamArms[0], neverHystrix, script())
			s, cancel := r.open(r.cancelled, "UNAVAILABLE")
			eventually(t, "the server has ended", func() bool { return rpctest.Send(s, "") == io.EOF })
			r.heard(words{})
			e.end(s, cancel)
			r.ended(e.ended)
			r.heard(e.words)
		})
	}
}

func TestCase05_HystrixOneAnswerEndsAClientStream(t *testing.T) {
	t.Parallel()
	r := newRig(t, streamArms[2], neverHystrix, script())
	for range 3 {
		s, _ := r.open(r.cancelled, "")
		if err := s.CloseSend(); err != nil {
			t.Fatal(err)
		}
		if text, err := rpctest.Recv(s); text != "bye" || err != nil {
			t.Fatal(text, err)
		}
	}
	r.ended(ended{success: 3})
	r.heard(words{success: 3})
}

func TestCase06_HystrixTwoAnswers(t *testing.T) {
	t.Parallel()
	answerTwice := func(_ any, ss grpc.ServerStream) error {
		_, _ = rpctest.Recv(ss)
		_ = rpctest.Send(ss, "answer")
		_ = rpctest.Send(ss, "answer")
		<-ss.Context().Done() // no status
		return nil
	}
	for _, kind := range []string{"unary", "client stream"} {
		t.Run(kind, func(t *testing.T) {
			r := useRig(t, arm{kind, "client", twice}, neverHystrix)
			r.conn = rpctest.Start(t, script(), []grpc.ServerOption{grpc.UnknownServiceHandler(answerTwice)}, r.guard.DialOptions())
			for range 3 {
				var err error
				if kind == "unary" {
					_, err = rpctest.Call(t.Context(), r.conn, twice, "")
				} else {
					var s grpc.ClientStream
					if s, err = r.conn.NewStream(t.Context(), rpctest.StreamDesc(rpctest.ClientStream), twice); err != nil {
						t.Fatal(err)
					}
					_ = rpctest.Send(s, "")
					_, err = rpctest.Recv(s)
				}
				if status.Code(err) != codes.Internal {
					t.Fatalf("%v, want a cardinality violation", err)
				}
			}
			r.ended(ended{failure: 3})
			r.heard(words{failure: 3})
		})
	}
}

func TestCase07_HystrixStreamThatCannotBeOpened(t *testing.T) {
	t.Parallel()
	lis := rpctest.Listen()
	if err := lis.Close(); err != nil {
		t.Fatal(err)
	}
	r := useRig(t, streamArms[0], neverHystrix)
	r.conn = rpctest.Dial(t, lis, r.guard.DialOptions()...)
	if _, err := rpctest.Open(t.Context(), r.conn, r.method); status.Code(err) != codes.Unavailable {
		t.Fatalf("%v, want UNAVAILABLE", err)
	}
	r.heard(words{failure: 1})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	opening := make(chan error)
	before := r.snapshot().Counts.Admitted
	go func() {
		_, err := rpctest.Open(ctx, r.conn, r.method, grpc.WaitForReady(true))
		opening <- err
	}()
	eventually(t, "the stream is admitted", func() bool { return r.snapshot().Counts.Admitted > before })
	cancel()
	if err := <-opening; status.Code(err) != codes.Canceled {
		t.Fatalf("%v, want CANCELLED", err)
	}
	r.ended(ended{failure: 1, neutral: 1})
	r.heard(words{failure: 1, cancelled: 1})
}

func TestCase07_HystrixInnerInterceptorRetries(t *testing.T) {
	t.Parallel()
	for failures, want := range map[int]words{2: {success: 1}, 3: {failure: 1}} {
		attempts := 0 // one after the other
		flaky := &rpctest.Service{Stream: func(grpc.ServerStream) error {
			if attempts++; attempts <= failures {
				return status.Error(codes.Unavailable, "")
			}
			return nil
		}}
		r := useRig(t, streamArms[0], neverHystrix+" # retried "+map[int]string{2: "well", 3: "badly"}[failures])
		r.conn = rpctest.Start(t, flaky, nil, r.guard.DialOptions(grpc.WithChainStreamInterceptor(retrying)))
		s, err := rpctest.Open(t.Context(), r.conn, r.method)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := rpctest.Recv(s); err == nil {
			t.Fatal("no error")
		}
		if attempts != 3 {
			t.Errorf("%d attempts, want 3", attempts)
		}
		r.heard(want)
		r.ended(ended{success: uint64(want.success), failure: uint64(want.failure)})
	}
}

func TestCase08_HystrixContextThatHasEnded(t *testing.T) {
	t.Parallel()
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		r := handRig(t, a, strictHystrix)
		r.fresh()
		r.trip()
		before := r.snapshot().Counts
		cancelled, cancel := context.WithCancel(t.Context())
		cancel()
		expired, cancel := context.WithTimeout(t.Context(), 0)
		defer cancel()
		r.wake() // the next call is a probe
		for ctx, want := range map[context.Context]codes.Code{cancelled: codes.Canceled, expired: codes.DeadlineExceeded} {
			err := r.byHand(ctx, r.guard.Guard, func(context.Context) error { t.Error("the call was made"); return nil })
			if status.Code(err) != want {
				t.Errorf("%v, want %v", err, want)
			}
		}
		r.is("open")
		if c := r.snapshot().Counts; c.Admitted != before.Admitted || c.Rejected[interceptors.ReasonBreakerOpen] != before.Rejected[interceptors.ReasonBreakerOpen] {
			t.Errorf("counted: %+v, before %+v", c, before)
		}
		r.heard(words{failure: 1})
		r.heal()
		r.heard(words{success: 1})
		r.ended(ended{success: 1, failure: 1})
	})
}

func TestCase09_HystrixHeaderAndRecvAfterTheEnd(t *testing.T) {
	t.Parallel()
	r := newRig(t, streamArms[0], neverHystrix, script())
	for _, text := range []string{"UNAVAILABLE", "NOT_FOUND"} {
		s, _ := r.open(r.cancelled, text)
		if md, err := s.Header(); md != nil || err != nil {
			t.Fatalf("%v, %v; want nothing, the status is for Recv", md, err)
		}
		for range 3 {
			if _, err := rpctest.Recv(s); err == nil {
				t.Error("no error")
			}
		}
		_ = rpctest.Send(s, "")
		_, _ = s.Header()
	}
	r.ended(ended{success: 1, failure: 1})
	r.heard(words{success: 1, failure: 1})
}

func TestCase09_HystrixEverythingEndsAtOnce(t *testing.T) {
	t.Parallel()
	r := newRig(t, streamArms[0], neverHystrix, script())
	const rounds = 50
	for range rounds {
		word, release := holdWord(t)
		s, cancel := r.open(r.cancelled, word+" NOT_FOUND")
		var together sync.WaitGroup
		for _, end := range []func(){
			release,
			cancel,
			func() { _, _ = rpctest.Recv(s) },
			func() { _ = s.SendMsg("not a message") },
			func() { _, _ = s.Header() },
		} {
			together.Go(end)
		}
		together.Wait()
	}
	eventually(t, "every stream has ended", func() bool {
		c := r.snapshot().Counts
		return c.Success+c.Failure+c.Neutral+c.Dropped == c.Admitted
	})
	checkIdle(t, r.guard.Guard)
	eventually(t, "each is heard of", func() bool { return r.told().words.sum() >= r.words.sum()+rounds })
	if w := r.told().words.plus(r.words, -1); w.sum() != rounds || w.failure != 0 || w.timeout != 0 {
		t.Errorf("%+v, want %d", w, rounds)
	}
}

func TestCase10_HystrixWaitForReadyDoesNotWaitForTheBreaker(t *testing.T) {
	t.Parallel()
	onHystrixArms(t, arms[:2], func(t *testing.T, a arm) {
		r := newRig(t, a, strictHystrix, script())
		r.fresh()
		r.trip()
		err := r.call(t.Context(), r.conn, "", grpc.WaitForReady(true))
		if !errors.Is(err, interceptors.ErrBreakerOpen) {
			t.Errorf("%v, want a rejection by the breaker", err)
		}
		if after := retryInfo(err); after <= 0 || after > time.Hour {
			t.Errorf("a retry has a chance in %v, the sleep window is an hour", after)
		}
		r.heard(words{failure: 1})
		r.ended(ended{failure: 1})
	})
}

func TestCase10_HystrixWaitForReadyWithoutBackend(t *testing.T) {
	t.Parallel()
	lis := rpctest.Listen()
	if err := lis.Close(); err != nil {
		t.Fatal(err)
	}
	onHystrixArms(t, arms[:2], func(t *testing.T, a arm) {
		r := useRig(t, a, neverHystrix)
		r.conn = rpctest.Dial(t, lis, r.guard.DialOptions()...)
		eventually(t, "a call waits for its deadline", func() bool { // which may come sooner than the call
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			if err := r.call(ctx, r.conn, "", grpc.WaitForReady(true)); status.Code(err) != codes.DeadlineExceeded {
				t.Fatalf("%v, want DEADLINE_EXCEEDED", err)
			}
			return r.snapshot().Counts.Admitted > r.counts.Admitted
		})
		r.ended(ended{neutral: 1})
		r.heard(words{expired: 1})
	})
}

func TestCase17_HystrixFurtherInBlowsUp(t *testing.T) {
	t.Parallel()
	for name, blowUp := range blowUps {
		t.Run(name, func(t *testing.T) {
			onHystrixArms(t, arms, func(t *testing.T, a arm) {
				r := handRig(t, a, strictHystrix)
				r.fresh()
				boom := func() {
					_ = a.byHand(t.Context(), r.guard.Guard, func(context.Context) error { blowUp(); return nil })
				}
				survive(boom)
				r.heard(words{success: 0, failure: 1})
				eventually(t, "it opens", func() bool { return r.state() == "open" })
				r.wake()
				eventually(t, "a probe blows up", func() bool {
					survive(boom)
					return r.snapshot().Counts.Failure-r.counts.Failure == 2
				})
				r.doze()
				r.is("open")
				r.heard(words{failure: 2})
				r.heal()
				r.ended(ended{success: 1, failure: 2})
			})
		})
	}
}

func TestCase17_HystrixStreamFurtherInBlowsUp(t *testing.T) {
	t.Parallel()
	for _, method := range []string{"open", "RecvMsg", "SendMsg", "Header"} {
		for name, blowUp := range blowUps {
			t.Run(method+" "+name, func(t *testing.T) {
				r := handRig(t, streamArms[0], neverHystrix)
				mined := &minedStream{method: method, blowUp: blowUp}
				survive(func() {
					s, err := r.guard.StreamClientInterceptor()(context.Background(), rpctest.StreamDesc(rpctest.Bidi), nil, rpctest.Bidi,
						func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, ...grpc.CallOption) (grpc.ClientStream, error) {
							return mined, mined.mine("open")
						})
					if err != nil {
						t.Error(err)
					}
					_ = s.RecvMsg(nil)
					_ = s.SendMsg(nil)
					_, _ = s.Header()
				})
				r.ended(ended{failure: 1})
				r.heard(words{failure: 1})
			})
		}
	}
}

func TestCase17_HystrixCallbacksBlowUp(t *testing.T) {
	t.Parallel()
	goexit := func() error { runtime.Goexit(); return nil }
	boom := func() error { panic("boom") }
	onHystrixArms(t, arms, func(t *testing.T, a arm) {
		r := handRig(t, a, "breaker: {engine: hystrix, request_volume_threshold: 4, sleep_window: 1h}, rate_limit: {external: mine}, concurrency_limit: {max_in_flight: 1, max_streams: 1}")
		call := func(text string) { survive(func() { _ = r.do(t.Context(), text) }) }
		r.fresh()
		for _, limit := range []func() error{boom, goexit} {
			r.guard.limit.Store(&limit)
			call("") // what panics admits, what exits has not made the call
		}
		r.guard.limit.Store(nil)
		for _, classify := range []func() error{boom, goexit} {
			f := func() interceptors.Outcome { _ = classify(); return interceptors.Success }
			r.guard.classify.Store(&f)
			call("NOT_FOUND") // the status decides; what exits is a failure
		}
		r.guard.classify.Store(nil)
		r.ended(ended{success: 2, failure: 1})
		r.heard(words{success: 2, failure: 1})

		// The log blows up at each transition.
		for name, blowUp := range map[string]func() error{"panic": boom, "Goexit": goexit} {
			log := func(string) { _ = blowUp() }
			r.fresh()
			r.guard.log.Store(&log)
			for range 3 { // Goexit would come through
				call("UNAVAILABLE")
			}
			eventually(t, "it opens", func() (open bool) {
				survive(func() { open = r.state() == "open" })
				return open
			})
			r.heard(words{failure: 3})
			r.wake()
			before := r.snapshot().Counts.Admitted
			eventually(t, "it closes", func() (closed bool) {
				call("") // with Goexit the first probe is not made: it costs a sleep window
				survive(func() { closed = r.state() == "closed" })
				return closed
			})
			r.doze()
			r.guard.log.Store(nil)
			r.closed()
			r.heard(words{success: 1})
			if n := r.snapshot().Counts.Admitted - before; n != 1 {
				t.Errorf("%s: %d probes were made, want 1", name, n)
			}
			r.ended(ended{success: 1, failure: 3})
		}
	})
}
