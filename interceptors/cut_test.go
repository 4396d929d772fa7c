package interceptors_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// slowHandler is a slog.Handler that takes a second for each call that is cut.
type slowHandler struct{ slog.Handler }

func (slowHandler) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "drain cuts a call" {
		time.Sleep(time.Second)
	}
	return nil
}

func TestASlowLoggerDoesNotDelayTheCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var began time.Time
		r := serveDrain(t, drainPolicy, bothKinds(func(ctx context.Context, _ string) error {
			<-ctx.Done()
			if after := time.Since(began); after != 20*time.Second {
				t.Errorf("a handler was cancelled after %v, want 20s", after)
			}
			return ctx.Err()
		}), interceptors.WithLogger(slog.New(slowHandler{slog.NewTextHandler(io.Discard, nil)})))
		calls := []<-chan error{hold(t, arms[2], r.conn), hold(t, arms[3], r.conn)}
		began = time.Now()
		r.stop()
		if _, err := r.wait(); err == nil {
			t.Error("nothing was cut")
		}
		for _, c := range calls {
			<-c
		}
	})
}

func TestDrainNamesOnlySomeOfTheCallsThatItCuts(t *testing.T) {
	for calls, want := range map[int]string{20: "peer bufconn)", 21: "and 1 more", 50: "and 30 more"} {
		synctest.Test(t, func(t *testing.T) {
			log := new(drainLog)
			r := serveDrain(t, drainPolicy, stuck(), log.option())
			// Earlier calls, whose records come back in another order.
			earlier, cancel := context.WithCancel(t.Context())
			for range calls {
				arms[2].start(earlier, r.conn, "earlier")
			}
			cancel()
			synctest.Wait()
			var all []<-chan error
			for range calls {
				all = append(all, hold(t, arms[2], r.conn))
				time.Sleep(time.Second)
			}
			r.stop()
			_, err := r.wait()
			text := fmt.Sprint(err)
			age := time.Duration(calls+20) * time.Second
			oldest := fmt.Sprintf("the drain cut %d calls: /test.v1.Test/Unary (age %v, peer bufconn), ", calls, age)
			if !strings.Contains(text, oldest) || !strings.HasSuffix(text, want) || strings.Count(text, "(age ") != 20 {
				t.Errorf("%d calls: the error is %s", calls, text)
			}
			if n := strings.Count(log.String(), "drain cuts a call"); n != 20 || !strings.Contains(log.String(), fmt.Sprintf(`msg="drain cuts a call" method=/test.v1.Test/Unary age=%v `, age)) {
				t.Errorf("%d calls: the log names %d:\n%v", calls, n, log)
			}
			if has := strings.Contains(log.String(), fmt.Sprintf(`msg="drain cuts more calls" calls=%d`, calls-20)); has != (calls > 20) {
				t.Errorf("%d calls: the log says of more: %v", calls, has)
			}
			for _, c := range all {
				<-c
			}
		})
	}
}
