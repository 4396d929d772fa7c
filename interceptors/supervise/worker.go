package supervise

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Worker is a background goroutine to supervise. It is copied by Add.
type Worker struct {
	// Name tells workers apart, in logs, metrics and errors: 1 to 100 printable
	// characters. A worker that has ended gives its name free.
	Name string

	// Run does the work until ctx ends, which is how Stop ends it; then it returns
	// nil, or an error that wraps context.Canceled, as ctx.Err() does. (Before Stop
	// that is an error like others.) ctx is the supervisor's own: it has no deadline
	// and no values of yours, and it ends when Run has returned, too.
	Run func(ctx context.Context) error

	// Kind says when Run is called again. Default: Permanent.
	Kind Kind

	// StopTimeout is how long Stop waits for Run to return. Default: 5s.
	StopTimeout time.Duration
}

// Kind says which ends of a worker it is restarted after, in OTP's words.
type Kind uint8

// The kinds. An end is abnormal if Run returned an error, panicked or called
// runtime.Goexit.
const (
	Permanent Kind = iota // after every end
	Transient             // after an abnormal end
	Temporary             // never; nor does its end escalate, except by ErrEscalate
)

// String returns "permanent", "transient" or "temporary".
func (k Kind) String() string {
	switch k {
	case Permanent:
		return "permanent"
	case Transient:
		return "transient"
	case Temporary:
		return "temporary"
	}
	return "unknown"
}

// MarshalText returns what String does.
func (k Kind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// complete sets the defaults and checks the rest.
func (w Worker) complete() (Worker, error) {
	var errs []error
	if n := utf8.RuneCountInString(w.Name); n == 0 || n > 100 || !printable(w.Name) {
		errs = append(errs, fmt.Errorf("the name is %.100q, allowed 1 to 100 printable characters", w.Name))
	}
	if w.Run == nil {
		errs = append(errs, errors.New("Run is nil"))
	}
	if w.Kind > Temporary {
		errs = append(errs, fmt.Errorf("the kind is %d, allowed Permanent, Transient, Temporary", w.Kind))
	}
	if w.StopTimeout < 0 {
		errs = append(errs, fmt.Errorf("StopTimeout is %v, allowed more than 0, or 0 for 5s", w.StopTimeout))
	}
	if w.StopTimeout == 0 {
		w.StopTimeout = 5 * time.Second
	}
	return w, errors.Join(errs...)
}

func printable(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}
