package main

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
)

// traffic is callers that call at a steady pace, and what came of it.
type traffic struct {
	stop    context.CancelFunc
	callers sync.WaitGroup
	n       int // callers

	mu       sync.Mutex
	answered map[string]int       // guarded by mu; by pod
	first    map[string]time.Time // guarded by mu; when its first answer came
	latest   map[string]time.Time // guarded by mu
	lost     int                  // guarded by mu
	err      error                // guarded by mu; of the first call that was lost
}

// newTraffic starts n callers for each channel.
func newTraffic(t *testing.T, n int, conns ...*grpc.ClientConn) *traffic {
	t.Helper()
	tr := &traffic{n: n * len(conns)}
	tr.tally()
	var ctx context.Context
	ctx, tr.stop = context.WithCancel(t.Context())
	t.Cleanup(tr.end)
	for _, conn := range slices.Repeat(conns, n) {
		tr.callers.Go(func() {
			ticker := time.NewTicker(pace)
			defer ticker.Stop()
			for ctx.Err() == nil {
				tr.call(t.Context(), conn)
				<-ticker.C
			}
		})
	}
	return tr
}

func (tr *traffic) call(ctx context.Context, conn *grpc.ClientConn) {
	pod, err := get(ctx, conn, quick)
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if err != nil {
		tr.lost++
		if tr.err == nil {
			tr.err = err
		}
		return
	}
	tr.answered[pod]++
	tr.latest[pod] = time.Now()
	if tr.answered[pod] == 1 {
		tr.first[pod] = tr.latest[pod]
	}
}

// end ends the callers and waits for them.
func (tr *traffic) end() {
	tr.stop()
	tr.callers.Wait()
}

// outcome is what came of calls.
type outcome struct {
	answered      map[string]int
	first, latest map[string]time.Time
	lost, all     int
	as            time.Duration // how long it takes to make as many calls as were lost
	err           error
}

// String says how many were lost.
func (o outcome) String() string {
	if o.lost == 0 {
		return fmt.Sprintf("none of %d calls lost", o.all)
	}
	return fmt.Sprintf("%d of %d calls lost, as many as are made in %.1fs", o.lost, o.all, o.as.Seconds())
}

// tally returns what came of the calls since it was last called.
func (tr *traffic) tally() outcome {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	o := outcome{answered: tr.answered, first: tr.first, latest: tr.latest, lost: tr.lost, all: tr.lost, err: tr.err}
	for n := range maps.Values(o.answered) {
		o.all += n
	}
	o.as = time.Duration(o.lost) * pace / time.Duration(tr.n)
	tr.answered, tr.first, tr.latest = map[string]int{}, map[string]time.Time{}, map[string]time.Time{}
	tr.lost, tr.err = 0, nil
	return o
}

// reach waits until each of the pods has answered.
func (tr *traffic) reach(t *testing.T, within time.Duration, pods ...*pod) {
	t.Helper()
	for late := time.Now().Add(within); len(pods) > 0; time.Sleep(pace) {
		tr.mu.Lock()
		pods = slices.DeleteFunc(slices.Clone(pods), func(p *pod) bool { return tr.answered[p.name] > 0 })
		tr.mu.Unlock()
		if time.Now().After(late) {
			t.Fatalf("%d pods get no calls", len(pods))
		}
	}
}

// static dials pods whose addresses do not change.
func static(t *testing.T, config string, pods ...*pod) *grpc.ClientConn {
	t.Helper()
	r := manual.NewBuilderWithScheme("pods")
	var state resolver.State
	for _, p := range pods {
		state.Addresses = append(state.Addresses, resolver.Address{Addr: p.addr})
	}
	r.InitialState(state)
	return dial(t, "pods:///shop", grpc.WithResolvers(r), grpc.WithDefaultServiceConfig(config))
}

// deployment is pods with addresses of their own and one port, behind a name.
type deployment struct {
	t      *testing.T
	prefix string // of the pods' addresses
	count  int    // pods so far
	port   string
	age    time.Duration
	pods   []*pod
	names  *names
}

func newDeployment(t *testing.T, network, pods int, age time.Duration) *deployment {
	t.Helper()
	d := &deployment{t: t, prefix: fmt.Sprintf("127.0.%d.", 10+network), port: "0", age: age, names: newNames(t)}
	for range pods {
		d.scaleUp()
	}
	return d
}

// scaleUp starts one more pod.
func (d *deployment) scaleUp() *pod {
	d.t.Helper()
	d.count++
	ip := d.prefix + fmt.Sprint(d.count)
	p := startPod(d.t, podConfig{Addr: net.JoinHostPort(ip, d.port), Age: d.age})
	_, d.port, _ = net.SplitHostPort(p.addr)
	d.pods = append(d.pods, p)
	d.names.add(ip)
	return p
}

// end ends a pod as Kubernetes does: at the same time the name loses it. Nobody
// waits for its end.
func (d *deployment) end(p *pod) {
	d.t.Helper()
	p.signal(syscall.SIGTERM)
	ip, _, _ := net.SplitHostPort(p.addr)
	d.names.remove(ip)
	d.pods = slices.DeleteFunc(slices.Clone(d.pods), func(other *pod) bool { return other == p })
}
