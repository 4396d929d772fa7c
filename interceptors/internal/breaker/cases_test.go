package breaker_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
)

func TestCase11_ProbeCancelledByItsCaller(t *testing.T) {
	play(t, config(),
		calls(0, 20, failure), begin(5*sec, "a"), reject(6*sec, 4*sec),
		end(6*sec, "a", ignored), begin(6*sec, "b"), reject(6*sec, 5*sec),
		end(6*sec, "b", success), is(6*sec, closed, 0, 0))
}

func TestCase12_ProbeThatNeverEnds(t *testing.T) {
	play(t, config(),
		calls(0, 20, failure), begin(5*sec, "stream"),
		begin(10*sec, "b"), begin(20*sec, "c"), // it cannot wedge the breaker
		end(21*sec, "c", success), is(21*sec, closed, 0, 0))
}

func TestCase12_ServerSlowerThanTheLease(t *testing.T) {
	steps := []step{calls(0, 20, failure)}
	for i := range 20 { // each call takes 100s, four times what the breaker remembers
		steps = append(steps, func(r *run) {
			at := 5*sec + time.Duration(i)*5*sec
			if ticket, _, ok := r.acquire(at); ok {
				r.calls[fmt.Sprint(i)] = ticket
			}
		})
	}
	steps = append(steps, is(100*sec, halfOpen, 0, 0), end(105*sec, "0", success), is(105*sec, closed, 0, 0))
	play(t, config(), steps...)
}

func TestCase13_ProbeRejectedByALaterGate(t *testing.T) {
	play(t, config(),
		calls(0, 20, failure), saw("closed>open error_percent"),
		calls(5*sec, 100, ignored), is(5*sec, halfOpen, 0, 0), saw("open>half_open sleep_window"))
}

func TestCase14_ResultsOfAnEarlierState(t *testing.T) {
	play(t, config(),
		begin(0, "closed1"), begin(0, "closed2"), begin(0, "closed3"), begin(0, "closed4"),
		calls(0, 20, failure), saw("closed>open error_percent"),
		end(1*sec, "closed1", success), is(1*sec, open, 0, 0),
		begin(5*sec, "probe1"), end(5*sec, "closed2", success), end(5*sec, "closed3", failure), is(5*sec, halfOpen, 0, 0),
		begin(10*sec, "probe2"), end(10*sec, "probe2", failure), is(10*sec, open, 0, 0),
		end(11*sec, "probe1", success), is(11*sec, open, 0, 0),
		begin(15*sec, "probe3"), end(15*sec, "probe1", success), is(15*sec, halfOpen, 0, 0),
		end(15*sec, "probe3", success), is(15*sec, closed, 0, 0),
		end(16*sec, "closed4", failure), is(16*sec, closed, 0, 0))

	// Enough old failures to open, were they counted.
	late := []step{}
	for i := range 20 {
		late = append(late, begin(0, fmt.Sprint(i)))
	}
	late = append(late, calls(0, 20, failure), calls(5*sec, 1, success), saw("closed>open error_percent", "open>half_open sleep_window", "half_open>closed probe_success"))
	for i := range 20 {
		late = append(late, end(5*sec, fmt.Sprint(i), failure))
	}
	play(t, config(), append(late, is(5*sec, closed, 0, 0), saw())...)
}

func TestCase18_EdgesOfTheWindow(t *testing.T) {
	for _, start := range []time.Duration{0, 3 * time.Hour, 400 * 24 * time.Hour} {
		t.Run(start.String(), func(t *testing.T) {
			play(t, config(),
				calls(start+1*sec-ns, 10, failure), is(start+10*sec-ns, closed, 10, 10), is(start+10*sec, closed, 0, 0))
			play(t, config(),
				calls(start+1*sec-ns, 10, failure), calls(start+10*sec-ns, 10, failure), is(start+10*sec, open, 0, 0))
			play(t, config(),
				calls(start+1*sec-ns, 10, failure), calls(start+10*sec, 19, failure), is(start+10*sec, closed, 19, 19))
		})
	}
	t.Run("begin a bucket", func(t *testing.T) {
		play(t, config(), calls(1*sec, 10, failure), is(11*sec-ns, closed, 10, 10), is(11*sec, closed, 0, 0))
		play(t, config(), calls(1*sec-ns, 10, failure), calls(1*sec, 5, failure), is(10*sec, closed, 5, 5), is(11*sec, closed, 0, 0))
	})
	t.Run("after a closing", func(t *testing.T) { // the window begins where the period does
		at := 7300 * time.Millisecond
		play(t, config(),
			calls(0, 20, failure), begin(at, "probe"), end(at, "probe", success),
			calls(at+1*sec-ns, 10, failure), is(at+10*sec-ns, closed, 10, 10), is(at+10*sec, closed, 0, 0))
	})
	t.Run("of a window that does not divide by ten", func(t *testing.T) {
		cfg := config()
		cfg.Window = 101 * ns // eleven each
		play(t, cfg, calls(0, 10, failure), is(109, closed, 10, 10), is(110, closed, 0, 0))
	})
}

