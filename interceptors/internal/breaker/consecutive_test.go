package breaker_test

import (
	"testing"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
)

// Failures in a row open the breaker whatever the volume; a success between begins anew.
func TestConsecutiveFailuresOpen(t *testing.T) {
	cfg := config()
	cfg.Consecutive = 3
	var got []breaker.Transition
	w := breaker.New(cfg, func(tr breaker.Transition) { got = append(got, tr) })
	for i, r := range []breaker.Result{failure, failure, success, failure, ignored, breaker.Timeout, failure} {
		if len(got) > 0 {
			t.Fatalf("open before result %d", i)
		}
		ticket, _, _ := w.Acquire(sec)
		w.Done(ticket, sec, r, false)
	}
	if len(got) != 1 || got[0] != (breaker.Transition{From: closed, To: open, Cause: breaker.ConsecutiveFailures}) {
		t.Errorf("transitions: %v", got)
	}
	// The next closed period counts from none.
	ticket, _, _ := w.Acquire(7 * sec)
	w.Done(ticket, 7*sec, success, false)
	ticket, _, _ = w.Acquire(8 * sec)
	w.Done(ticket, 8*sec, failure, false)
	if s := w.Stats(8 * sec); s.State != closed {
		t.Errorf("state %v", s.State)
	}
}
