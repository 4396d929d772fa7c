package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"runtime/pprof"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/failsafe-go/failsafe-go/failsafegrpc"
	"github.com/google/pprof/profile"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/ratelimit"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// A wire is a server and a channel to it, each with limits.
type wire struct {
	name    string
	dial    func(limits) []grpc.DialOption
	serve   func(limits) []grpc.ServerOption
	refused gate // for which the server refuses each call; "": none
	streams bool // has something to do on streams
}

const product = "grpc-resilience"

var wires = []wire{
	{name: "bare", dial: noDial, serve: noServe, streams: true},
	{name: "bare, once more", dial: noDial, serve: noServe, streams: true},
	{name: product, serve: oursServe, streams: true, dial: func(l limits) []grpc.DialOption { return guard(l, breakerBlock, limitBlocks).DialOptions() }},
	{name: "failsafe-go", serve: failsafeServe, dial: func(l limits) []grpc.DialOption {
		return []grpc.DialOption{grpc.WithUnaryInterceptor(failsafeOnClient(l))}
	}},
	{name: "go-grpc-middleware", serve: middlewareServe, streams: true, dial: func(l limits) []grpc.DialOption {
		limiter := newXRate(l)
		return []grpc.DialOption{grpc.WithUnaryInterceptor(ratelimit.UnaryClientInterceptor(limiter)), grpc.WithStreamInterceptor(ratelimit.StreamClientInterceptor(limiter))}
	}},
	{name: product + ": RATE_LIMITED", dial: noDial, serve: oursServe, refused: rateLimited},
	{name: product + ": BREAKER_OPEN", dial: noDial, serve: oursServe, refused: breakerOpen},
	{name: "failsafe-go interceptor: rate limit", dial: noDial, serve: failsafeServe, refused: rateLimited},
	{name: "failsafe-go tap handle: rate limit", dial: noDial, refused: rateLimited, serve: func(l limits) []grpc.ServerOption {
		return []grpc.ServerOption{grpc.InTapHandle(failsafegrpc.NewServerInHandle(failsafePolicies(l)[0]))}
	}},
	{name: "go-grpc-middleware: rate limit", dial: noDial, serve: middlewareServe, refused: rateLimited},
}

func noDial(limits) []grpc.DialOption    { return nil }
func noServe(limits) []grpc.ServerOption { return nil }
func oursServe(l limits) []grpc.ServerOption {
	return guard(l, breakerBlock, limitBlocks).ServerOptions()
}

func failsafeServe(l limits) []grpc.ServerOption {
	return []grpc.ServerOption{grpc.UnaryInterceptor(failsafeOnServer(l))}
}

func middlewareServe(l limits) []grpc.ServerOption {
	limiter := newXRate(l)
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(recovery.UnaryServerInterceptor(), ratelimit.UnaryServerInterceptor(limiter)),
		grpc.ChainStreamInterceptor(recovery.StreamServerInterceptor(), ratelimit.StreamServerInterceptor(limiter)),
	}
}

// start serves the wire on a port of its own.
func (w wire) start(l limits) (addr string, stop func()) {
	srv, lis := grpc.NewServer(w.serve(l)...), must(net.Listen("tcp", "127.0.0.1:0"))
	srv.RegisterService(&service, nil)
	go func() { _ = srv.Serve(lis) }()
	return lis.Addr().String(), srv.Stop
}

func (w wire) connect(addr string, l limits) *grpc.ClientConn {
	return must(grpc.NewClient(addr, append(w.dial(l), grpc.WithTransportCredentials(insecure.NewCredentials()))...))
}

// service echoes messages, and does what words ask for.
var service = grpc.ServiceDesc{
	ServiceName: "bench.v1.Bench",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{MethodName: "Unary", Handler: func(_ any, ctx context.Context, decode func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
		req := new(wrapperspb.BytesValue)
		if err := decode(req); err != nil {
			return nil, err
		}
		handle := func(_ context.Context, req any) (any, error) { return answer(req.(*wrapperspb.BytesValue)) }
		if intercept == nil {
			return handle(ctx, req)
		}
		return intercept(ctx, req, &grpc.UnaryServerInfo{FullMethod: method}, handle)
	}}},
	Streams: []grpc.StreamDesc{{StreamName: bidi.StreamName, ServerStreams: true, ClientStreams: true, Handler: func(_ any, ss grpc.ServerStream) error {
		for m := new(wrapperspb.BytesValue); ss.RecvMsg(m) == nil; m = new(wrapperspb.BytesValue) {
			if err := ss.SendMsg(m); err != nil {
				return err
			}
		}
		return nil
	}}},
}

var serverProfile bytes.Buffer

