package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

var sentinels = []struct {
	reason interceptors.Reason
	err    error
	code   codes.Code
}{
	{interceptors.ReasonBreakerOpen, interceptors.ErrBreakerOpen, codes.Unavailable},
	{interceptors.ReasonRateLimited, interceptors.ErrRateLimited, codes.ResourceExhausted},
	{interceptors.ReasonConcurrencyLimited, interceptors.ErrConcurrencyLimited, codes.ResourceExhausted},
	{interceptors.ReasonQueueTimeout, interceptors.ErrQueueTimeout, codes.ResourceExhausted},
	{interceptors.ReasonDraining, interceptors.ErrDraining, codes.Unavailable},
	{interceptors.ReasonBudgetTooSmall, interceptors.ErrBudgetTooSmall, codes.DeadlineExceeded},
}

func TestRejectedErrorIsTheSentinelOfItsReason(t *testing.T) {
	for _, s := range sentinels {
		rejected := &interceptors.RejectedError{Side: interceptors.Server, Method: rpctest.Unary, Rule: "rule", Reason: s.reason, RetryAfter: time.Second}
		for _, err := range []error{rejected, fmt.Errorf("place order: %w", rejected), errors.Join(errors.New("other"), rejected)} {
			for _, other := range sentinels {
				want := other.reason == s.reason || s.reason == interceptors.ReasonQueueTimeout && other.reason == interceptors.ReasonConcurrencyLimited
				if errors.Is(err, other.err) != want {
					t.Errorf("%s: errors.Is(%q, %q) is %v", s.reason, err, other.err, !want)
				}
			}
			var as *interceptors.RejectedError
			if !errors.As(err, &as) || as != rejected {
				t.Errorf("%s: errors.As(%q) found %v", s.reason, err, as)
			}
		}
		if errors.Unwrap(rejected) != s.err {
			t.Errorf("%s unwraps to %v", s.reason, errors.Unwrap(rejected))
		}
	}
}

func TestRejectedErrorIsAStatus(t *testing.T) {
	for _, s := range sentinels {
		rejected := &interceptors.RejectedError{Side: interceptors.Client, Method: rpctest.Unary, Rule: "rule", Reason: s.reason, RetryAfter: time.Second}
		for _, err := range []error{rejected, fmt.Errorf("place order: %w", rejected)} {
			st, ok := status.FromError(err)
			if !ok || st.Code() != s.code || st.Message() != err.Error() {
				t.Errorf("%s: FromError(%q) is %v, %v; want %v", s.reason, err, st, ok, s.code)
			}
			if reasonOf(st.Err()) != s.reason || retryInfo(st.Err()) != time.Second {
				t.Errorf("%s: details %v", s.reason, st.Details())
			}
		}
	}
}

func TestRejectedErrorText(t *testing.T) {
	for _, tt := range []struct {
		err  interceptors.RejectedError
		want string
	}{
		{
			interceptors.RejectedError{Side: interceptors.Client, Method: "/shop.v1.Orders/Place", Rule: "place-order", Reason: interceptors.ReasonBreakerOpen, RetryAfter: 4999100 * time.Microsecond},
			`/shop.v1.Orders/Place: circuit breaker is open (client rule "place-order"), retry in 5s`,
		}, {
			interceptors.RejectedError{Side: interceptors.Server, Method: "/shop.v1.Orders/Place", Rule: "*", Reason: interceptors.ReasonRateLimited, RetryAfter: 1},
			`/shop.v1.Orders/Place: rate limited (server rule "*"), retry in 1ms`,
		}, {
			interceptors.RejectedError{Side: interceptors.Server, Method: "/shop.v1.Orders/Place", Reason: interceptors.ReasonDraining},
			`/shop.v1.Orders/Place: server is draining`,
		}, {
			interceptors.RejectedError{Method: "/a/b", Reason: "SOMETHING_ELSE"},
			`/a/b: rejected: SOMETHING_ELSE`,
		},
	} {
		if got := tt.err.Error(); got != tt.want {
			t.Errorf("got  %s\nwant %s", got, tt.want)
		}
	}
}

// An error made by somebody else, of no reason that we know, is an error still.
func TestRejectedErrorOfAnUnknownReason(t *testing.T) {
	for _, reason := range []interceptors.Reason{"", "SOMETHING_ELSE", "\xff"} {
		err := &interceptors.RejectedError{Reason: reason}
		if status.Code(err) != codes.Unavailable || errors.Unwrap(err) != nil || errors.Is(err, interceptors.ErrRateLimited) || err.Error() == "" {
			t.Errorf("%q: %v, unwraps to %v", reason, status.Convert(err), errors.Unwrap(err))
		}
	}
}

