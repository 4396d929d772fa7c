package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// runAsProgram makes the test binary, and its children, the program.
const runAsProgram = "QUICKSTART_TEST_RUN"

func TestMain(m *testing.M) {
	if os.Getenv(runAsProgram) != "" {
		os.Exit(run(os.Args[1:]))
	}
	os.Exit(m.Run())
}

// program is a run of the quickstart.
type program struct {
	t      *testing.T
	cmd    *exec.Cmd
	stdout bytes.Buffer
	stderr *bufio.Reader
	log    strings.Builder // of stderr

	shopPID int
	addr    string
}

func start(t *testing.T, args ...string) *program {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &program{t: t, cmd: exec.Command(self, args...)}
	p.cmd.Env = append(os.Environ(), runAsProgram+"=1")
	p.cmd.Stdout = &p.stdout
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.stderr = bufio.NewReader(stderr)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	})
	return p
}

// startWalk starts a walk whose shop is up.
func startWalk(t *testing.T) *program {
	t.Helper()
	p := start(t, "-quick", "-json")
	first := p.readUntil("shop server: ")
	if _, err := fmt.Sscanf(first, "shop server: pid %d at %s", &p.shopPID, &p.addr); err != nil {
		t.Fatalf("%q: %v", first, err)
	}
	return p
}

// readUntil reads stderr until a line that contains a text, and returns that.
func (p *program) readUntil(text string) string {
	p.t.Helper()
	for {
		line, err := p.stderr.ReadString('\n')
		p.log.WriteString(line)
		if strings.Contains(line, text) {
			return line
		}
		if err != nil {
			p.t.Fatalf("stderr ended without %q:\n%s", text, &p.log)
		}
	}
}

// end waits for the program and returns its exit code; its shop must be gone.
func (p *program) end() int {
	p.t.Helper()
	rest, err := io.ReadAll(p.stderr)
	if err != nil {
		p.t.Fatal(err)
	}
	p.log.Write(rest)
	err = p.cmd.Wait()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		p.t.Fatal(err)
	}
	if conn, err := net.Dial("tcp", p.addr); p.addr != "" && err == nil {
		_ = conn.Close()
		p.t.Error("the shop server was left behind")
	}
	return p.cmd.ProcessState.ExitCode()
}

func (p *program) rows() []row {
	p.t.Helper()
	var rows []row
	decoder := json.NewDecoder(&p.stdout)
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&rows); err != nil {
		p.t.Fatalf("stdout is not the table as JSON: %v", err)
	}
	if decoder.More() {
		p.t.Error("there is more than the table on stdout")
	}
	return rows
}

func TestEveryClaimHolds(t *testing.T) {
	p := startWalk(t)
	code := p.end()
	seen := map[string]bool{}
	for _, r := range p.rows() {
		if !r.OK {
			t.Errorf("%s: expected %s, counted %s", r.Claim, r.Expected, r.Counted)
		}
		if r.Claim == "" || r.Expected == "" || r.Counted == "" || seen[r.Claim] {
			t.Errorf("a claim must have a name of its own and figures: %+v", r)
		}
		seen[r.Claim] = true
	}
	for _, gate := range []string{"healthy", "outage", "heal", "hystrix", "fallback", "pacing", "rate limit", "concurrency", "panic", "drain", "rolling restart", "crash, Place without retry", "crash, Search with retry"} {
		if !strings.Contains(fmt.Sprint(seen), gate+": ") {
			t.Errorf("nothing is claimed of %q", gate)
		}
	}
	if code != exitOK || t.Failed() {
		t.Errorf("exit code %d\n%s", code, &p.log)
	}
	if want := fmt.Sprintf("shop server: pid %d, exit status 0\nall %d claims held\n", p.shopPID, len(seen)); !strings.HasSuffix(p.log.String(), want) {
		t.Errorf("it must end with\n%sbut\n%s", want, &p.log)
	}
}

