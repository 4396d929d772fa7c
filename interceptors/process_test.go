package interceptors_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

// The environment of a test binary that is run as the server.
const (
	processPolicy  = "GRPC_RESILIENCE_TEST_POLICY" // in YAML; set: be the server
	processAddr    = "GRPC_RESILIENCE_TEST_ADDR"
	processMode    = "GRPC_RESILIENCE_TEST_MODE"    // words, see TestServerProcess
	processLedgers = "GRPC_RESILIENCE_TEST_LEDGERS" // a directory
)

// TestServerProcess is the server of the tests below. It tells its address, the
// calls that it begins and what the guard logs on standard output, and answers
// calls of "held" when standard input is closed. Words of its mode:
//
//	context   SIGTERM ends the context of Serve
//	early     and does before Serve
//	tls       it wants TLS
//	rolling   it is a ledgerService and leaves its ledger
//	stop      plain gRPC, stopped by SIGTERM
//	count     plain gRPC, which after SIGTERM exits when no call is in flight
func TestServerProcess(t *testing.T) {
	policy, ok := os.LookupEnv(processPolicy)
	if !ok {
		t.Skip("not the server process")
	}
	lis, err := net.Listen("tcp", os.Getenv(processAddr))
	if err != nil {
		t.Fatal(err)
	}
	released := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(released)
		time.AfterFunc(20*time.Second, func() { os.Exit(2) }) // not to outlive the test
	}()
	var out sync.Mutex
	say := func(what string) {
		out.Lock()
		defer out.Unlock()
		fmt.Println(what)
	}
	mode := func(word string) bool { return slices.Contains(strings.Fields(os.Getenv(processMode)), word) }
	opts := []interceptors.Option{interceptors.WithLogger(slog.New(slog.NewTextHandler(os.Stdout, nil)))}
	if mode("context") {
		opts = append(opts, interceptors.WithSignals(os.Interrupt))
	}
	guard := mustGuard(t, policy, opts...)
	service := &rpctest.Service{
		Unary: func(ctx context.Context, req *rpctest.Message) (*rpctest.Message, error) {
			switch text, _, _ := strings.Cut(req.GetValue(), " "); text {
			case "held":
				say("began " + text)
				select {
				case <-released:
				case <-ctx.Done():
					return nil, ctx.Err()
				}
			case "stuck":
				say("began " + text)
				select {}
			}
			return req, nil
		},
		Stream: func(ss grpc.ServerStream) error {
			text, err := rpctest.Recv(ss)
			if err != nil {
				return err
			}
			say("began stream")
			return streamOfProcess(text, guard, ss)
		},
	}
	var done ledger
	if mode("rolling") {
		service = ledgerService(guard, fmt.Sprint(os.Getpid()), &done)
	}
	var extra []grpc.ServerOption
	if mode("tls") {
		extra = append(extra, grpc.Creds(serverTLS(t)))
	}
	srv := rpctest.NewServer(service, guard.ServerOptions(extra...)...)

	if mode("stop") || mode("count") {
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM)
		go func() {
			<-c
			say("phase=grace")
			for mode("count") && guard.Snapshot().Drain.InFlight > 0 {
				runtime.Gosched()
			}
			if mode("count") {
				os.Exit(0)
			}
			srv.Stop()
		}()
		say("listening " + lis.Addr().String())
		if err := srv.Serve(lis); err != nil {
			t.Fatal(err)
		}
		return
	}
	ctx := context.Background()
	if mode("context") {
		var stop context.CancelFunc
		ctx, stop = signal.NotifyContext(ctx, syscall.SIGTERM)
		defer stop()
	}
	// A client's first call waits until the server accepts; a signal must come
	// after a call.
	say("listening " + lis.Addr().String())
	if mode("early") {
		<-ctx.Done()
	}
	if err := guard.Serve(ctx, srv, lis); err != nil {
		t.Fatalf("Serve: %v", err)
	}
	if dir := os.Getenv(processLedgers); dir != "" {
		if err := os.WriteFile(fmt.Sprintf("%s/%d", dir, os.Getpid()), []byte(done.String()), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	os.Exit(0) // at once: what is not on its way yet is lost
}

// streamOfProcess is what a stream does that began with a text.
func streamOfProcess(text string, guard *interceptors.Guard, ss grpc.ServerStream) error {
	switch text {
	case "deaf":
		select {}
	case "receives":
		_, err := rpctest.Recv(ss)
		return err
	case "sends":
		for {
			if err := rpctest.Send(ss, "more"); err != nil {
				return err
			}
			time.Sleep(time.Millisecond)
		}
	case "floods":
		for {
			if err := rpctest.Send(ss, strings.Repeat("x", 4<<20-100)); err != nil {
				return err
			}
		}
	}
	<-guard.Draining()
	return rpctest.Send(ss, "bye")
}

// patience is how long a process may take to do what it should do at once.
const patience = 10 * time.Second

// process is a server of its own.
type process struct {
	t       *testing.T
	cmd     *exec.Cmd
	addr    string
	release io.Closer // answers the calls that are held

	lines  chan string
	output strings.Builder // all lines so far
}

// startProcess starts a server on addr, which may be "127.0.0.1:0".
func startProcess(t *testing.T, addr, mode, policy string, env ...string) *process {
	t.Helper()
	p := &process{t: t, cmd: exec.Command(os.Args[0], "-test.run=^TestServerProcess$", "-test.v"), lines: make(chan string, 1000)}
	p.cmd.Env = append(append(os.Environ(), env...), processPolicy+"="+policy, processAddr+"="+addr, processMode+"="+mode,
		"GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE")) // the race detector's 1s at the exit of each
	p.cmd.Stderr = os.Stderr
	in, err := p.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.release = in
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.cmd.Process.Kill() }) // fails if it has ended
	go func() {
		defer close(p.lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			p.lines <- s.Text()
		}
	}()
	p.addr = strings.TrimPrefix(p.expect("listening "), "listening ")
	return p
}

