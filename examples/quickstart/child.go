package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// child is the process of the shop server, as its parent sees it. It dies with
// the parent: kill ends it, and the end of its standard input does.
type child struct {
	pid    int
	addr   string
	latest report

	cmd      *exec.Cmd
	commands io.WriteCloser
	reports  chan report   // closed when it has ended
	ended    chan struct{} // closed when it has been waited for
	logs     tail
}

// startChild starts this program again, as the shop server.
func startChild(ctx context.Context) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	c := &child{cmd: exec.Command(self, shopArgument), reports: make(chan report, 1), ended: make(chan struct{})}
	c.cmd.Stderr = &c.logs
	if c.commands, err = c.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	go c.read(stdout)
	first, err := c.next(ctx)
	if err != nil {
		c.kill()
		return nil, fmt.Errorf("the shop server did not start: %w\n%s", err, &c.logs)
	}
	c.pid, c.addr = c.cmd.Process.Pid, first.Addr
	return c, nil
}

func (c *child) read(stdout io.Reader) {
	defer close(c.ended)
	defer close(c.reports)
	for decoder := json.NewDecoder(stdout); ; {
		var rep report
		if decoder.Decode(&rep) != nil {
			break
		}
		c.reports <- rep
	}
	_ = c.cmd.Wait() // the exit code is in ProcessState
}

var errGone = errors.New("the shop server is gone")

func (c *child) next(ctx context.Context) (report, error) {
	select {
	case rep, ok := <-c.reports:
		if !ok {
			return report{}, errGone
		}
		c.latest = rep
		return rep, nil
	case <-ctx.Done():
		return report{}, ctx.Err()
	}
}

// set puts a part of the shop into a condition and returns the shop's report.
func (c *child) set(ctx context.Context, b string, state condition) (report, error) {
	return c.tell(ctx, b+" "+string(state))
}

// look returns the shop's report.
func (c *child) look(ctx context.Context) (report, error) { return c.tell(ctx, "") }

func (c *child) tell(ctx context.Context, command string) (report, error) {
	if _, err := fmt.Fprintln(c.commands, command); err != nil {
		return report{}, errGone
	}
	return c.next(ctx)
}

// patience is how long the walk waits for calls to be where it wants them.
const patience = 1500 * time.Millisecond

// await looks until a condition holds or patience is out, and returns the last
// report. That the condition never held is not an error: the counts will show.
func (c *child) await(ctx context.Context, patience time.Duration, holds func(report) bool) (report, error) {
	for end := time.Now().Add(patience); ; {
		rep, err := c.look(ctx)
		if err != nil || holds(rep) || time.Now().After(end) {
			return rep, err
		}
		pause(ctx, 5*time.Millisecond)
	}
}

// terminate asks the server to drain and end.
func (c *child) terminate() error { return c.cmd.Process.Signal(syscall.SIGTERM) }

// wait waits until the process has ended and returns its exit code, -1 if a
// signal ended it. The latest report is then the last.
func (c *child) wait(ctx context.Context) (code int, err error) {
	for err == nil {
		_, err = c.next(ctx)
	}
	if !errors.Is(err, errGone) {
		return -1, err
	}
	<-c.ended
	return c.cmd.ProcessState.ExitCode(), nil
}

// kill ends the process if it still runs, and waits for it.
func (c *child) kill() {
	_ = c.cmd.Process.Kill() // fails only if it has ended
	_ = c.commands.Close()
	for range c.reports { // let read come to its end
	}
	<-c.ended
}

// fate says how the process ended.
func (c *child) fate() string {
	select {
	case <-c.ended:
		return c.cmd.ProcessState.String()
	default:
		return "still running"
	}
}

// tail keeps the end of what is written to it.
type tail struct {
	mu   sync.Mutex
	kept []byte // guarded by mu
}

const tailSize = 4 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.kept = append(t.kept, p...)
	t.kept = t.kept[max(0, len(t.kept)-tailSize):]
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(bytes.TrimSpace(t.kept))
}
