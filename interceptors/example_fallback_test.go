package interceptors_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// A call that fails, or is rejected, is answered without the server.
func ExampleWithFallback() {
	noStock := func(_ context.Context, _ string, _, reply any, _ error) error {
		reply.(*wrapperspb.Int64Value).Value = 0
		return nil
	}
	guard, conn := exampleShop(`
client:
  rules:
    - methods: ["/shop.v1.Orders/*"]
      breaker: {request_volume_threshold: 1}
`, interceptors.WithFallback("/shop.v1.Orders/Fail", noStock))
	defer guard.Close()
	defer conn.Close()

	for range 2 {
		stock := wrapperspb.Int64(-1)
		err := conn.Invoke(context.Background(), "/shop.v1.Orders/Fail", wrapperspb.String("tea"), stock)
		fmt.Println(stock.GetValue(), err)
	}
	counts := guard.Snapshot().Methods[0].Counts
	fmt.Println(counts.Failure, "failure, rejected:", counts.Rejected)
	// Output:
	// 0 <nil>
	// 0 <nil>
	// 1 failure, rejected: map[BREAKER_OPEN:1]
}

// A fallback may look at the cause, answer some calls, and give the others up.
func ExampleFallback() {
	var soldOut interceptors.Fallback = func(ctx context.Context, _ string, req, reply any, cause error) error {
		switch {
		case !errors.Is(cause, interceptors.ErrRateLimited):
			return cause // as if there were no fallback
		case req.(*wrapperspb.StringValue).GetValue() == "tea":
			reply.(*wrapperspb.StringValue).Value = "perhaps"
			return nil
		}
		return status.Error(codes.Unavailable, "ask again tomorrow")
	}
	guard, conn := exampleShop(`
client:
  rules:
    - methods: ["/shop.v1.Orders/*"]
      rate_limit: {requests_per_second: 0.001, burst: 1}
`, interceptors.WithFallback("/shop.v1.Orders/*", soldOut))
	defer guard.Close()
	defer conn.Close()

	for _, item := range []string{"tea", "tea", "salt"} {
		reply := new(wrapperspb.StringValue)
		err := conn.Invoke(context.Background(), "/shop.v1.Orders/Echo", wrapperspb.String(item), reply)
		fmt.Println(reply.GetValue(), err)
	}
	// Output:
	// tea <nil>
	// perhaps <nil>
	//  rpc error: code = Unavailable desc = ask again tomorrow
}

// The same question gets the answer that it got before. Echo tells everybody the
// same, so the request and its metadata are all that the answer depends on.
func ExampleLastGood() {
	guard, conn := exampleShop(`
client:
  rules:
    - methods: ["/shop.v1.Orders/*"]
      rate_limit: {requests_per_second: 0.001, burst: 1}
`, interceptors.LastGood("/shop.v1.Orders/Echo", interceptors.LastGoodConfig{MaxAge: 5 * time.Minute, Key: interceptors.WholeRequest}))
	defer guard.Close()
	defer conn.Close()

	for _, item := range []string{"tea", "tea", "salt"} {
		reply := new(wrapperspb.StringValue)
		err := conn.Invoke(context.Background(), "/shop.v1.Orders/Echo", wrapperspb.String(item), reply)
		fmt.Println(reply.GetValue(), errors.Is(err, interceptors.ErrRateLimited))
	}
	// Output:
	// tea false
	// tea false
	//  true
}

// The key has what the reply depends on, and nothing else: here who asks, which an
// interceptor further in tells the server, but not the time of the question.
func ExampleLastGoodConfig() {
	type user struct{}
	key := func(ctx context.Context, _ string, req any, _ []grpc.CallOption) (string, bool) {
		name, ok := ctx.Value(user{}).(string)
		question, _ := req.(*wrapperspb.StringValue)
		return fmt.Sprintf("%q %q", name, question.GetValue()), ok // not of anonymous calls
	}
	guard, conn := exampleShop(`
client:
  rules:
    - methods: ["/shop.v1.Orders/*"]
      rate_limit: {requests_per_second: 0.001, burst: 1}
`, interceptors.LastGood("*", interceptors.LastGoodConfig{MaxAge: time.Hour, MaxEntries: 10_000, Key: key}))
	defer guard.Close()
	defer conn.Close()

	for _, name := range []string{"alice", "alice", "bob"} {
		reply := new(wrapperspb.StringValue)
		ctx := context.WithValue(context.Background(), user{}, name)
		err := conn.Invoke(ctx, "/shop.v1.Orders/Echo", wrapperspb.String("my orders"), reply)
		fmt.Println(name, reply.GetValue(), errors.Is(err, interceptors.ErrRateLimited))
	}
	// Output:
	// alice my orders false
	// alice my orders false
	// bob  true
}
