// Command resilience checks policies and makes them from hystrix-go's settings.
//
//	resilience convert -map place=/shop.v1.Orders/Place hystrix.json >policy.yaml
//	resilience check policy.yaml
//
// Its exit status is 0 if all is right, 1 if a file has mistakes or cannot be
// read, 2 if it was called wrongly.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

const usage = `resilience checks policies and makes them from hystrix-go's settings.

  resilience check FILE...
      prints every mistake of policy files

  resilience convert [-side client|server] [-map NAME=/pkg.Service/Method]... FILE
      makes a policy from hystrix-go's settings: a JSON object of command names, as
      it is unmarshalled for hystrix.Configure. Each command becomes a rule of the
      side (default: client). -map names the method of a command; a command whose
      name is a method ("/pkg.Service/Method", "pkg.Service/Method") needs none.

  resilience help
      prints this

"-" as FILE is the standard input.

Example:

  resilience convert -map place=/shop.v1.Orders/Place hystrix.json >policy.yaml
  resilience check policy.yaml

Exit status: 0 all is right, 1 a file has mistakes or cannot be read, 2 wrong usage.
`

const (
	exitOK = iota
	exitMistakes
	exitUsage
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	c := &call{stdin: stdin, stdout: stdout, stderr: stderr}
	if len(args) == 0 {
		return c.help()
	}
	switch args[0] {
	case "check":
		return c.check(args[1:])
	case "convert":
		return c.convert(args[1:])
	case "help", "-h", "-help", "--help":
		return c.help()
	}
	return c.wrong("found %s, allowed check, convert or help", quoted(args[0]))
}

// call is one call of the command.
type call struct {
	stdin          io.Reader
	stdout, stderr io.Writer
}

func (c *call) help() int {
	return c.print(usage)
}

// print writes what was asked for, which must not be lost unnoticed.
func (c *call) print(s string) int {
	if _, err := io.WriteString(c.stdout, s); err != nil {
		return c.fail(err)
	}
	return exitOK
}

func (c *call) fail(err error) int {
	fmt.Fprintf(c.stderr, "resilience: %v\n", err)
	return exitMistakes
}

func (c *call) wrong(format string, args ...any) int {
	fmt.Fprintf(c.stderr, "resilience: %s\nresilience help says more.\n", fmt.Sprintf(format, args...))
	return exitUsage
}

// parse reads the flags of a subcommand. If there is nothing left to do, it
// returns the exit status and false.
func (c *call) parse(flags *flag.FlagSet, args []string) (status int, ok bool) {
	flags.SetOutput(io.Discard)
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return c.help(), false
	case err != nil:
		return c.wrong("%s: %v", flags.Name(), err), false
	}
	return exitOK, true
}

// read returns a file's text and its name in messages.
func (c *call) read(path string) (name string, text []byte, err error) {
	if path == "-" {
		name = "stdin"
		text, err = io.ReadAll(c.stdin)
	} else {
		name = path
		text, err = os.ReadFile(path)
	}
	return name, text, err
}

func (c *call) check(args []string) int {
	flags := flag.NewFlagSet("check", flag.ContinueOnError)
	if status, ok := c.parse(flags, args); !ok {
		return status
	}
	if flags.NArg() == 0 {
		return c.wrong("check: found no file, allowed one or more")
	}
	status := exitOK
	for _, path := range flags.Args() {
		status = max(status, c.checkFile(path))
	}
	return status
}

func (c *call) checkFile(path string) int {
	name, text, err := c.read(path)
	if err != nil {
		return c.fail(err)
	}
	p, err := interceptors.Parse(name, text)
	if err != nil {
		fmt.Fprintln(c.stderr, err)
		return exitMistakes
	}
	return c.print(fmt.Sprintf("%s: ok (%d client rules, %d server rules)\n",
		name, len(p.GetClient().GetRules()), len(p.GetServer().GetRules())))
}