// expect waits for a line with a text in it.
func (p *process) expect(text string) string {
	p.t.Helper()
	late := time.After(patience)
	for {
		select {
		case line, ok := <-p.lines:
			if !ok {
				p.t.Fatalf("the server ended without saying %q:\n%s", text, &p.output)
			}
			p.output.WriteString(line + "\n")
			if strings.Contains(line, text) {
				return line
			}
		case <-late:
			p.t.Fatalf("the server does not say %q:\n%s", text, &p.output)
		}
	}
}

// name is how a ledgerService of the process calls itself.
func (p *process) name() string { return fmt.Sprint(p.cmd.Process.Pid) }

func (p *process) signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// exit waits for the end of the process, checks its exit code, and returns all
// that it said.
func (p *process) exit(code int) string {
	p.t.Helper()
	late := time.After(patience)
	for open := true; open; {
		var line string
		select {
		case line, open = <-p.lines:
			p.output.WriteString(line + "\n")
		case <-late:
			p.t.Fatalf("the server does not end:\n%s", &p.output)
		}
	}
	var failed *exec.ExitError
	if err := p.cmd.Wait(); err != nil && !errors.As(err, &failed) {
		p.t.Fatal(err)
	}
	if got := p.cmd.ProcessState.ExitCode(); got != code {
		p.t.Errorf("exit code %d, want %d:\n%s", got, code, &p.output)
	}
	return p.output.String()
}

