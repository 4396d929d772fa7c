// Package interceptors puts circuit breakers, rate limits, concurrency limits,
// timeouts, panic recovery and a lossless drain around gRPC clients and
// servers, from one policy.
//
//	guard, err := interceptors.Load("policy.yaml")
//	if err != nil {
//		return err // every mistake of the file, each with its line and column
//	}
//	defer guard.Close()
//
//	conn, err := grpc.NewClient(target, guard.DialOptions(creds)...)
//
//	srv := grpc.NewServer(guard.ServerOptions()...)
//	err = guard.Serve(ctx, srv, listener) // until SIGTERM: drains, then returns
//
// # The path of a call
//
// Each method has gates of its own (on the client one set per target and
// method), made when it is first called. A call passes them in a fixed order:
// breaker (a look), rate limit, concurrency limit, breaker (acquire). A gate
// that says no ends the call with a [*RejectedError]; what earlier gates handed
// out is given back, except for tokens. When an admitted call ends, by result,
// panic, runtime.Goexit, cancellation or abandonment, its outcome is recorded
// and its permits are released, exactly once. After that, a fallback may answer
// a unary client call in place of the error (see [WithFallback] and [LastGood]).
//
// A method that no rule of the policy matches is not touched, but on a server
// its panics are recovered and its calls are known to the drain.
package interceptors
