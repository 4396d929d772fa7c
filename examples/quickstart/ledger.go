package main

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
)

// ledger counts the calls that reach the shop's handlers. It shares nothing with
// the guard, so that the walk can hold what the guard says against it.
type ledger struct {
	mu      sync.Mutex
	methods map[string]tally // guarded by mu
}

// tally is what the handler of one method has seen.
type tally struct {
	Started  int
	Ended    int // panics included
	Panicked int
	Most     int // most calls at one time

	Latest []time.Time // when the latest calls, at most 32, started
}

func (t tally) inFlight() int { return t.Started - t.Ended }

func newLedger() *ledger { return &ledger{methods: map[string]tally{}} }

func (l *ledger) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	returned := false
	l.begin(info.FullMethod)
	defer func() { l.end(info.FullMethod, returned) }()
	resp, err := handler(ctx, req)
	returned = true
	return resp, err
}

func (l *ledger) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	returned := false
	l.begin(info.FullMethod)
	defer func() { l.end(info.FullMethod, returned) }()
	err := handler(srv, ss)
	returned = true
	return err
}

func (l *ledger) begin(method string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	t := l.methods[method]
	t.Started++
	t.Most = max(t.Most, t.inFlight())
	t.Latest = append(slices.Clone(t.Latest[max(0, len(t.Latest)-31):]), time.Now()) // a clone: reports hold the old one
	l.methods[method] = t
}

func (l *ledger) end(method string, returned bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	t := l.methods[method]
	t.Ended++
	if !returned {
		t.Panicked++
	}
	l.methods[method] = t
}

// read returns the tallies of the shop's own methods, without health.
func (l *ledger) read() map[string]tally {
	l.mu.Lock()
	defer l.mu.Unlock()
	own := maps.Clone(l.methods)
	maps.DeleteFunc(own, func(method string, _ tally) bool { return !strings.HasPrefix(method, "/shop.v1.") })
	return own
}
