package interceptors_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// arrivals notes when calls reach the handler.
type arrivals struct {
	start time.Time
	mu    sync.Mutex
	at    []time.Duration
}

func (a *arrivals) note(context.Context, string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.at = append(a.at, time.Since(a.start))
	return nil
}

func (a *arrivals) all() []time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.at)
}

func TestPacingSpacesCallsEvenly(t *testing.T) {
	for _, rate := range []int{10, 200, 5000} {
		t.Run(fmt.Sprint(rate), func(t *testing.T) {
			eachArm(t, func(t *testing.T, a arm) {
				seen := &arrivals{start: time.Now()}
				g, conn := a.setup(t, fmt.Sprintf("rate_limit: {algorithm: pacing, requests_per_second: %d, max_wait: 10s}", rate), bothKinds(seen.note))
				var calls sync.WaitGroup
				for range 10 {
					calls.Go(func() {
						for range 5 {
							a.must(t, conn, "")
						}
					})
				}
				calls.Wait()
				interval := time.Second / time.Duration(rate)
				for i, at := range seen.all() {
					if at != time.Duration(i)*interval {
						t.Fatalf("call %d at %v, want %v", i, at, time.Duration(i)*interval)
					}
				}
				time.Sleep(time.Hour) // after a pause the slack, and one, come at once
				before := len(seen.all())
				for range 30 {
					calls.Go(func() { a.must(t, conn, "") })
				}
				synctest.Wait()
				if n := len(seen.all()) - before; n != 11 {
					t.Errorf("%d at once after a pause, want 11", n)
				}
				calls.Wait()
				wantEnded(t, g, a.sideOf(), a.method, ended{success: 80})
			})
		})
	}
}

func TestPacingRefusesAtOnceAndTakesNothing(t *testing.T) {
	eachArm(t, func(t *testing.T, a arm) {
		seen := &arrivals{start: time.Now()}
		g, conn := a.setup(t, "rate_limit: {algorithm: pacing, requests_per_second: 10, burst: 0, max_wait: 150ms}", bothKinds(seen.note))
		a.must(t, conn, "")
		waits := a.start(t.Context(), conn, "")
		began := time.Now()
		for range 100 {
			if err := a.call(t.Context(), conn, ""); reasonOf(err) != interceptors.ReasonRateLimited || retryInfo(err) != 200*time.Millisecond {
				t.Fatalf("%v, retry in %v, want RATE_LIMITED and 200ms", err, retryInfo(err))
			}
		}
		if d := time.Since(began); d != 0 {
			t.Errorf("refused after %v", d)
		}
		pass(100 * time.Millisecond)
		if !waits.ended() || waits.result().err != nil {
			t.Errorf("ended %v: %v", waits.ended(), waits.result().err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond) // sooner than its turn
		defer cancel()
		if err := a.call(ctx, conn, ""); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("%v, want RESOURCE_EXHAUSTED", err)
		}
		a.must(t, conn, "") // has the turn that nobody took
		if at := seen.all(); !slices.Equal(at, []time.Duration{0, 100 * time.Millisecond, 200 * time.Millisecond}) {
			t.Errorf("admitted at %v", at)
		}
		if r := a.state(t, g).RateLimit; r.Rate != 10 || r.Available != 0 || r.Waiting != 0 {
			t.Errorf("%+v", *r)
		}
		checkIdle(t, g)
	})
}
