// Package supervise runs background goroutines that restart, as Erlang/OTP
// supervises its processes: a worker that ends with an error, a panic or
// runtime.Goexit is started again after a jittered exponential backoff, and one
// that fails too often is given up and escalates.
//
//	workers, err := supervise.New(
//		supervise.WithDraining(guard.Draining()),                // from grace on nothing is restarted
//		supervise.WithEscalation(func(error) { guard.Drain() }), // a worker that was given up ends the process
//	)
//	if err != nil {
//		return err
//	}
//	err = workers.Add(supervise.Worker{Name: "outbox", Run: publishOutbox}) // starts it
//	err = guard.Serve(ctx, srv, listener)
//	err = workers.Stop(context.Background()) // the last added first
//
// # How a worker ends
//
// What becomes of a worker whose Run has ended, in this order:
//
//   - [Supervisor.Stop] has begun, or the supervisor drains: nothing, whatever the end was
//   - Run returned an error that wraps [ErrEscalate]: it is given up and escalates
//   - it is [Temporary], or [Transient] and Run returned nil: it has ended
//   - it was restarted as often as [WithIntensity] allows: it is given up and escalates
//   - otherwise it is restarted, when its backoff ([WithBackoff]) is over
//
// A permanent worker whose Run returns nil is no exception to the last two: it
// backs off, and it escalates when it does so too often.
//
// The context of a run ends with the run: what Run has started with it is told to
// end before the next run begins.
//
// # What it does not do
//
// Go cannot end a goroutine from outside: a worker that ignores its context is
// abandoned by Stop, which names it. Nor can a fatal error of the runtime be
// contained, such as concurrent writes to a map, or a panic in a goroutine that
// a worker has started with a plain go statement: use [Go] there.
//
// A worker's end affects no other worker (OTP's one_for_one). Those that can only
// live together are the workers of a supervisor that is a worker itself, see
// [Supervisor.Run]: with an intensity of 0 the first end stops them all, and they
// start anew together (one_for_all).
package supervise