func TestCase18_Idle(t *testing.T) {
	for _, pause := range []time.Duration{10 * sec, 11 * sec, 19 * sec, 20 * sec, time.Hour, 1000 * time.Hour} {
		play(t, config(),
			is(0, closed, 0, 0),
			calls(0, 5, success), calls(3*sec, 5, failure), calls(9*sec, 8, failure), is(9*sec, closed, 18, 13),
			is(9*sec+pause, closed, 0, 0), calls(9*sec+pause, 19, failure), is(9*sec+pause, closed, 19, 19), saw())
	}
	// Every bucket is emptied before it is used again.
	steps := []step{}
	for at := time.Duration(0); at < 50*sec; at += sec {
		steps = append(steps, calls(at, 1, success), is(at, closed, min(10, int(at/sec)+1), 0))
	}
	play(t, config(), steps...)
	// Two of ten buckets stay.
	play(t, config(), calls(0, 3, success), calls(1*sec, 5, success), calls(2*sec, 7, failure), is(10*sec, closed, 12, 7), is(11*sec, closed, 7, 7))
	// A success that follows an idle window does not find old failures.
	play(t, config(), calls(0, 19, failure), begin(0, "a"), end(12*sec, "a", success), is(12*sec, closed, 1, 0))
	// Open for hours.
	play(t, config(), calls(0, 20, failure), begin(100*time.Hour, "probe"), begin(200*time.Hour, "probe2"), end(300*time.Hour, "probe", success), is(300*time.Hour, closed, 0, 0))
}

func TestCase18_TimeGoesBackwards(t *testing.T) {
	t.Run("closed", func(t *testing.T) { // late results count, and count now
		play(t, config(),
			calls(100*sec, 10, failure), calls(50*sec, 5, failure), calls(-7*time.Hour, 4, failure), is(100*sec, closed, 19, 19),
			is(0, closed, 19, 19), is(109*sec, closed, 19, 19), is(110*sec, closed, 0, 0))
		play(t, config(), calls(100*sec, 10, failure), calls(50*sec, 10, failure), saw("closed>open error_percent"))
	})
	t.Run("open", func(t *testing.T) { // never rejects with more than the sleep window
		play(t, config(), calls(100*sec, 20, failure), reject(0, 5*sec), reject(-time.Hour, 5*sec), reject(102*sec, 3*sec), begin(105*sec, "probe"))
	})
	t.Run("half-open", func(t *testing.T) {
		play(t, config(),
			calls(100*sec, 20, failure), begin(105*sec, "a"), reject(50*sec, 5*sec), reject(106*sec, 4*sec),
			begin(110*sec, "b"), reject(50*sec, 10*sec),
			end(50*sec, "b", failure), // opened no earlier than half-open began
			reject(105*sec, 5*sec), begin(110*sec, "c"), end(10*sec, "c", success), is(110*sec, closed, 0, 0),
			calls(110*sec, 19, failure), is(110*sec, closed, 19, 19))
	})
}

func TestCase17_CallbackPanics(t *testing.T) {
	w := breaker.New(config(), func(breaker.Transition) { panic("user") })
	fails := 0
	for range 20 {
		func() {
			defer func() {
				if recover() != nil {
					fails++
				}
			}()
			ticket, _, _ := w.Acquire(0)
			w.Done(ticket, 0, failure, false)
		}()
	}
	if got := w.Stats(0); fails != 1 || got.State != open {
		t.Errorf("%d panics, %+v", fails, got)
	}
}
