package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// progress shows what the client's guard is doing, from its Snapshot: on a
// terminal a table that is redrawn, elsewhere a line for each second.
type progress struct {
	out      io.Writer
	terminal bool
	began    time.Time
	quit     chan struct{}
	done     chan struct{}

	mu     sync.Mutex
	guard  *interceptors.Guard // guarded by mu
	drawn  int                 // lines of the table on the screen
	before map[string]uint64   // by method, calls that had ended when they were last shown
	at     time.Time           // when that was
}

func newProgress(out *os.File) *progress {
	now := time.Now()
	return &progress{
		out: out, terminal: isTerminal(out),
		began: now, at: now, before: map[string]uint64{},
		quit: make(chan struct{}), done: make(chan struct{}),
	}
}

func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb"
}

// watch shows a guard until close.
func (p *progress) watch(guard *interceptors.Guard) {
	p.turnTo(guard)
	go func() {
		defer close(p.done)
		every := time.Second
		if p.terminal {
			every = 250 * time.Millisecond
		}
		ticker := time.NewTicker(every)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				p.show()
			case <-p.quit:
				return
			}
		}
	}()
}

// turnTo shows another guard from now on.
func (p *progress) turnTo(guard *interceptors.Guard) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.guard, p.before = guard, map[string]uint64{}
}

func (p *progress) close() {
	close(p.quit)
	<-p.done
	_, _ = p.Write(nil) // the table is over
}

// step says what comes next.
func (p *progress) step(title string) {
	fmt.Fprintf(p, "[%4.1fs] %s\n", time.Since(p.began).Seconds(), title)
}

// Write puts text above the table: steps, and the guard's log.
func (p *progress) Write(text []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, _ = io.WriteString(p.out, p.eraser())
	p.drawn = 0
	return p.out.Write(text)
}

// eraser is what takes the table off the screen.
func (p *progress) eraser() string {
	if p.drawn == 0 {
		return ""
	}
	return fmt.Sprintf("\x1b[%dA\x1b[J", p.drawn)
}

func (p *progress) show() {
	p.mu.Lock()
	guard := p.guard
	p.mu.Unlock()
	snapshot := guard.Snapshot() // not under the lock: it may log, and that comes here
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.guard != guard {
		return
	}
	activities := p.activities(snapshot, time.Now())
	if p.terminal {
		p.redraw(activities)
		return
	}
	var busy []string
	for _, a := range activities {
		if a.rate > 0 || a.inFlight > 0 {
			busy = append(busy, a.String())
		}
	}
	if len(busy) > 0 {
		fmt.Fprintf(p.out, "[%4.1fs]   %s\n", time.Since(p.began).Seconds(), strings.Join(busy, ", "))
	}
}

func (p *progress) redraw(activities []activity) {
	var table strings.Builder // written at once, or it flickers
	fmt.Fprintf(&table, "%s\n  %-21s %-10s %8s %9s %10s\n", p.eraser(), "method", "breaker", "calls/s", "rejected", "in flight")
	for _, a := range activities {
		fmt.Fprintf(&table, "  %-21s %s%-10s%s %8.0f %9d %10d\n", a.method, colours[a.state], a.state, plain, a.rate, a.rejected, a.inFlight)
	}
	p.drawn = len(activities) + 2
	_, _ = io.WriteString(p.out, table.String())
}

const (
	plain = "\x1b[0m"
	red   = "\x1b[31m"
	green = "\x1b[32m"
)

var colours = map[string]string{"closed": green, "half_open": "\x1b[33m", "open": red}

// activity is what one method of the client has been doing.
type activity struct {
	method   string
	state    string  // of its breaker
	rate     float64 // calls that ended, per second, since it was last shown
	rejected uint64  // by either side, so far
	inFlight uint64
}

// String leaves out what is as it should be.
func (a activity) String() string {
	text := fmt.Sprintf("%s %.0f/s", a.method, a.rate)
	if a.state != "closed" {
		text += " breaker " + a.state
	}
	if a.rejected > 0 {
		text += fmt.Sprintf(" %d rejected", a.rejected)
	}
	if a.inFlight > 0 {
		text += fmt.Sprintf(" %d in flight", a.inFlight)
	}
	return text
}

func (p *progress) activities(snapshot interceptors.Snapshot, now time.Time) []activity {
	var all []activity
	for _, m := range snapshot.Methods {
		a := activity{method: strings.TrimPrefix(m.Method, "/shop.v1."), state: "none", rejected: m.Counts.Dropped}
		if strings.HasPrefix(m.Target, fleetScheme+":") {
			a.method += " (fleet)"
		}
		if m.Breaker != nil {
			a.state = m.Breaker.State
		}
		done := m.Counts.Success + m.Counts.Failure + m.Counts.Neutral + m.Counts.Dropped
		a.inFlight = m.Counts.Admitted - done
		for _, n := range m.Counts.Rejected {
			a.rejected += n
			done += n
		}
		a.rate = float64(done-p.before[a.method]) / now.Sub(p.at).Seconds()
		p.before[a.method] = done
		all = append(all, a)
	}
	p.at = now
	return all
}
