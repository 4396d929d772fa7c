package supervise_test

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"

	"github.com/grpc-resilience/grpc-resilience/interceptors/supervise"
)

// recorder keeps what is logged.
type recorder struct {
	mu      sync.Mutex
	records []slog.Record
	with    func() // called for each record, if any
}

func (r *recorder) option() supervise.Option { return supervise.WithLogger(slog.New(r)) }

func (r *recorder) Enabled(context.Context, slog.Level) bool { return true }
func (r *recorder) WithAttrs([]slog.Attr) slog.Handler       { return r }
func (r *recorder) WithGroup(string) slog.Handler            { return r }

func (r *recorder) Handle(_ context.Context, record slog.Record) error {
	r.mu.Lock()
	r.records = append(r.records, record)
	r.mu.Unlock()
	if r.with != nil {
		r.with()
	}
	return nil
}

func (r *recorder) count(msg string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, record := range r.records {
		if record.Message == msg {
			n++
		}
	}
	return n
}

// String has a line for each record, without stacks.
func (r *recorder) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var b strings.Builder
	for _, record := range r.records {
		fmt.Fprintf(&b, "%v %s", record.Level, record.Message)
		record.Attrs(func(a slog.Attr) bool {
			if a.Key != "stack" {
				fmt.Fprintf(&b, " %s=%v", a.Key, a.Value)
			}
			return true
		})
		b.WriteByte('\n')
	}
	return b.String()
}

// attr returns an attribute of the last record of a message.
func (r *recorder) attr(msg, key string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	found := ""
	for _, record := range r.records {
		if record.Message != msg {
			continue
		}
		record.Attrs(func(a slog.Attr) bool {
			if a.Key == key {
				found = a.Value.String()
			}
			return true
		})
	}
	return found
}