func dialProcess(t *testing.T, target string, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(target, append([]grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// begin makes a unary call that is in flight when begin returns.
func (p *process) begin(conn *grpc.ClientConn, text string) <-chan error {
	p.t.Helper()
	done := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(p.t.Context(), patience)
		defer cancel()
		answer, err := rpctest.Call(ctx, conn, rpctest.Unary, text)
		if err == nil && answer != text {
			err = fmt.Errorf("the answer is %.20q", answer)
		}
		done <- err
	}()
	word, _, _ := strings.Cut(text, " ")
	p.expect("began " + word)
	return done
}

func TestProcessAnswersEverythingAfterSIGTERM(t *testing.T) {
	p := startProcess(t, "127.0.0.1:0", "", "server: {drain: {announce: 300ms, grace: 10s}}")
	conn := dialProcess(t, p.addr)
	var calls []<-chan error
	for range 20 {
		calls = append(calls, p.begin(conn, "held"))
	}
	var streams []grpc.ClientStream
	for range 5 {
		s, err := rpctest.Open(t.Context(), conn, rpctest.Bidi)
		if err != nil {
			t.Fatal(err)
		}
		if err := rpctest.Send(s, "hello"); err != nil {
			t.Fatal(err)
		}
		p.expect("began stream")
		streams = append(streams, s)
	}
	p.signal(syscall.SIGTERM)
	p.expect("phase=announce in_flight=25")
	check, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil || check.GetStatus() != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("health in announce: %v, %v", check, err)
	}
	if _, err := rpctest.Call(t.Context(), conn, rpctest.Unary, "quick"); err != nil {
		t.Errorf("a new call in announce: %v", err)
	}
	p.signal(syscall.SIGTERM) // kubelet repeats it
	p.expect("phase=grace")
	p.signal(syscall.SIGTERM)
	for _, s := range streams {
		if text, err := rpctest.Recv(s); text != "bye" || err != nil {
			t.Errorf("stream: %q, %v", text, err)
		}
		if _, err := rpctest.Recv(s); err != io.EOF {
			t.Errorf("the stream ended with %v", err)
		}
	}
	_ = p.release.Close()
	for _, c := range calls {
		if err := <-c; err != nil {
			t.Errorf("unary: %v", err)
		}
	}
	p.exit(0)
}

func TestProcessSIGINTSkipsAnnounce(t *testing.T) {
	p := startProcess(t, "127.0.0.1:0", "", "server: {drain: {announce: 1m, grace: 1m}}")
	call := p.begin(dialProcess(t, p.addr), "held")
	p.signal(os.Interrupt)
	p.expect("phase=grace in_flight=1")
	_ = p.release.Close()
	if err := <-call; err != nil {
		t.Error(err)
	}
	p.exit(0)
}

// With signal.NotifyContext one Ctrl-C ends the context and is a SIGINT too, in
// either order: it must not cut.
func TestCase34_ContextEndsAndSIGINTComes(t *testing.T) {
	for _, again := range []bool{false, true} {
		p := startProcess(t, "127.0.0.1:0", "context", "server: {drain: {announce: 1m, grace: 1m}}")
		call := p.begin(dialProcess(t, p.addr), "held")
		p.signal(syscall.SIGTERM)
		p.expect("phase=announce")
		p.signal(os.Interrupt)
		p.expect("phase=grace in_flight=1")
		if again {
			p.signal(os.Interrupt)
		} else {
			_ = p.release.Close()
		}
		if err := <-call; again != (err != nil) {
			t.Errorf("a second SIGINT: %v; the call ended with %v", again, err)
		}
		p.exit(map[bool]int{false: 0, true: 1}[again])
	}
}

// The other way round the SIGINT skips announce, and the next one cuts.
func TestCase34_SIGINTComesAndContextEnds(t *testing.T) {
	p := startProcess(t, "127.0.0.1:0", "context", "server: {drain: {announce: 1m, grace: 1m}}")
	call := p.begin(dialProcess(t, p.addr), "held")
	p.signal(os.Interrupt)
	p.expect("phase=grace in_flight=1")
	p.signal(syscall.SIGTERM) // ends the context
	p.signal(os.Interrupt)
	wantCut(t, "the call in flight", <-call)
	p.exit(1)
}

func TestCase34_SIGTERMIsRepeatedInEachPhase(t *testing.T) {
	t.Parallel()
	p := startProcess(t, "127.0.0.1:0", "", "server: {drain: {announce: 200ms, grace: 200ms, cut: 2s}}")
	call := p.begin(dialProcess(t, p.addr), "stuck")
	for _, phase := range []string{"announce", "grace", "cut"} {
		p.signal(syscall.SIGTERM)
		p.expect("phase=" + phase)
	}
	p.signal(syscall.SIGTERM)
	wantCut(t, "the call in flight", <-call)
	said := p.exit(1)
	for _, want := range []string{"drain abandons handlers that ignore their context", "phase=stopped"} {
		if !strings.Contains(said, want) {
			t.Errorf("the server does not say %q:\n%s", want, said)
		}
	}
}

// A signal before Serve is the program's: where it ends the context, Serve drains at
// once; where nobody waits for it, it ends the process.
func TestCase34_SignalBeforeServe(t *testing.T) {
	for mode, code := range map[string]int{"context early": 0, "early": -1} {
		p := startProcess(t, "127.0.0.1:0", mode, "server: {drain: {announce: 100ms}}")
		p.signal(syscall.SIGTERM)
		if code == 0 {
			p.expect("phase=announce")
			if _, err := rpctest.Call(t.Context(), dialProcess(t, p.addr), rpctest.Unary, "quick"); err != nil {
				t.Errorf("a call in announce: %v", err)
			}
		}
		p.exit(code)
	}
}

func TestCase32_HealthWatchOverTCP(t *testing.T) {
	p := startProcess(t, "127.0.0.1:0", "", "server: {drain: {announce: 100ms, grace: 1m}}")
	conn := dialProcess(t, p.addr)
	watches := map[healthpb.HealthCheckResponse_ServingStatus]healthpb.Health_WatchClient{}
	for first, service := range map[healthpb.HealthCheckResponse_ServingStatus]string{up: "", unknown: "nobody"} {
		w, err := healthpb.NewHealthClient(conn).Watch(t.Context(), &healthpb.HealthCheckRequest{Service: service})
		if err != nil {
			t.Fatal(err)
		}
		if m, err := w.Recv(); err != nil || m.GetStatus() != first {
			t.Errorf("%q: %v, %v", service, m, err)
		}
		watches[first] = w
	}
	p.signal(syscall.SIGTERM)
	for first, w := range watches {
		if got, err := statusesOf(w); !slices.Equal(got, []healthpb.HealthCheckResponse_ServingStatus{down}) || status.Code(err) != codes.Unavailable {
			t.Errorf("after %v: %v, %v", first, got, err)
		}
	}
	p.exit(0)
}

func TestCase33_StuckStreamsOverTCP(t *testing.T) {
	t.Parallel()
	p := startProcess(t, "127.0.0.1:0", "", "server: {drain: {announce: 0s, grace: 200ms, cut: 3s}}")
	streams := map[string]grpc.ClientStream{}
	for _, a := range []struct {
		text, method string
		half         bool // the client sends nothing more
	}{
		{"deaf", rpctest.ServerStream, true},
		{"receives", rpctest.Bidi, false},
		{"sends", rpctest.Bidi, true},
		{"floods", rpctest.ServerStream, true},
	} {
		s, err := rpctest.Open(t.Context(), dialProcess(t, p.addr), a.method)
		if err != nil {
			t.Fatal(err)
		}
		if err := rpctest.Send(s, a.text); err != nil {
			t.Fatal(err)
		}
		if a.half {
			_ = s.CloseSend()
		}
		p.expect("began stream")
		streams[a.text] = s
	}
	p.signal(syscall.SIGTERM)
	for text, s := range streams {
		if text == "floods" {
			continue // is not read
		}
		var err error
		for err == nil {
			_, err = rpctest.Recv(s)
		}
		wantCut(t, text, err)
	}
	said := p.exit(1)
	for _, want := range []string{"Serve: interceptors: the drain cut 4 calls: ", "/test.v1.Test/ServerStream (age ", "/test.v1.Test/Bidi (age ", "peer 127.0.0.1:"} {
		if !strings.Contains(said, want) {
			t.Errorf("the server does not say %q:\n%s", want, said)
		}
	}
}

func TestCase34_SIGINTCutsInEachPhase(t *testing.T) {
	for _, c := range []struct {
		phase, policy, call string
		first               os.Signal
	}{
		{"announce", "announce: 1m, grace: 1m, cut: 1m", "held", syscall.SIGTERM},
		{"grace", "announce: 0s, grace: 1m, cut: 1m", "held", syscall.SIGTERM},
		{"grace", "announce: 1m, grace: 1m, cut: 1m", "held", os.Interrupt},
		{"cut", "announce: 0s, grace: 0s, cut: 300ms", "stuck", syscall.SIGTERM},
	} {
		t.Run(fmt.Sprintf("%v, then SIGINT in %s", c.first, c.phase), func(t *testing.T) {
			p := startProcess(t, "127.0.0.1:0", "", "server: {drain: {"+c.policy+"}}")
			call := p.begin(dialProcess(t, p.addr), c.call)
			p.signal(c.first)
			p.expect("phase=" + c.phase)
			p.signal(os.Interrupt)
			if err := <-call; status.Code(err) != codes.Unavailable {
				t.Fatalf("the call that was cut: %v", err)
			}
			said := p.exit(1)
			for _, want := range []string{`msg="drain cuts a call" method=/test.v1.Test/Unary`, "Serve: interceptors: the drain cut 1 calls: /test.v1.Test/Unary (age "} {
				if !strings.Contains(said, want) {
					t.Errorf("the server does not say %q:\n%s", want, said)
				}
			}
		})
	}
}
