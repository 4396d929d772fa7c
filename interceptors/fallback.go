package interceptors

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/policy"
)

// Fallback answers a unary client call in place of the server, see WithFallback.
// With nil the call succeeds, and reply, which is the caller's, must be filled:
// it may hold what the failed call left in it. An error is returned to the caller
// instead of cause; return cause itself to give up.
//
// cause is exactly the error that the caller would have got. method is the full
// name of the method. ctx is the caller's, marked: it may be past its deadline, and
// then what the fallback does with it fails at once.
//
// Calls that it makes through the same guard are guarded like others. If one fails
// that was made with ctx, or with a context made from it, it may be answered by
// another fallback, but not by this one again: it gets its cause. The mark is all
// that the guard knows them by. A Fallback that makes calls with another context,
// which it is to answer itself, calls itself until the process dies of it: for more
// time than the caller has left use context.WithoutCancel(ctx), which keeps the mark.
//
// A Fallback must be safe for concurrent use.
type Fallback func(ctx context.Context, method string, req, reply any, cause error) error

// WithFallback gives the unary client calls of a pattern a fallback. Patterns
// are those of the policy, "/pkg.Service/Method", "/pkg.Service/*" and "*"; the
// most specific one is asked, and that one alone. "*" never matches the services
// of package grpc. Default: none.
//
// It is asked for calls that a gate of this guard rejected, that ended with the
// outcome Failure or Dropped, and that ended Neutral with DEADLINE_EXCEEDED,
// RESOURCE_EXHAUSTED or UNAVAILABLE (an impatient caller, the rejection of a peer
// or of a guard further in). It is not asked if the caller cancelled or closed
// the channel, for errors that are a Success (NOT_FOUND), for messages that could
// not be marshalled or are over a size limit, and when a panic or runtime.Goexit
// passes through. Streams, and methods that no client rule is for, have no
// fallback.
//
// It runs on the caller's goroutine after the outcome was recorded and the
// permits were given back: it holds no place however long it takes, and what it
// answers changes neither the breaker nor any count. Nothing ends it but itself.
// If it panics, the panic is logged, once, and the caller gets cause. If it calls
// runtime.Goexit, the caller's goroutine ends, like anywhere else. On Hystrix's
// dashboard both are fallbacks that failed. Call options such as grpc.Header keep
// what the failed call gave them.
//
// New returns an error for a pattern that is malformed, was given before (by
// LastGood, too) or matches nothing that a client rule is for, and for a nil f.
func WithFallback(pattern string, f Fallback) Option {
	return optionFunc(func(o *options) error {
		if f == nil {
			return fmt.Errorf("WithFallback: the fallback of %q is nil", pattern)
		}
		return o.addFallback("WithFallback", pattern, &fallback{answer: f})
	})
}

// fallback is what one pattern was given.
type fallback struct {
	option, pattern string
	name, keyName   string    // of the callbacks, in the log
	answer          Fallback  // nil: lastGood answers
	lastGood        *lastGood // nil: answer does
}

// fallbacks are those of a guard. They are found by the name of the method when
// they are needed: methods beyond maxStates have theirs too.
type fallbacks struct {
	byPattern map[string]*fallback // "/pkg.Service/Method", "/pkg.Service/" or "", without the star
	learn     bool                 // one of them is a lastGood
}

func (o *options) addFallback(option, pattern string, f *fallback) error {
	if err := policy.CheckPattern(pattern); err != nil {
		return fmt.Errorf("%s: %w", option, err)
	}
	if o.fallbacks == nil {
		o.fallbacks = &fallbacks{byPattern: map[string]*fallback{}}
	}
	key := strings.TrimSuffix(pattern, "*")
	if first := o.fallbacks.byPattern[key]; first != nil {
		return fmt.Errorf("%s: %q has a fallback already, by %s", option, pattern, first.option)
	}
	f.option, f.pattern = option, pattern
	f.name, f.keyName = "fallback of "+pattern, "LastGood's Key of "+pattern
	o.fallbacks.byPattern[key] = f
	o.fallbacks.learn = o.fallbacks.learn || f.lastGood != nil
	return nil
}

// check finds fallbacks that could never be asked.
func (fs *fallbacks) check(rules *policy.Table) error {
	if fs == nil {
		return nil
	}
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(fs.byPattern)) {
		if f := fs.byPattern[key]; !rules.Covers(f.pattern) {
			errs = append(errs, fmt.Errorf("%s: no client rule is for %q, so nothing would be rejected or judged: add a rule, such as client.rules: [{methods: [%q], breaker: {}}]",
				f.option, f.pattern, f.pattern))
		}
	}
	return errors.Join(errs...)
}

// of returns the fallback of a method, nil if it has none. Any string is a valid
// argument.
func (fs *fallbacks) of(method string) *fallback {
	if f := fs.byPattern[method]; f != nil {
		return f
	}
	if f := fs.byPattern[method[:strings.LastIndexByte(method, '/')+1]]; f != nil {
		return f
	}
	if strings.HasPrefix(method, "/grpc.") {
		return nil
	}
	return fs.byPattern[""]
}

// askedKey is the key of a context that a fallback was given. Each fallback has one
// of its own: those that call each other's methods must come to an end, too.
type askedKey struct{ of *fallback }

// orFallback returns what the fallback makes of a call that ended with cause;
// cause, if there is none or it is not to be asked.
func (c *call) orFallback(ctx context.Context, q *question, req, reply any, cc *grpc.ClientConn, out Outcome, cause error) error {
	f := c.guard.opts.fallbacks.of(c.method)
	if f == nil || !fallsBack(ctx, cc, req, out, cause) {
		return cause
	}
	key := askedKey{f}
	if f.answer != nil && ctx.Value(key) != nil {
		return cause
	}
	err := cause // also if it panics
	// Deferred: it may call runtime.Goexit.
	defer func() { c.recordFallback(err == nil) }()
	c.guard.contain(f.name, func() {
		if f.lastGood != nil {
			err = q.answer(reply, c.guard.now(), cause)
		} else {
			err = f.answer(context.WithValue(ctx, key, true), c.method, req, reply, cause)
		}
	})
	return err
}

// fallsBack reports whether a call that ended with an error is one for a fallback.
func fallsBack(ctx context.Context, cc *grpc.ClientConn, req any, out Outcome, err error) (yes bool) {
	if out == Success || ctx.Err() == context.Canceled || isClosed(cc) {
		return false
	}
	yes = out != Neutral
	// The error is foreign code: its methods may panic.
	defer func() { _ = recover() }()
	var rejected *RejectedError
	if errors.As(err, &rejected) {
		return true
	}
	st, ok := status.FromError(err)
	if !ok {
		st = status.FromContextError(err)
	}
	switch code := st.Code(); {
	case unsendable(code, st.Message(), req), tooLarge(code, st.Message()):
		return false
	case code == codes.DeadlineExceeded, code == codes.ResourceExhausted, code == codes.Unavailable:
		return true
	}
	return yes
}
