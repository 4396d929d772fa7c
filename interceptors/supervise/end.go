package supervise

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
)

// ErrEscalate makes a worker's end escalate at once, whatever its kind: Run
// returns an error that wraps it when a restart cannot help.
//
//	return fmt.Errorf("%w: %w", supervise.ErrEscalate, err)
var ErrEscalate = errors.New("escalate")

// cause is how a run ended.
type cause uint8

const (
	goexited cause = iota // until something else is known
	returned
	failed
	panicked
	causes
)

// String returns the name that logs and metrics show.
func (c cause) String() string { return [causes]string{"goexit", "return", "error", "panic"}[c] }

// end is what is known of how a run ended. What foreign code must be asked for it,
// the methods of errors and values that may panic in turn, is asked once.
type end struct {
	cause    cause
	err      error  // what Run returned
	text     string // of it all, in words
	stack    []byte // of a panic or a Goexit
	canceled bool   // err wraps context.Canceled
	escalate bool   // err wraps ErrEscalate
}

// abnormal is OTP's word for an end that restarts transient workers.
func (e *end) abnormal() bool { return e.cause != returned }

// unwound reports a panic or a Goexit.
func (e *end) unwound() bool { return e.cause == panicked || e.cause == goexited }

// result notes what Run returned. It may panic, in the methods of err; that is
// an end by panic then.
func (e *end) result(err error) {
	if err == nil {
		e.cause, e.text = returned, "Run returned nil"
		return
	}
	e.cause, e.err = failed, err
	e.text = "its Error method called runtime.Goexit"
	e.canceled, e.escalate = errors.Is(err, context.Canceled), errors.Is(err, ErrEscalate)
	e.text = err.Error()
}

// caught, deferred, contains a panic and notes it, or a Goexit.
func (e *end) caught() {
	p := recover()
	switch {
	case p != nil:
		e.cause, e.stack = panicked, debug.Stack()
		e.text = "panic with a value that cannot be printed"
		contain(func() { e.text = fmt.Sprint("panic: ", p) })
	case e.cause == goexited:
		e.stack = debug.Stack()
		e.text = "runtime.Goexit was called"
	}
}

// attrs say it all in a log.
func (e *end) attrs() []slog.Attr {
	attrs := []slog.Attr{slog.String("cause", e.cause.String())}
	if e.abnormal() {
		attrs = append(attrs, slog.String("error", e.text))
	}
	if e.stack != nil {
		attrs = append(attrs, slog.String("stack", string(e.stack)))
	}
	return attrs
}

// failure is an end as an error. Its text is the one taken when the run ended.
type failure struct {
	text string
	err  error
}

func (f *failure) Error() string { return f.text }
func (f *failure) Unwrap() error { return f.err }

// contain keeps a panic of foreign code and reports it.
func contain(f func()) (p any) {
	defer func() { p = recover() }()
	f()
	return nil
}

// clip bounds the text of a foreign error, and makes it valid UTF-8.
func clip(s string) string {
	const limit = 256
	if len(s) > limit {
		s = s[:limit] + "..."
	}
	return strings.ToValidUTF8(s, "?")
}
