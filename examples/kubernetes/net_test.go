package main

import (
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// balancer is a load balancer of layer 4, as a Service with a cluster IP is: each
// connection goes to the next of its pods, for as long as it lives. When the pods
// change, connections that exist stay.
type balancer struct {
	addr string

	mu   sync.Mutex
	pods []string // guarded by mu
	next int      // guarded by mu
}

func newBalancer(t *testing.T, pods ...*pod) *balancer {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = lis.Close() })
	b := &balancer{addr: lis.Addr().String()}
	b.set(pods...)
	go func() {
		for {
			client, err := lis.Accept()
			if err != nil {
				return
			}
			go b.carry(client)
		}
	}()
	return b
}

func (b *balancer) set(pods ...*pod) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pods = nil
	for _, p := range pods {
		b.pods = append(b.pods, p.addr)
	}
}

func (b *balancer) pick() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.next++
	return b.pods[b.next%len(b.pods)]
}

func (b *balancer) carry(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("tcp", b.pick())
	if err != nil {
		return // what a client sees of a pod that does not listen
	}
	defer server.Close()
	var ways sync.WaitGroup
	for _, way := range [][2]net.Conn{{client, server}, {server, client}} {
		ways.Go(func() {
			_, _ = io.Copy(way[0], way[1])
			_ = way[0].(*net.TCPConn).CloseWrite() // the other way may go on
		})
	}
	ways.Wait()
}

// names is a name server that knows one name, that of a headless Service. It may
// answer from a cache.
type names struct {
	conn net.PacketConn

	mu     sync.Mutex
	pods   []string  // guarded by mu; IP addresses
	cached []string  // guarded by mu
	until  time.Time // guarded by mu; when the cache ends
}

func newNames(t *testing.T, pods ...string) *names {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	n := &names{conn: conn, pods: pods}
	go n.serve()
	return n
}

// target is what a client dials for the pods behind the name.
func (n *names) target(port string) string {
	return "dns://" + n.conn.LocalAddr().String() + "/" + net.JoinHostPort("shop.test.", port)
}

func (n *names) add(pod string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pods = append(slices.Clone(n.pods), pod)
}

func (n *names) remove(pod string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pods = slices.DeleteFunc(slices.Clone(n.pods), func(p string) bool { return p == pod })
}

// cache makes what is true now the answer for a while.
func (n *names) cache(ttl time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cached, n.until = n.pods, time.Now().Add(ttl)
}

func (n *names) answer() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if time.Now().Before(n.until) {
		return n.cached
	}
	return n.pods
}

func (n *names) serve() {
	buf := make([]byte, 1500)
	for {
		size, client, err := n.conn.ReadFrom(buf)
		if err != nil {
			return
		}
		var query dnsmessage.Message
		if query.Unpack(buf[:size]) != nil || len(query.Questions) != 1 {
			continue
		}
		q := query.Questions[0]
		reply := dnsmessage.Message{Header: dnsmessage.Header{ID: query.ID, Response: true, Authoritative: true}, Questions: query.Questions}
		if q.Type == dnsmessage.TypeA {
			for _, pod := range n.answer() {
				reply.Answers = append(reply.Answers, dnsmessage.Resource{
					Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class},
					Body:   &dnsmessage.AResource{A: [4]byte(net.ParseIP(pod).To4())},
				})
			}
		}
		packed, err := reply.Pack()
		if err != nil {
			continue
		}
		_, _ = n.conn.WriteTo(packed, client)
	}
}