// hostile are names that a peer, or the owner of a policy, may come up with.
var hostile = []string{
	"",
	strings.Repeat("x", 100_000),
	strings.Repeat("\xff", 1000),
	strings.Repeat("\xc3", 127) + "é" + strings.Repeat("y", 1000), // cut within a rune
	strings.Repeat("😀", 1000),
	strings.Repeat("\x00", 1000),
	strings.Repeat("\U000e0001", 1000), // not printable
	strings.Repeat("\"", 1000),
	"%s%d%!(EXTRA", "\r\n: x",
}

func TestDetailsAreSmallAndValidWhateverTheNames(t *testing.T) {
	for _, s := range sentinels {
		for _, name := range hostile {
			err := &interceptors.RejectedError{Method: name, Rule: name, Reason: s.reason, RetryAfter: time.Duration(1<<63 - 1)}
			st := err.GRPCStatus()
			if st.Code() != s.code || reasonOf(err) != s.reason {
				t.Errorf("%s, %.10q: the status has lost its details: %v", s.reason, name, st)
			}
			if _, err := proto.Marshal(st.Proto()); err != nil {
				t.Errorf("%s, %.10q: %v", s.reason, name, err)
			}
			size := 0
			for _, d := range st.Proto().GetDetails() {
				size += proto.Size(d)
			}
			if size >= 1024 {
				t.Errorf("%s, %.10q: %d bytes of details", s.reason, name, size)
			}
			if !utf8.ValidString(err.Error()) || len(err.Error()) > 2048 {
				t.Errorf("%s, %.10q: text of %d bytes", s.reason, name, len(err.Error()))
			}
		}
	}
}

// A handler that returns its own client's rejection passes the reason on, but
// not when to come back: that is for this process to heed.
func TestRejectionOfAClientInTheHandler(t *testing.T) {
	for _, wrap := range []func(error) error{
		func(err error) error { return err },
		func(err error) error { return fmt.Errorf("place order: %w", err) },
		func(err error) error { return errors.Join(errors.New("place order"), err) },
	} {
		eachServerArm(t, func(t *testing.T, a arm) {
			rejected := &interceptors.RejectedError{Side: interceptors.Client, Method: "/down.v1.Stream/Get", Rule: "down",
				Reason: interceptors.ReasonRateLimited, RetryAfter: time.Second}
			g, conn := a.setup(t, "breaker: {request_volume_threshold: 1}", bothKinds(func(context.Context, string) error { return wrap(rejected) }))
			var trailer metadata.MD
			err := a.call(t.Context(), conn, "", grpc.Trailer(&trailer))
			if status.Code(err) != codes.ResourceExhausted || reasonOf(err) != interceptors.ReasonRateLimited {
				t.Errorf("got %v, want the client's rejection", err)
			}
			if status.Convert(err).Message() != wrap(rejected).Error() {
				t.Errorf("got %q, want %q", status.Convert(err).Message(), wrap(rejected))
			}
			if detailOf[*errdetails.RetryInfo](err) != nil || detailOf[*errdetails.QuotaFailure](err) == nil {
				t.Errorf("details %v, want them without RetryInfo", status.Convert(err).Details())
			}
			checkPushback(t, trailer, 0)
			if c := a.state(t, g).Counts; c.Neutral != 1 || c.Admitted != 1 {
				t.Errorf("%+v, want neutral", c)
			}
			if rejected.RetryAfter != time.Second {
				t.Error("the error itself was changed")
			}
			checkIdle(t, g)
		})
	}
}

// Other errors of handlers are passed on as they are.
func TestErrorsOfHandlersPassUnchanged(t *testing.T) {
	detailed, err := status.New(codes.ResourceExhausted, "slow down").WithDetails(&errdetails.RetryInfo{}, &errdetails.DebugInfo{Detail: "d"})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		err  error
		want *status.Status
	}{
		{detailed.Err(), detailed},
		{errors.New("plain"), status.New(codes.Unknown, "plain")},
		{status.Error(codes.NotFound, "none"), status.New(codes.NotFound, "none")},
		{context.DeadlineExceeded, status.FromContextError(context.DeadlineExceeded)},
		{fmt.Errorf("wrapped: %w", context.Canceled), status.FromContextError(fmt.Errorf("wrapped: %w", context.Canceled))},
	} {
		eachServerArm(t, func(t *testing.T, a arm) {
			_, conn := a.setup(t, "breaker: {}", bothKinds(func(context.Context, string) error { return tt.err }))
			if got := status.Convert(a.call(t.Context(), conn, "")); !proto.Equal(got.Proto(), tt.want.Proto()) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestNames(t *testing.T) {
	if got := fmt.Sprint(interceptors.Client, interceptors.Server); got != "client server" {
		t.Error(got)
	}
	if got := fmt.Sprint(interceptors.Success, interceptors.Failure, interceptors.Neutral, interceptors.Dropped, interceptors.Outcome(9)); got != "success failure neutral dropped unknown" {
		t.Error(got)
	}
}
