package interceptors_test

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// soakRounds is the environment variable that says how often case 35 is tried.
const soakRounds = "GRPC_RESILIENCE_SOAK_ROUNDS"

// A server process is told to end while calls are in flight; they all end at the same
// time; it calls os.Exit as soon as Serve has returned. No answer is lost. A server
// that exits when no call is in flight any more must lose some, or the test would
// prove nothing: they are not written yet.
func TestCase35_NothingIsInFlightAndTheProcessExits(t *testing.T) {
	t.Parallel()
	rounds := 200
	if text, ok := os.LookupEnv(soakRounds); ok {
		var err error
		if rounds, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	var done, lost atomic.Int64
	inParallel(rounds, func() {
		lost.Add(int64(exitRound(t, "")))
		if n := done.Add(1); n%500 == 0 {
			fmt.Printf("case 35: %d of %d exits, %d answers lost, %v\n", n, rounds, lost.Load(), time.Since(began).Round(time.Second))
		}
	})
	t.Logf("%d exits, %d answers lost", rounds, lost.Load())
	if lost.Load() > 0 || int(done.Load()) != rounds {
		t.Errorf("%d exits of %d, %d answers lost", done.Load(), rounds, lost.Load())
	}
	for range 20 {
		if n := exitRound(t, "count"); n > 0 {
			t.Logf("without the drain: %d answers lost", n)
			return
		}
	}
	t.Error("without the drain nothing was lost either")
}

// inParallel calls f n times, a few at once.
func inParallel(n int, f func()) {
	var workers sync.WaitGroup
	var left atomic.Int64
	left.Store(int64(n))
	for range 3 {
		workers.Go(func() {
			for left.Add(-1) >= 0 {
				f()
			}
		})
	}
	workers.Wait()
}

// exitRound ends one server process and returns how many answers were lost.
func exitRound(t *testing.T, mode string) (lost int) {
	const connections, each = 2, 2
	p := startProcess(t, "127.0.0.1:0", mode, "server: {drain: {announce: 0s, grace: 1m}}")
	text := "held " + strings.Repeat("x", 20_000) // more than one frame
	var calls []<-chan error
	for range connections {
		conn := dialProcess(t, p.addr)
		defer conn.Close()
		for range each {
			calls = append(calls, p.begin(conn, text))
		}
	}
	p.signal(syscall.SIGTERM)
	p.expect("phase=grace")
	_ = p.release.Close()
	for _, call := range calls {
		if err := <-call; err != nil {
			lost++
			if mode == "" {
				t.Errorf("lost: %v", err)
			}
		}
	}
	p.exit(0)
	return lost
}
