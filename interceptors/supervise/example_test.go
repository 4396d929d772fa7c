package supervise_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors/supervise"
)

// quiet is for examples: their output is checked.
var quiet = supervise.WithLogger(slog.New(slog.DiscardHandler))

// A worker fails twice and is restarted; it ends when it is told to.
func Example() {
	workers, err := supervise.New(quiet, supervise.WithBackoff(supervise.Backoff{Initial: time.Millisecond}))
	if err != nil {
		log.Fatal(err)
	}
	connected := make(chan struct{})
	tries := 0
	err = workers.Add(supervise.Worker{Name: "consumer", Run: func(ctx context.Context) error {
		if tries++; tries < 3 {
			return errors.New("the broker is not there")
		}
		close(connected)
		<-ctx.Done()
		return ctx.Err()
	}})
	if err != nil {
		log.Fatal(err)
	}

	<-connected
	w := workers.Snapshot()[0]
	fmt.Println(w.Name, w.State, w.Restarts, w.LastError)
	fmt.Println(workers.Stop(context.Background()))
	fmt.Println(workers.Snapshot()[0].State)
	// Output:
	// consumer running 2 the broker is not there
	// <nil>
	// stopped
}

// A worker that cannot be helped ends what Run waits for, as errgroup would; with a
// guard's Drain as the callback of WithEscalation it would drain a server.
func ExampleSupervisor_Run() {
	workers, err := supervise.New(quiet,
		supervise.WithIntensity(3, time.Minute),
		supervise.WithBackoff(supervise.Backoff{Initial: time.Millisecond}))
	if err != nil {
		log.Fatal(err)
	}
	err = errors.Join(
		workers.Add(supervise.Worker{Name: "reporter", Run: func(ctx context.Context) error {
			<-ctx.Done()
			fmt.Println("the reporter says goodbye")
			return nil
		}}),
		workers.Add(supervise.Worker{Name: "cleaner", Run: func(context.Context) error {
			return errors.New("the disk is gone")
		}}))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(workers.Run(context.Background()))
	// Output:
	// the reporter says goodbye
	// supervise: worker "cleaner": more than 3 restarts within 1m0s, the last end: the disk is gone
}

func ExampleWithEscalation() {
	drain := make(chan struct{}) // guard.Drain, in a server
	workers, err := supervise.New(quiet, supervise.WithEscalation(func(err error) {
		fmt.Println(err)
		close(drain)
	}))
	if err != nil {
		log.Fatal(err)
	}
	err = workers.Add(supervise.Worker{Name: "licence", Run: func(context.Context) error {
		return fmt.Errorf("%w: the licence has expired", supervise.ErrEscalate) // a restart cannot help
	}})
	if err != nil {
		log.Fatal(err)
	}
	<-drain
	fmt.Println(workers.Stop(context.Background()))
	// Output:
	// supervise: worker "licence": escalate: the licence has expired
	// <nil>
}

// A handler answers, and has a goroutine finish what its caller does not wait for.
// Its panic is logged and counted, and ends nothing.
func ExampleGo() {
	logged, w := io.Pipe()
	old := slog.Default()
	defer slog.SetDefault(old)
	slog.SetDefault(slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey || a.Key == "stack" {
				return slog.Attr{}
			}
			return a
		},
	})))

	handler := func(ctx context.Context) string {
		supervise.Go(context.WithoutCancel(ctx), func(context.Context) { panic("no such mailbox") })
		return "ordered"
	}
	fmt.Println(handler(context.Background()))
	line, err := bufio.NewReader(logged).ReadString('\n')
	fmt.Print(line, err)
	// Output:
	// ordered
	// level=ERROR msg="goroutine panicked" cause=panic error="panic: no such mailbox"
	// <nil>
}

func ExampleSupervisor_Snapshot() {
	workers, err := supervise.New(quiet)
	if err != nil {
		log.Fatal(err)
	}
	ended := make(chan struct{})
	err = workers.Add(supervise.Worker{Name: "migration", Kind: supervise.Transient, Run: func(context.Context) error {
		close(ended)
		return nil
	}})
	if err != nil {
		log.Fatal(err)
	}
	<-ended
	_ = workers.Stop(context.Background())
	state := workers.Snapshot()
	state[0].Since = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	text, err := json.Marshal(state)
	fmt.Println(string(text), err)
	// Output:
	// [{"name":"migration","kind":"transient","state":"stopped","since":"2026-11-25T12:00:00Z","restarts":0,"panics":0}] <nil>
}