func answer(req *wrapperspb.BytesValue) (*wrapperspb.BytesValue, error) {
	switch string(req.Value) {
	case "fail":
		return nil, errDown
	case "cpu":
		return wrapperspb.Bytes(strconv.AppendInt(nil, int64(cpuTime()), 10)), nil
	case "profile":
		serverProfile.Reset()
		return req, pprof.StartCPUProfile(&serverProfile)
	case "stop":
		pprof.StopCPUProfile()
		return wrapperspb.Bytes(serverProfile.Bytes()), nil
	}
	return req, nil
}

func ask(conn *grpc.ClientConn, word string) []byte {
	reply := new(wrapperspb.BytesValue)
	must(0, conn.Invoke(context.Background(), method, wrapperspb.Bytes([]byte(word)), reply))
	return reply.Value
}

// childEnv makes this program the server, a process of its own: so the CPU of the two
// sides can be told apart, and neither collects the other's garbage.
const childEnv = "GRPC_RESILIENCE_BENCHMARK_SERVER"

// serveWires says on which ports, in the order of wires, and ends with its input.
func serveWires(in io.Reader, out io.Writer) {
	for _, w := range wires {
		l := wide
		if w.refused != "" {
			l = l.narrow(w.refused)
		}
		addr, _ := w.start(l)
		fmt.Fprintln(out, addr)
	}
	_, _ = io.Copy(io.Discard, in)
}

// connectAll starts the child and connects to each wire.
func connectAll() (conns []*grpc.ClientConn, end func()) {
	cmd := exec.Command(must(os.Executable()))
	cmd.Env, cmd.Stderr = append(os.Environ(), childEnv+"=1"), os.Stderr
	in, out := must(cmd.StdinPipe()), must(cmd.StdoutPipe())
	must(0, cmd.Start())
	for _, w := range wires {
		var addr string
		must(fmt.Fscanln(out, &addr))
		conns = append(conns, w.connect(addr, wide))
	}
	return conns, func() {
		for _, c := range conns {
			c.Close()
		}
		in.Close()
		must(0, cmd.Wait())
	}
}

// A job is what a wire does in each round, and what came of it.
type job struct {
	name string
	each int
	open func() (one func() error, end func()) // what a caller does, again and again

	rate        series // a second
	cpu, server series // s of both processes, and of the server, for 100,000
	p50, p99    series // µs
}

// drive lets so many callers do it at once.
func (j *job) drive(callers int, control *grpc.ClientConn) {
	serverCPU := func() time.Duration {
		return time.Duration(must(strconv.ParseInt(string(ask(control, "cpu")), 10, 64)))
	}
	took := make([]series, callers) // µs
	var all sync.WaitGroup
	served, used, start := serverCPU(), cpuTime(), time.Now()
	for i := range took {
		all.Go(func() {
			one, end := j.open()
			defer end()
			for range j.each {
				began := time.Now()
				if err := one(); err != nil {
					log.Panicf("%s: %v", j.name, err)
				}
				took[i] = append(took[i], float64(time.Since(began))/1e3)
			}
		})
	}
	all.Wait()
	wall, own, theirs := time.Since(start), cpuTime()-used, serverCPU()-served
	calls := slices.Concat(took...)
	per := 1e5 / float64(len(calls))
	j.rate = append(j.rate, float64(len(calls))/wall.Seconds())
	j.cpu, j.server = append(j.cpu, (own+theirs).Seconds()*per), append(j.server, theirs.Seconds()*per)
	j.p50, j.p99 = append(j.p50, calls.median()), append(j.p99, calls.quantile(0.99))
}

var message = wrapperspb.Bytes(bytes.Repeat([]byte("x"), 100))

func unaryJob(w wire, conn *grpc.ClientConn, set settings) *job {
	call := func() error {
		err := conn.Invoke(context.Background(), method, message, new(wrapperspb.BytesValue))
		if w.refused == "" {
			return err
		}
		if err == nil {
			return errors.New("was admitted")
		}
		return nil
	}
	for range 50 {
		if w.refused != "" { // takes the token, opens the breaker
			_ = conn.Invoke(context.Background(), method, wrapperspb.Bytes([]byte("fail")), new(wrapperspb.BytesValue))
		}
	}
	return &job{name: w.name, each: set.calls, open: func() (func() error, func()) { return call, func() {} }}
}

// streamJob sends a message when the last one was answered.
func streamJob(w wire, conn *grpc.ClientConn, set settings) *job {
	return &job{name: w.name, each: set.messages, open: func() (func() error, func()) {
		s := must(conn.NewStream(context.Background(), bidi, streamMethod))
		return func() error {
				if err := s.SendMsg(message); err != nil {
					return err
				}
				return s.RecvMsg(new(wrapperspb.BytesValue))
			}, func() {
				must(s, s.CloseSend())
				if err := s.RecvMsg(new(wrapperspb.BytesValue)); err != io.EOF {
					log.Panicf("%s: the end of a stream: %v", w.name, err)
				}
			}
	}}
}

