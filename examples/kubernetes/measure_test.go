package main

import (
	"context"
	"flag"
	"fmt"
	"slices"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	_ "google.golang.org/grpc/health" // for clients that watch health
	"google.golang.org/grpc/status"
)

// The figures of docs/operations.md are what the tests named Measure log with
//
//	go test -run Measure -measure -v -parallel 8 .
//
// Real processes on 127.0.0.0/8, real time: about two minutes.
var measure = flag.Bool("measure", false, "measure what docs/operations.md says; takes two minutes")

func takesTime(t *testing.T) {
	t.Helper()
	t.Parallel()
	if !*measure {
		t.Skip("needs -measure")
	}
}

const (
	roundRobin  = `{"loadBalancingConfig": [{"round_robin": {}}]}`
	watchHealth = `{"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}}`

	// From a caller's call to its next.
	pace = 20 * time.Millisecond
)

// announcing is a pod that announces for so long; the rest is default.
func announcing(d time.Duration) podConfig {
	return podConfig{Policy: fmt.Sprintf("server: {drain: {announce: %v}}", d)}
}

// A balancer goes on sending connections to a pod until it has noticed that the
// pod ends. Until then the pod must serve: that is what announce is for.
func TestAnnounceOutlastsTheBalancer(t *testing.T) {
	for _, c := range []struct {
		announce time.Duration
		lost     bool
	}{{2 * time.Second, false}, {0, true}} {
		t.Run(fmt.Sprint("announce ", c.announce), func(t *testing.T) {
			t.Parallel()
			ending, other := startPod(t, announcing(c.announce)), startPod(t, podConfig{})
			b := newBalancer(t, ending, other)
			ending.signal(syscall.SIGTERM)
			if c.announce == 0 {
				ending.exit(patience)
			} else {
				ending.notReady()
			}
			lost := 0
			for range 8 { // clients that come before the balancer has noticed
				if _, err := get(t.Context(), dial(t, b.addr), quick); err != nil {
					lost++
				}
			}
			b.set(other)
			if _, err := get(t.Context(), dial(t, b.addr), quick); err != nil {
				t.Errorf("after the balancer has noticed: %v", err)
			}
			if (lost > 0) != c.lost {
				t.Errorf("%d of 8 calls were lost", lost)
			}
			ending.exit(patience)
		})
	}
}

// With the time that a balancer takes: clients that stay, and one that comes and
// goes.
func TestMeasureAnnounce(t *testing.T) {
	takesTime(t)
	const notices = 3 * time.Second
	for _, announce := range []time.Duration{0, time.Second, 5 * time.Second} {
		t.Run(announce.String(), func(t *testing.T) {
			t.Parallel()
			ending, other := startPod(t, announcing(announce)), startPod(t, podConfig{})
			b := newBalancer(t, ending, other)
			var conns []*grpc.ClientConn
			for range 8 {
				conns = append(conns, dial(t, b.addr))
			}
			tr := newTraffic(t, 1, conns...)
			tr.reach(t, patience, ending, other)
			newcomers, stop := context.WithCancel(t.Context())
			defer stop()
			came, lost := 0, 0
			tr.callers.Go(func() {
				for ; newcomers.Err() == nil; time.Sleep(pace) {
					conn := dial(t, b.addr)
					if _, err := get(t.Context(), conn, quick); err != nil {
						lost++
					}
					came++
					_ = conn.Close()
				}
			})
			tr.tally()
			ending.signal(syscall.SIGTERM)
			time.Sleep(notices)
			b.set(other)
			ending.exit(2 * patience)
			time.Sleep(3 * time.Second)
			stop()
			tr.end()
			t.Logf("announce %v, a balancer that notices after %v: 8 clients that stay: %v; clients that come for one call: %d of %d lost", announce, notices, tr.tally(), lost, came)
		})
	}
}

// A connection through a balancer of layer 4 stays with its pod: a pod that comes
// later gets calls only if connections end now and then.
func TestConnectionsStay(t *testing.T) {
	for _, age := range []time.Duration{0, 300 * time.Millisecond} {
		t.Run(fmt.Sprint("MaxConnectionAge ", age), func(t *testing.T) {
			t.Parallel()
			old := startPod(t, podConfig{Age: age})
			b := newBalancer(t, old)
			conn := dial(t, b.addr)
			call := func() string {
				t.Helper()
				name, err := get(t.Context(), conn, quick)
				if err != nil {
					t.Fatal(err)
				}
				return name
			}
			call() // the connection is there
			later := startPod(t, podConfig{Age: age})
			b.set(later)
			if age == 0 {
				for range 100 {
					if name := call(); name != old.name {
						t.Fatal("the connection went to the pod that came later")
					}
				}
				return
			}
			for late := time.Now().Add(patience); call() != later.name; {
				if time.Now().After(late) {
					t.Fatal("the pod that came later gets no calls")
				}
			}
		})
	}
}