// A server that crashes half way is what no claim survives.
func TestServerDies(t *testing.T) {
	p := startWalk(t)
	p.readUntil("2 Place fails")
	shop, err := os.FindProcess(p.shopPID)
	if err != nil {
		t.Fatal(err)
	}
	if err := shop.Kill(); err != nil {
		t.Fatal(err)
	}
	code := p.end()
	if rows := p.rows(); code != exitFailed || failed(rows) == 0 || rows[len(rows)-1].Counted != errGone.Error() {
		t.Errorf("exit code %d, %+v", code, rows)
	}
	for _, want := range []string{"signal: killed", "claims did not hold"} {
		if !strings.Contains(p.log.String(), want) {
			t.Errorf("%q is missing in\n%s", want, &p.log)
		}
	}
}

func TestInterrupted(t *testing.T) {
	p := startWalk(t)
	if err := p.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if code := p.end(); code != exitFailed {
		t.Errorf("exit code %d", code)
	}
	rows := p.rows()
	if last := rows[len(rows)-1]; last.OK || last.Counted != "context canceled" {
		t.Errorf("the last row is %+v", last)
	}
}

// A parent that is killed cannot clean up: its child must notice.
func TestParentKilled(t *testing.T) {
	p := startWalk(t)
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for began := time.Now(); time.Since(began) < 10*time.Second; {
		conn, err := net.Dial("tcp", p.addr)
		if err != nil {
			return // the port is closed
		}
		_, _ = io.Copy(io.Discard, conn) // until the shop, which waits for a handshake, ends it
		_ = conn.Close()
	}
	t.Error("the shop server was left behind")
}

func TestArguments(t *testing.T) {
	for _, tc := range []struct {
		args string
		code int
		says string
	}{
		{"-h", exitOK, "usage: quickstart [-quick] [-json]"},
		{"slow", exitUsage, `unknown argument "slow"`},
		{"-quick slow", exitUsage, `unknown argument "slow"`},
		{"-slow", exitUsage, "not defined: -slow"},
	} {
		p := start(t, strings.Fields(tc.args)...)
		code := p.end()
		if code != tc.code || !strings.Contains(p.log.String(), tc.says) || p.stdout.Len() > 0 {
			t.Errorf("%s: exit code %d, stdout %q, stderr\n%s", tc.args, code, &p.stdout, &p.log)
		}
	}
}

// A look at the guard may find a circuit open and log that, to the progress that
// is looking.
func TestProgressLogsWhatItFinds(t *testing.T) {
	policy, err := interceptors.Parse("test.yaml", []byte(`client: {rules: [{methods: ["*"], breaker: {engine: hystrix, request_volume_threshold: 1}}]}`))
	if err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	show := newProgress(out)
	guard, err := interceptors.New(policy, interceptors.WithLogger(slog.New(slog.NewTextHandler(show, nil))))
	if err != nil {
		t.Fatal(err)
	}
	defer guard.Close()
	show.guard = guard
	c, err := dial(guard, "127.0.0.1:1") // nobody is there
	if err != nil {
		t.Fatal(err)
	}
	defer c.conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := c.call(ctx, search); status.Code(err) != codes.Unavailable {
		t.Fatal(err)
	}
	for name := guard.HystrixName(interceptors.Client, c.conn.CanonicalTarget(), search); itsOwnWord(name) != "open" && ctx.Err() == nil; {
		pause(ctx, time.Millisecond)
	}
	shown := make(chan struct{})
	go func() {
		show.show()
		close(shown)
	}()
	select {
	case <-shown:
	case <-ctx.Done():
		t.Fatal("the progress waits for itself")
	}
	if text, err := os.ReadFile(out.Name()); err != nil || !strings.Contains(string(text), "circuit breaker open") {
		t.Errorf("%v, logged %q", err, text)
	}
}

func TestTable(t *testing.T) {
	rows := []row{{"a gate", "1 of 1", "1 of 1", true}, {"b", "none", "2", false}}
	var b strings.Builder
	if err := writeTable(&b, rows, false); err != nil {
		t.Fatal(err)
	}
	const want = `
CLAIM   EXPECTED  COUNTED  OK
a gate  1 of 1    1 of 1   yes
b       none      2        NO
`
	if b.String() != want {
		t.Errorf("got%swant%s", &b, want)
	}
	if n := failed(rows); n != 1 {
		t.Errorf("%d failed", n)
	}
}