// endToEnd measures real calls between two processes.
func endToEnd(r *report, set settings) {
	conns, end := connectAll()
	defer end()
	var calls, refused, streams []*job
	for i, w := range wires {
		if w.refused == "" {
			calls = append(calls, unaryJob(w, conns[i], set))
		} else {
			refused = append(refused, unaryJob(w, conns[i], set))
		}
		if w.streams {
			streams = append(streams, streamJob(w, conns[i], set))
		}
	}
	jobs := slices.Concat(calls, refused, streams)
	for round := range set.wireRounds {
		progress("end to end: round %d of %d", round+1, set.wireRounds)
		for _, i := range rand.Perm(len(jobs)) {
			jobs[i].drive(set.callers, conns[0])
		}
	}

	bare := calls[0]
	compare := func(jobs []*job) {
		var rows [][]string
		for _, j := range jobs {
			rows = append(rows, []string{j.name, spread(j.rate), spread(j.cpu), spread(ratio(j.cpu, jobs[0].cpu)), spread(j.p50), spread(j.p99)})
		}
		r.table([]string{"", "a second", "CPU, s", "× bare", "p50, µs", "p99, µs"}, rows)
	}
	r.section("End to end", fmt.Sprintf("Real calls of 100 bytes over TCP on 127.0.0.1 by %d callers, each of whom makes the next call when it has the answer, over one channel; client and server are two processes on the same cores. "+
		"CPU is of both, for 100,000 calls. %q is the same as %q: how far its ratio is from 1 is what the others may be off by chance. "+
		"That is more than a guard takes, so its budget is judged by CPU profiles: samples in its functions, and in what they call but gRPC and this program, and what this program takes more than for bare calls (gRPC's generated code makes a closure for any interceptor).", set.callers, calls[1].name, bare.name))
	compare(calls)
	r.notes([][]string{
		{product, "breaker, token bucket and concurrency limit on both sides; on the server recovery and the record of calls in flight."},
		{"failsafe-go", "rate limiter, bulkhead and circuit breaker on both sides."},
		{"go-grpc-middleware", "ratelimit on both sides, recovery on the server; it has no breaker and no concurrency limit."},
	})
	r.text(fmt.Sprintf("Messages of bidirectional streams, %d a stream, each sent when the one before was answered. failsafe-go has no streams.", set.messages))
	compare(streams)
	r.text("Refused calls are sent, read by the server and refused there. The handler of a bare call does nothing, so a bare call is reading, answering and system calls alone, and so is most of a refused one: " +
		"an interceptor is asked when gRPC has read the call. A tap handle is asked before; what it refuses has no details and no trailers, and is PERMISSION_DENIED unless it says otherwise.")
	var rows [][]string
	for _, j := range append([]*job{bare}, refused...) {
		rows = append(rows, []string{j.name, spread(j.rate), spread(j.server), spread(ratio(j.server, bare.server)), spread(j.cpu), spread(ratio(j.cpu, bare.cpu))})
	}
	r.table([]string{"", "a second", "server's CPU, s", "× bare", "CPU of both, s", "× bare"}, rows)

	both := func(j *job) (client, server *profile.Profile) {
		ask(conns[0], "profile")
		client = profiled(set.profile, func() { j.drive(set.callers, conns[0]) })
		return client, must(profile.ParseData(ask(conns[0], "stop")))
	}
	refusals, bareServer := ratio(refused[0].server, bare.server), bare.server.median() // profiles drive the jobs on
	merged := func(j *job) *profile.Profile {
		client, server := both(j)
		return must(profile.Merge([]*profile.Profile{client, server}))
	}
	var guarded []*profile.Profile
	var parts series
	for range set.repeats {
		p := merged(calls[2])
		guard, program := takes(p)
		_, without := takes(merged(bare))
		more := guard + program - without
		guarded, parts = append(guarded, p), append(parts, more/(1-more))
	}
	r.check("a unary call over TCP, both sides guarded: what the guards add to its CPU, in CPU profiles", parts, 0.03, " ×", func() *profile.Profile { return must(profile.Merge(guarded)) })
	r.check("a call that the server refuses: its CPU, against a bare call's", refusals, 0.25, " ×", func() *profile.Profile {
		_, server := both(refused[0])
		return server
	})
	list := moreRefusals()
	s, free := list[slices.IndexFunc(list, func(no refusal) bool { return no.name == onTheWire })].subject()
	defer free()
	guards := s.at(1)
	cpu := measure("refusal", guards, set.wireRounds, set.batch)[guards[0].key()].cpu
	var guardsPart series
	for _, ns := range cpu {
		guardsPart = append(guardsPart, ns*1e5/1e9/bareServer)
	}
	r.check("of that, the guard's part and the making of the status", guardsPart, 0.25, " ×", nil)
}