// Two pods behind a balancer of layer 4 are replaced, one after the other, each
// before (surge) or after its successor is there. Which has the connections then?
func TestMeasureConnectionAge(t *testing.T) {
	takesTime(t)
	for _, c := range []struct {
		surge bool
		age   time.Duration
	}{{true, 0}, {false, 0}, {false, 5 * time.Second}} {
		t.Run(fmt.Sprintf("surge %v, MaxConnectionAge %v", c.surge, c.age), func(t *testing.T) {
			t.Parallel()
			config := announcing(time.Second)
			config.Age = c.age
			pods := []*pod{startPod(t, config), startPod(t, config)}
			b := newBalancer(t, pods...)
			var conns []*grpc.ClientConn
			for range 8 {
				conns = append(conns, dial(t, b.addr))
			}
			tr := newTraffic(t, 1, conns...)
			tr.reach(t, patience, pods...)
			tr.tally()
			for i, old := range slices.Clone(pods) {
				if c.surge {
					pods[i] = startPod(t, config)
					b.set(pods...)
				} else {
					b.set(pods[1-i])
				}
				old.signal(syscall.SIGTERM)
				old.exit(patience)
				if !c.surge {
					time.Sleep(time.Second) // pods do not start as fast as these
					pods[i] = startPod(t, config)
					b.set(pods...)
				}
			}
			rolled := tr.tally()
			time.Sleep(15 * time.Second)
			tr.tally()
			time.Sleep(5 * time.Second)
			tr.end()
			o := tr.tally()
			t.Logf("surge %v, MaxConnectionAge %v: both pods replaced: %v; 15s later the new ones answer %d and %d calls in 5s: %v",
				c.surge, c.age, rolled, o.answered[pods[0].name], o.answered[pods[1].name], o)
		})
	}
}

// Two pods that keep their addresses are restarted, the second some time after the
// first is back. A client tries an address that refused it again after about 1s.
func TestMeasureRestartsInPlace(t *testing.T) {
	takesTime(t)
	for _, apart := range []time.Duration{200 * time.Millisecond, time.Second, 3 * time.Second} {
		t.Run(apart.String(), func(t *testing.T) {
			t.Parallel()
			config := announcing(0)
			pods := []*pod{startPod(t, config), startPod(t, config)}
			tr := newTraffic(t, 8, static(t, roundRobin, pods...))
			tr.reach(t, patience, pods...)
			tr.tally()
			for i, p := range pods {
				if i > 0 {
					time.Sleep(apart)
				}
				p.signal(syscall.SIGTERM)
				p.exit(patience)
				config.Addr = p.addr
				startPod(t, config)
			}
			time.Sleep(5 * time.Second)
			tr.end()
			t.Logf("two pods restarted in place, %v apart: %v", apart, tr.tally())
		})
	}
}

// How long clients stay away from a pod that is back at its address: the longer
// it was gone, the longer, for each attempt that fails makes the backoff longer.
func TestMeasureBackoff(t *testing.T) {
	takesTime(t)
	short := backoff.DefaultConfig
	short.MaxDelay = 3 * time.Second
	for _, c := range []struct {
		gone   time.Duration
		config backoff.Config
	}{{300 * time.Millisecond, backoff.DefaultConfig}, {5 * time.Second, backoff.DefaultConfig}, {20 * time.Second, backoff.DefaultConfig}, {20 * time.Second, short}} {
		t.Run(fmt.Sprintf("%v, MaxDelay %v", c.gone, c.config.MaxDelay), func(t *testing.T) {
			t.Parallel()
			p := startPod(t, podConfig{})
			var clients []*traffic
			for range 10 {
				conn := dial(t, p.addr, grpc.WithConnectParams(grpc.ConnectParams{Backoff: c.config, MinConnectTimeout: 20 * time.Second}))
				clients = append(clients, newTraffic(t, 1, conn))
			}
			for _, client := range clients {
				client.reach(t, patience, p)
			}
			p.kill()
			time.Sleep(c.gone)
			p = startPod(t, podConfig{Addr: p.addr})
			back := time.Now()
			var away []time.Duration
			for _, client := range clients {
				client.reach(t, 2*time.Minute, p)
				away = append(away, client.tally().first[p.name].Sub(back))
			}
			slices.Sort(away)
			t.Logf("a pod gone for %v, MaxDelay %v: when it is back, clients call it after %.1fs (median), %.1fs (the last of %d)",
				c.gone, c.config.MaxDelay, away[len(away)/2].Seconds(), away[len(away)-1].Seconds(), len(away))
		})
	}
}

