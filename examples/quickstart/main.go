// Command quickstart shows the whole suite at work in a few seconds: a guarded
// shop server in a process of its own, a guarded client, real gRPC over TCP on
// 127.0.0.1, one policy for both. It makes a method fail and heal, overloads
// limits, crashes handlers, restarts servers, kills one, slows a replica down, and
// counts whether what README promises is true.
//
//	go run ./examples/quickstart
//
// Read policy.yaml, then server.go and client.go for how a server and a client
// are wired, then sections.go for what is claimed. Claims are counted by the client's
// results and by a ledger in the server's handlers, not by the guard's word.
package main

import (
	"context"
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
)

//go:embed policy.yaml
var policyYAML []byte

// shopArgument makes the program the shop server; it is how the parent starts
// its child.
const shopArgument = "shop-server"

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1 // a claim did not hold, or the walk could not be made
	exitUsage  = 2
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	policy, err := interceptors.Parse("policy.yaml", policyYAML)
	if err != nil {
		return fail(err) // every mistake, each with its line and column
	}
	if len(args) == 1 && args[0] == shopArgument {
		if err := serveShop(policy, os.Stdin, os.Stdout, os.Stderr); err != nil {
			return fail(err)
		}
		return exitOK
	}
	p, asJSON, err := parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		return exitUsage
	}
	return demonstrate(policy, p, asJSON)
}

func fail(err error) int {
	fmt.Fprintln(os.Stderr, "quickstart:", err)
	return exitFailed
}

// pace is how long the walk takes its time.
type pace struct {
	rounds int           // calls of each method while all is well
	spell  time.Duration // of overload
	limit  time.Duration // of everything
}

func parse(args []string) (p pace, asJSON bool, err error) {
	flags := flag.NewFlagSet("quickstart", flag.ContinueOnError)
	quick := flags.Bool("quick", false, "shorter spells of load; ends within 30 s instead of 60 s")
	flags.BoolVar(&asJSON, "json", false, "print the table as JSON on stdout, everything else on stderr")
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), `usage: quickstart [-quick] [-json]

Starts a guarded shop server as a child process, calls it through a guarded
client, and counts whether breakers, limits, recovery and the drain keep their
promises; then it restarts, slows and kills servers of which there are several. Uses
127.0.0.1 only. The exit code is 0 if every claim held, 1 if not.

`)
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		return p, asJSON, err
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(flags.Output(), "quickstart: unknown argument %q\n", flags.Arg(0))
		flags.Usage()
		return p, asJSON, errors.New("unknown argument")
	}
	if *quick {
		return pace{rounds: 10, spell: 500 * time.Millisecond, limit: 30 * time.Second}, asJSON, nil
	}
	return pace{rounds: 60, spell: 4 * time.Second, limit: 60 * time.Second}, asJSON, nil
}

// demonstrate makes the walk and prints what came of it. Whatever happens, no
// process is left behind.
func demonstrate(policy *resiliencev1.Policy, p pace, asJSON bool) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends the program at once
	ctx, cancel := context.WithTimeout(ctx, p.limit-500*time.Millisecond)
	defer cancel()

	out := os.Stdout
	if asJSON {
		out = os.Stderr
	}
	shop, err := startChild(ctx)
	if err != nil {
		return fail(err)
	}
	defer shop.kill()
	fmt.Fprintf(out, "shop server: pid %d at %s\n", shop.pid, shop.addr)

	rows := walkThrough(ctx, policy, p, shop, out)
	shop.kill()
	if asJSON {
		err = writeJSON(os.Stdout, rows)
	} else {
		err = writeTable(out, rows, isTerminal(out))
	}
	if err != nil {
		return fail(err)
	}
	return conclude(out, rows, shop)
}

// conclude says how the server ended and what the table comes to.
func conclude(out io.Writer, rows []row, shop *child) int {
	fmt.Fprintf(out, "\nshop server: pid %d, %s\n", shop.pid, shop.fate())
	if bad := failed(rows); bad > 0 {
		fmt.Fprintf(out, "the end of its log:\n%s\n", &shop.logs)
		return fail(fmt.Errorf("%d of %d claims did not hold", bad, len(rows)))
	}
	fmt.Fprintf(out, "all %d claims held\n", len(rows))
	return exitOK
}
