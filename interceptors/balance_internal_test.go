package interceptors

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/balance"
	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
)

func TestAttemptVerdicts(t *testing.T) {
	g, err := New(&resiliencev1.Policy{})
	if err != nil {
		t.Fatal(err)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	rejected := func(r Reason) error { return (&RejectedError{Reason: r}).GRPCStatus().Err() }
	const hour = time.Hour
	for _, c := range []struct {
		ctx  context.Context
		err  error
		had  time.Duration
		want balance.Verdict
	}{
		{t.Context(), status.Error(codes.Unavailable, "connection reset by peer"), hour, balance.Failure},
		{t.Context(), status.Error(codes.Internal, ""), hour, balance.Failure},
		{t.Context(), status.Error(codes.Unknown, ""), hour, balance.Failure},
		{t.Context(), status.Error(codes.DataLoss, ""), hour, balance.Failure},
		{t.Context(), status.Error(codes.NotFound, ""), hour, balance.Success},
		{t.Context(), status.Error(codes.DeadlineExceeded, ""), 50 * time.Millisecond, balance.Failure},
		{t.Context(), status.Error(codes.DeadlineExceeded, ""), 49 * time.Millisecond, balance.Expired},
		{t.Context(), status.Error(codes.Canceled, ""), hour, balance.Neutral},
		{cancelled, status.Error(codes.Unavailable, ""), hour, balance.Neutral},
		{t.Context(), status.Error(codes.Unavailable, "the stream is rejected because server is draining the connection"), hour, balance.Neutral},
		{t.Context(), status.Error(codes.Unavailable, "the connection is draining"), hour, balance.Neutral},
		{t.Context(), errCut.Err(), hour, balance.Neutral},
		{t.Context(), status.Error(codes.Unavailable, "the shard is draining"), hour, balance.Failure},
		{t.Context(), status.Error(codes.Internal, "grpc: error while marshaling: x"), hour, balance.Neutral},
		{t.Context(), status.Error(codes.ResourceExhausted, "grpc: received message larger than max"), hour, balance.Neutral},
		{t.Context(), status.Error(codes.ResourceExhausted, "quota"), hour, balance.Shed},
		{t.Context(), rejected(ReasonRateLimited), hour, balance.Shed},
		{t.Context(), rejected(ReasonConcurrencyLimited), hour, balance.Shed},
		{t.Context(), rejected(ReasonQueueTimeout), hour, balance.Shed},
		{t.Context(), rejected(ReasonBreakerOpen), hour, balance.Failure},
		{t.Context(), rejected(ReasonDraining), hour, balance.Neutral},
		{t.Context(), rejected(ReasonBudgetTooSmall), hour, balance.Neutral},
	} {
		if got := g.judgeAttempt(c.ctx, "/a.B/C", c.err, c.had); got != c.want {
			t.Errorf("%v with %v: %v, want %v", c.err, c.had, got, c.want)
		}
	}
}