// When clients leave a pod that drains: at the GOAWAY after announce, or, if they
// watch its health, when announce begins, even if it is the only one.
func TestMeasureHealthWatch(t *testing.T) {
	takesTime(t)
	for _, c := range []struct {
		pods   int
		name   string
		config string
	}{{2, "round_robin", roundRobin}, {2, "health watched", watchHealth}, {1, "round_robin", roundRobin}, {1, "health watched", watchHealth}} {
		t.Run(fmt.Sprintf("%d pods, %s", c.pods, c.name), func(t *testing.T) {
			t.Parallel()
			var pods []*pod
			for range c.pods {
				pods = append(pods, startPod(t, podConfig{}))
			}
			tr := newTraffic(t, 8, static(t, c.config, pods...))
			tr.reach(t, patience, pods...)
			tr.tally()
			pods[0].signal(syscall.SIGTERM)
			time.Sleep(4 * time.Second) // within announce
			o := tr.tally()
			tr.end()
			t.Logf("%d pods, %s: in 4s of announce, the pod that drains answers %d calls; %v", c.pods, c.name, o.answered[pods[0].name], o)
		})
	}
}

// A Deployment of three is rolled out behind a headless Service, each new pod with
// an address of its own, and clients that asked for the addresses just before. They
// ask again 30s later at the soonest, and may be answered from a cache.
func TestMeasureHeadlessRollout(t *testing.T) {
	takesTime(t)
	for i, c := range []struct{ minReady, ttl time.Duration }{{time.Second, 0}, {time.Second, dnsTTL}, {30 * time.Second, dnsTTL}} {
		t.Run(fmt.Sprintf("minReadySeconds %v, cached for %v", c.minReady, c.ttl), func(t *testing.T) {
			t.Parallel()
			d := newDeployment(t, i, 3, 0)
			var conns []*grpc.ClientConn
			for range 4 {
				conns = append(conns, dial(t, d.names.target(d.port), grpc.WithDefaultServiceConfig(roundRobin)))
			}
			tr := newTraffic(t, 2, conns...)
			tr.reach(t, patience, d.pods...)
			tr.tally()
			d.names.cache(c.ttl)
			began := time.Now()
			for _, old := range slices.Clone(d.pods) {
				d.scaleUp()
				time.Sleep(c.minReady)
				d.end(old)
			}
			rolled := time.Since(began)
			tr.reach(t, 2*time.Minute, d.pods...)
			tr.end()
			t.Logf("minReadySeconds %v, addresses cached for %v: rolled out in %.1fs: %v", c.minReady, c.ttl, rolled.Seconds(), tr.tally())
		})
	}
}

// A third pod is added behind a headless Service. Clients that have no reason to
// ask for the addresses do not hear of it.
func TestMeasureHeadlessScaleUp(t *testing.T) {
	takesTime(t)
	for i, age := range []time.Duration{0, 10 * time.Second} {
		t.Run(age.String(), func(t *testing.T) {
			t.Parallel()
			d := newDeployment(t, 10+i, 2, age)
			tr := newTraffic(t, 4, dial(t, d.names.target(d.port), grpc.WithDefaultServiceConfig(roundRobin)))
			tr.reach(t, patience, d.pods...)
			tr.tally()
			grown := time.Now()
			third := d.scaleUp()
			time.Sleep(time.Minute)
			tr.end()
			o := tr.tally()
			heard := "never"
			if at, ok := o.first[third.name]; ok {
				heard = fmt.Sprintf("after %.1fs", at.Sub(grown).Seconds())
			}
			t.Logf("MaxConnectionAge %v: within a minute, the third pod's first call: %s; %v", age, heard, o)
		})
	}
}

// How long the default drain takes when a handler never ends, and what becomes of
// a call that has 12s to go when SIGKILL comes after 10s, as from docker stop.
func TestMeasurePhases(t *testing.T) {
	takesTime(t)
	for _, c := range []struct {
		order string
		kill  time.Duration
	}{{stuck, time.Minute}, {"12s", time.Minute}, {"12s", 10 * time.Second}} {
		t.Run(fmt.Sprintf("%s, SIGKILL after %v", c.order, c.kill), func(t *testing.T) {
			t.Parallel()
			p := startPod(t, podConfig{})
			conn := dial(t, p.addr)
			if _, err := get(t.Context(), conn, quick); err != nil {
				t.Fatal(err)
			}
			answer := make(chan error, 1)
			go func() {
				_, err := get(t.Context(), conn, c.order)
				answer <- err
			}()
			time.Sleep(100 * time.Millisecond) // it is in its handler
			told := time.Now()
			p.signal(syscall.SIGTERM)
			select {
			case <-p.ended:
			case <-time.After(c.kill):
				p.kill()
			}
			t.Logf("a call of %s, SIGKILL after %v: the process ended %.2fs after SIGTERM (%v), the call: %v",
				c.order, c.kill, time.Since(told).Seconds(), p.cmd.ProcessState, status.Code(<-answer))
		})
	}
}
