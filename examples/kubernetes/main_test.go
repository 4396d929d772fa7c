package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	shopv1 "github.com/grpc-resilience/grpc-resilience/examples/shop/v1"
	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// podEnv makes the test binary a pod's server; its value is the podConfig.
const podEnv = "GRPC_RESILIENCE_TEST_POD"

// podConfig is a pod.
type podConfig struct {
	Addr   string        // where it listens; default: a port of its own
	Policy string        // in YAML; default: one with the default drain
	Age    time.Duration // of connections, at most; 0: any
}

func TestMain(m *testing.M) {
	text, ok := os.LookupEnv(podEnv)
	if !ok {
		os.Exit(m.Run())
	}
	if err := servePod(text); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// servePod is the program but for its flags, and for orders that take their time.
func servePod(text string) error {
	var config podConfig
	if err := json.Unmarshal([]byte(text), &config); err != nil {
		return err
	}
	policy, err := interceptors.Parse("policy.yaml", []byte(config.Policy))
	if err != nil {
		return err
	}
	guard, err := interceptors.New(policy)
	if err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(2) // the test is gone
	}()
	return serve(guard, config.Addr, config.Age, slowShop{&shop{pod: strconv.Itoa(os.Getpid())}})
}

// slowShop takes as long for an order as its number says.
type slowShop struct{ *shop }

const (
	quick = "0s"
	stuck = "stuck" // for ever, whatever its context says
)

func (s slowShop) Get(ctx context.Context, req *shopv1.GetRequest) (*shopv1.GetResponse, error) {
	if req.GetOrderId() == stuck {
		select {}
	}
	d, err := time.ParseDuration(req.GetOrderId())
	if err != nil {
		return nil, err
	}
	select {
	case <-time.After(d):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return s.shop.Get(ctx, req)
}

// pod is a server in a process of its own.
type pod struct {
	t     *testing.T
	cmd   *exec.Cmd
	addr  string
	name  string        // in its answers
	ended chan struct{} // closed when it has ended
	log   strings.Builder
}

// patience is how long a pod may take to do what it should do at once.
const patience = 10 * time.Second

// startPod starts a server that listens when startPod returns.
func startPod(t *testing.T, config podConfig) *pod {
	t.Helper()
	config.Addr, config.Policy = cmp.Or(config.Addr, "127.0.0.1:0"), cmp.Or(config.Policy, "server: {}")
	text, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	p := &pod{t: t, cmd: exec.Command(os.Args[0]), ended: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), podEnv+"="+string(text), "GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	if _, err := p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.name = strconv.Itoa(p.cmd.Process.Pid)
	listening := make(chan string, 1)
	go func() {
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			p.log.WriteString(lines.Text() + "\n")
			if _, addr, ok := strings.Cut(lines.Text(), "listening on "); ok {
				listening <- addr
			}
		}
		_ = p.cmd.Wait() // the exit code is in ProcessState
		close(p.ended)
	}()
	t.Cleanup(p.kill)
	select {
	case p.addr = <-listening:
	case <-p.ended:
		t.Fatalf("the pod did not start:\n%s", &p.log)
	case <-time.After(patience):
		t.Fatal("the pod does not start")
	}
	return p
}

func (p *pod) signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// kill ends the pod at once, if it still runs.
func (p *pod) kill() {
	_ = p.cmd.Process.Kill()
	<-p.ended
}

// exit waits for the pod's own end and returns its exit code.
func (p *pod) exit(within time.Duration) int {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(within):
		p.t.Fatalf("the pod does not end within %v", within)
	}
	return p.cmd.ProcessState.ExitCode()
}

func dial(t *testing.T, target string, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(target, append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// get gets one order and returns the pod that served it.
func get(ctx context.Context, conn *grpc.ClientConn, order string) (pod string, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	resp, err := shopv1.NewOrdersClient(conn).Get(ctx, &shopv1.GetRequest{OrderId: order})
	return strings.TrimPrefix(resp.GetOrder().GetCustomer(), "served by "), err
}

// ready asks as a kubelet does for a readinessProbe with grpc, each time on a
// connection of its own: only SERVING is a success.
func (p *pod) ready() bool {
	p.t.Helper()
	conn := dial(p.t, p.addr)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(p.t.Context(), patience)
	defer cancel()
	resp, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	return err == nil && resp.GetStatus() == healthpb.HealthCheckResponse_SERVING
}

// notReady waits until the pod is not ready.
func (p *pod) notReady() {
	p.t.Helper()
	for late := time.Now().Add(patience); p.ready(); {
		if time.Now().After(late) {
			p.t.Fatal("the pod is ready after SIGTERM")
		}
	}
}

// The program with the policy of the manifests, as its readiness probe, its
// clients and SIGTERM see it.
func TestPod(t *testing.T) {
	p := startPod(t, podConfig{Policy: readManifests(t).policyYAML()})
	conn := dial(t, p.addr)
	if _, err := get(t.Context(), conn, quick); err != nil {
		t.Fatal(err)
	}
	if !p.ready() {
		t.Error("it is not ready before SIGTERM")
	}
	p.signal(syscall.SIGTERM)
	p.notReady()
	for name, c := range map[string]*grpc.ClientConn{"an old": conn, "a new": dial(t, p.addr)} {
		if _, err := get(t.Context(), c, quick); err != nil {
			t.Errorf("announce: %s client gets %v", name, err)
		}
	}
	p.signal(os.Interrupt) // enough: the test does not wait for the phases
	if code := p.exit(patience); code != 0 {
		t.Errorf("exit code %d:\n%s", code, &p.log)
	}
}
