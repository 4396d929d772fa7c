package limiter_test

import (
	"cmp"
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/limiter"
)

// line collects what becomes of calls that wait, inside a synctest bubble.
type line struct {
	*testing.T
	clock func() time.Duration
	ends  chan ending
}

type ending struct {
	call    int
	at      time.Duration
	verdict limiter.Verdict
}

func bubble(t *testing.T, f func(l *line)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		f(&line{t, func() time.Duration { return time.Since(start) }, make(chan ending, 2000)})
	})
}

// wait lets a call wait, and returns once it is in the queue or has ended.
func (l *line) wait(call int, f func() limiter.Verdict) {
	go func() {
		v := f()
		l.ends <- ending{call, l.clock(), v}
	}()
	synctest.Wait()
}

// sleep lets virtual time pass, and everything that it brings happen.
func (l *line) sleep(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// ended expects these endings since the last time, by time and then by call.
func (l *line) ended(want ...ending) {
	l.Helper()
	synctest.Wait()
	got := []ending{}
	for len(l.ends) > 0 {
		got = append(got, <-l.ends)
	}
	slices.SortStableFunc(got, func(a, b ending) int { return cmp.Or(cmp.Compare(a.at, b.at), a.call-b.call) })
	if !slices.Equal(got, want) {
		l.Fatalf("at %v: ended {call time verdict} %v, want %v", l.clock(), got, want)
	}
}

const (
	refused  = limiter.Refused
	admitted = limiter.Admitted
	timedOut = limiter.TimedOut
	ended    = limiter.Ended
)

func (l *line) bucketIs(b *limiter.Rate, available float64, waiting int) {
	l.Helper()
	synctest.Wait()
	if a, w := b.Stats(l.clock()); a != available || w != waiting {
		l.Fatalf("at %v: %v available, %d waiting, want %v, %d", l.clock(), a, w, available, waiting)
	}
}

func TestWaitInOrder(t *testing.T) {
	bubble(t, func(l *line) {
		b := limiter.NewBucket(10, 2, sec)
		takeAll(b, 0)
		for i := range 4 {
			l.wait(i, func() limiter.Verdict { return b.Wait(l.Context(), l.clock) })
		}
		l.bucketIs(b, 0, 4)
		if b.Idle(time.Hour) {
			l.Error("idle while calls wait")
		}
		if d := b.RetryAfter(0); d != 500*ms {
			l.Errorf("retry after %v, behind four", d)
		}
		l.sleep(100*ms - ns)
		l.ended()
		l.sleep(ns)
		l.ended(ending{0, 100 * ms, admitted})
		// Those who wait come first, at whatever time a newcomer asks.
		if b.Take(l.clock()) || b.Take(time.Hour) {
			l.Error("a newcomer overtook")
		}
		if d := b.RetryAfter(time.Hour); d != 200*ms {
			l.Errorf("retry after %v, behind three with two tokens there", d)
		}
		l.sleep(300 * ms)
		l.ended(ending{1, 200 * ms, admitted}, ending{2, 300 * ms, admitted}, ending{3, 400 * ms, admitted})
		l.bucketIs(b, 0, 0)
		l.sleep(100 * ms)
		if !b.Take(l.clock()) || b.Take(l.clock()) {
			l.Error("the bucket did not go on")
		}
	})
}

func TestWaitWithoutMaxWait(t *testing.T) {
	b := limiter.NewBucket(10, 1, 0) // even if a token came since Take
	if v := b.Wait(t.Context(), func() time.Duration { return 0 }); v != refused {
		t.Errorf("verdict %v", v)
	}
}

func TestWaitFindsAToken(t *testing.T) { // which came since Take
	bubble(t, func(l *line) {
		b := limiter.NewBucket(10, 1, sec)
		if d := b.RetryAfter(0); d != 1 {
			l.Errorf("retry after %v", d)
		}
		l.wait(0, func() limiter.Verdict { return b.Wait(l.Context(), l.clock) })
		l.ended(ending{0, 0, admitted})
		l.bucketIs(b, 0, 0)
	})
}

type panics struct{ context.Context }

func (panics) Deadline() (time.Time, bool) { panic("no deadline") }

func TestWaitWithAContextThatPanics(t *testing.T) {
	bubble(t, func(l *line) {
		b := limiter.NewBucket(10, 1, sec)
		takeAll(b, 0)
		func() {
			defer func() {
				if recover() == nil {
					l.Error("no panic")
				}
			}()
			b.Wait(panics{l.Context()}, l.clock)
		}()
		if b.Locked() {
			l.Fatal("the lock is held for ever")
		}
		l.bucketIs(b, 0, 0)
		l.wait(0, func() limiter.Verdict { return b.Wait(l.Context(), l.clock) })
		l.sleep(100 * ms)
		l.ended(ending{0, 100 * ms, admitted})
	})
}

// A thousand wait, and of those beyond the max wait each is refused at once.
func TestWaitThousand(t *testing.T) {
	bubble(t, func(l *line) {
		b := limiter.NewBucket(1000, 1, sec)
		takeAll(b, 0)
		for i := range 1010 {
			go func() {
				v := b.Wait(l.Context(), l.clock)
				l.ends <- ending{i, l.clock(), v}
			}()
			if i%100 == 0 || i > 990 {
				synctest.Wait()
			}
		}
		synctest.Wait()
		for range 10 {
			if e := <-l.ends; e.verdict != refused || e.at != 0 {
				l.Fatalf("%v, want refused at once", e)
			}
		}
		l.bucketIs(b, 0, 1000)
		for i := range 1000 {
			e := <-l.ends
			if e.verdict != admitted || e.at != time.Duration(i+1)*ms {
				l.Fatalf("%d. %v", i, e)
			}
		}
		l.bucketIs(b, 0, 0)
	})
}

func TestCase19_WaiterCancelled(t *testing.T) {
	for _, tt := range []struct {
		name   string
		cancel int
		want   []ending
	}{
		{"head", 0, []ending{{0, 50 * ms, ended}, {1, 100 * ms, admitted}, {2, 200 * ms, admitted}}},
		{"middle", 1, []ending{{1, 50 * ms, ended}, {0, 100 * ms, admitted}, {2, 200 * ms, admitted}}},
		{"last", 2, []ending{{2, 50 * ms, ended}, {0, 100 * ms, admitted}, {1, 200 * ms, admitted}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bubble(t, func(l *line) {
				b := limiter.NewBucket(10, 1, sec)
				takeAll(b, 0)
				ctx, cancel := context.WithCancel(l.Context())
				for i := range 3 {
					c := l.Context()
					if i == tt.cancel {
						c = ctx
					}
					l.wait(i, func() limiter.Verdict { return b.Wait(c, l.clock) })
				}
				l.sleep(50 * ms)
				cancel()
				l.bucketIs(b, 0.5, 2) // at once, and nothing is spent
				l.sleep(250 * ms)
				l.ended(tt.want...)
				if !b.Idle(l.clock()) {
					l.Error("a token is lost")
				}
			})
		})
	}
}

// The head is cancelled at the very time of its turn: either it is admitted, or
// its token is the next one's.
func TestCase19_CancelledAtItsTurn(t *testing.T) {
	for range 100 {
		bubble(t, func(l *line) {
			b := limiter.NewBucket(10, 1, sec)
			takeAll(b, 0)
			ctx, cancel := context.WithCancel(l.Context())
			time.AfterFunc(100*ms, cancel)
			l.wait(0, func() limiter.Verdict { return b.Wait(ctx, l.clock) })
			l.wait(1, func() limiter.Verdict { return b.Wait(l.Context(), l.clock) })
			l.sleep(sec)
			first, second := <-l.ends, <-l.ends
			if first.call == 1 { // it was faster to tell
				first, second = second, first
			}
			want := ending{1, 200 * ms, admitted}
			if first.verdict == ended {
				want.at = 100 * ms
			}
			if first.call != 0 || first.at != 100*ms || second != want {
				l.Fatalf("%v, then %v", first, second)
			}
		})
	}
}

func TestCase20_DeadlineSoonerThanTheTurn(t *testing.T) {
	bubble(t, func(l *line) {
		b := limiter.NewBucket(10, 1, sec)
		takeAll(b, 0)
		l.sleep(10 * ms)
		before := b.RetryAfter(l.clock())
		short, cancel := context.WithTimeout(l.Context(), 90*ms-ns)
		defer cancel()
		l.wait(0, func() limiter.Verdict { return b.Wait(short, l.clock) })
		l.ended(ending{0, 10 * ms, refused})
		if after := b.RetryAfter(l.clock()); after != before || after != 90*ms {
			l.Errorf("retry after %v, then %v", before, after)
		}
		// Behind another, its own turn is what counts.
		l.wait(1, func() limiter.Verdict { return b.Wait(l.Context(), l.clock) })
		medium, cancel := context.WithTimeout(l.Context(), 190*ms-ns)
		defer cancel()
		l.wait(2, func() limiter.Verdict { return b.Wait(medium, l.clock) })
		long, cancel := context.WithTimeout(l.Context(), 191*ms)
		defer cancel()
		l.wait(3, func() limiter.Verdict { return b.Wait(long, l.clock) })
		l.sleep(sec)
		l.ended(ending{2, 10 * ms, refused}, ending{1, 100 * ms, admitted}, ending{3, 200 * ms, admitted})
	})
}

func TestCase20_TurnLaterThanMaxWait(t *testing.T) {
	bubble(t, func(l *line) {
		b := limiter.NewBucket(10, 1, 200*ms)
		takeAll(b, 0)
		for i := range 3 {
			l.wait(i, func() limiter.Verdict { return b.Wait(l.Context(), l.clock) })
		}
		l.sleep(sec)
		l.ended(ending{2, 0, refused}, ending{0, 100 * ms, admitted}, ending{1, 200 * ms, admitted})
		for b.Take(l.clock()) {
		}
		l.sleep(50 * ms) // a part of the time to the next token has passed
		for i := range 3 {
			l.wait(i, func() limiter.Verdict { return b.Wait(l.Context(), l.clock) })
		}
		l.sleep(sec)
		l.ended(ending{2, 1050 * ms, refused}, ending{0, 1100 * ms, admitted}, ending{1, 1200 * ms, admitted})
	})
}

func TestCase08_ContextAlreadyDone(t *testing.T) {
	bubble(t, func(l *line) {
		ctx, cancel := context.WithCancel(l.Context())
		cancel()
		b := limiter.NewBucket(10, 1, sec)
		if v := b.Wait(ctx, l.clock); v != ended {
			l.Errorf("bucket: %v", v)
		}
		expired, cancel := context.WithDeadline(l.Context(), time.Now().Add(-sec))
		defer cancel()
		if v := b.Wait(expired, l.clock); v != ended {
			l.Errorf("bucket: %v", v)
		}
		l.bucketIs(b, 1, 0)
		s := limiter.NewSemaphore(1, 1, sec)
		if v := s.Acquire(ctx); v != ended {
			l.Errorf("semaphore: %v", v)
		}
		if n, _ := s.Stats(); n != 0 {
			l.Errorf("%d in flight", n)
		}
	})
}

// A call that saw an empty queue is slow to take, and finds the token before
// the head does: the head waits for the next, as long as it may.
func TestHeadFindsItsTokenTaken(t *testing.T) {
	for _, tt := range []struct {
		maxWait time.Duration
		want    ending
	}{
		{sec, ending{0, 200 * ms, admitted}},
		{200 * ms, ending{0, 200 * ms, admitted}},
		{200*ms - ns, ending{0, 100 * ms, timedOut}},
	} {
		bubble(t, func(l *line) {
			b := limiter.NewBucket(10, 1, tt.maxWait)
			takeAll(b, 0)
			var stolen bool
			clock := func() time.Duration { // asked by the head at its turn
				if l.clock() == 100*ms && !stolen {
					stolen = true
					b.TakeAsIfNobodyWaited(100 * ms)
				}
				return l.clock()
			}
			l.wait(0, func() limiter.Verdict { return b.Wait(l.Context(), clock) })
			l.sleep(sec)
			l.ended(tt.want)
			l.bucketIs(b, 1, 0)
		})
	}
}

// A head that gives up in time leaves the others theirs.
func TestTimedOutHeadLetsTheNextIn(t *testing.T) {
	bubble(t, func(l *line) {
		b := limiter.NewBucket(10, 1, 200*ms)
		takeAll(b, 0)
		l.wait(0, func() limiter.Verdict { return b.Wait(l.Context(), l.clock) })
		l.sleep(50 * ms)
		l.wait(1, func() limiter.Verdict { return b.Wait(l.Context(), l.clock) })
		b.TakeAsIfNobodyWaited(100 * ms) // 0 finds a token at 200ms, 1 at 300ms
		b.TakeAsIfNobodyWaited(200 * ms) // 0 at 300ms: too late; 1 at 300ms: too late
		l.sleep(sec)
		l.ended(ending{0, 100 * ms, timedOut}, ending{1, 100 * ms, timedOut})
		l.bucketIs(b, 1, 0)
	})
}

// The delay of a timer is made up for, up to one call.
func TestLateTimers(t *testing.T) {
	for _, tt := range []struct {
		late time.Duration
		want []ending
	}{
		{99 * ms, []ending{{0, 199 * ms, admitted}, {1, 200 * ms, admitted}, {2, 300 * ms, admitted}}},
		{100 * ms, []ending{{0, 200 * ms, admitted}, {1, 200 * ms, admitted}, {2, 300 * ms, admitted}}},
		{150 * ms, []ending{{0, 250 * ms, admitted}, {1, 250 * ms, admitted}, {2, 350 * ms, admitted}}},
		{250 * ms, []ending{{0, 350 * ms, admitted}, {1, 350 * ms, admitted}, {2, 450 * ms, admitted}}},
	} {
		bubble(t, func(l *line) {
			b := limiter.NewBucket(10, 1, sec)
			takeAll(b, 0)
			clock := func() time.Duration {
				if l.clock() == 100*ms {
					time.Sleep(tt.late)
				}
				return l.clock()
			}
			for i := range 3 {
				l.wait(i, func() limiter.Verdict { return b.Wait(l.Context(), clock) })
			}
			l.sleep(sec)
			l.ended(tt.want...)
		})
	}
}
