package interceptors_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

func TestHystrixRequests(t *testing.T) {
	g := mustGuard(t, "server: {}")
	h := g.HystrixStream()
	closed := mustGuard(t, "server: {}")
	ofClosed := closed.HystrixStream()
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	var none *interceptors.Guard
	for _, tt := range []struct {
		h              http.Handler
		method, target string
		code           int
		says           string
	}{
		{h, "GET", "/", 200, ":\n\n"}, // nothing to show
		{h, "GET", "/?delay=100", 200, ":\n\n"},
		{h, "GET", "/?delay=60000&x=1", 200, ":\n\n"},
		{h, "GET", "/?delay=99", 400, `delay: found "99", allowed 100 to 60000 (milliseconds)` + "\n"},
		{h, "GET", "/?delay=60001", 400, ""},
		{h, "GET", "/?delay=", 400, ""},
		{h, "GET", "/?delay=1s", 400, ""},
		{h, "GET", "/?delay=-1000", 400, ""},
		{h, "GET", "/?delay=99999999999999999999", 400, ""},
		{h, "GET", "/?delay=-9223372036854775807", 400, ""},
		{h, "HEAD", "/", 405, ""},
		{h, "POST", "/", 405, ""},
		{h, "OPTIONS", "/", 405, ""},
		{ofClosed, "GET", "/", 503, "interceptors: the guard is closed\n"},
		{none.HystrixStream(), "GET", "/", 500, "interceptors: nil *Guard (was the error of Load or New ignored?)\n"},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		w := httptest.NewRecorder()
		tt.h.ServeHTTP(w, httptest.NewRequestWithContext(ctx, tt.method, tt.target, nil))
		if w.Code != tt.code || tt.says != "" && w.Body.String() != tt.says {
			t.Errorf("%s %s: %d %q, want %d %q", tt.method, tt.target, w.Code, w.Body, tt.code, tt.says)
		}
		header := map[string]string{"Content-Type": "text/plain; charset=utf-8"}
		switch tt.code {
		case 200:
			header = map[string]string{"Content-Type": "text/event-stream", "X-Accel-Buffering": "no", "Cache-Control": "no-cache, no-store, max-age=0, must-revalidate", "X-Content-Type-Options": "nosniff"}
		case 405:
			header["Allow"] = "GET"
		}
		for key, want := range header {
			if got := w.Header().Get(key); got != want {
				t.Errorf("%s %s: %s is %q, want %q", tt.method, tt.target, key, got, want)
			}
		}
	}
}

// paced is a writer that notes when it was flushed and with how much.
type paced struct {
	*httptest.ResponseRecorder
	began time.Time

	mu      sync.Mutex
	flushes []time.Duration
	sets    []int
}

func (p *paced) Flush() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.flushes = append(p.flushes, time.Since(p.began))
	p.sets = append(p.sets, p.Body.Len())
}

// A set at once and then one each delay, each with one flush.
func TestHystrixDelay(t *testing.T) {
	for query, delay := range map[string]time.Duration{"": time.Second, "?delay=250": 250 * time.Millisecond} {
		synctest.Test(t, func(t *testing.T) {
			g := mustGuard(t, "server: {}")
			ctx, cancel := context.WithTimeout(t.Context(), 3*delay+1)
			defer cancel()
			w := &paced{ResponseRecorder: httptest.NewRecorder(), began: time.Now()}
			g.HystrixStream().ServeHTTP(w, httptest.NewRequestWithContext(ctx, "GET", "/"+query, nil))
			if want := []time.Duration{0, 0, delay, 2 * delay, 3 * delay}; !slices.Equal(w.flushes, want) {
				t.Errorf("flushed at %v, want %v", w.flushes, want)
			}
			if want := []int{0, 3, 6, 9, 12}; !slices.Equal(w.sets, want) {
				t.Errorf("bytes at each flush %v, want %v", w.sets, want)
			}
		})
	}
}

func TestHystrixEndsWithTheGuard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, "server: {}")
		began, h := time.Now(), g.HystrixStream()
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		var all sync.WaitGroup
		for range 5 {
			all.Go(func() {
				h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(ctx, "GET", "/?delay=60000", nil))
			})
		}
		pass(90 * time.Second)
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
		all.Wait()
		if took := time.Since(began); took != 90*time.Second {
			t.Errorf("streams ended after %v", took)
		}
	})
}

// pipeListener accepts the connections that its tests make.
type pipeListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe"} }

func (l *pipeListener) dial() net.Conn {
	server, client := net.Pipe()
	l.conns <- server
	return client
}

// A client that does not read holds its goroutine for ten seconds; one that reads
// keeps its stream, whatever the server's WriteTimeout.
func TestHystrixWriteDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, "server: {}")
		h, began := g.HystrixStream(), time.Now()
		var mu sync.Mutex
		ended := map[string]time.Duration{}
		srv := &http.Server{WriteTimeout: 3 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			h.ServeHTTP(w, r)
			mu.Lock()
			defer mu.Unlock()
			ended[r.URL.Path] = time.Since(began)
		})}
		lis := newPipeListener()
		go func() { _ = srv.Serve(lis) }()
		idle, reader, slow := lis.dial(), lis.dial(), lis.dial()
		for conn, path := range map[net.Conn]string{idle: "/idle", reader: "/reader", slow: "/slow?delay=30000"} {
			if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path); err != nil {
				t.Fatal(err)
			}
		}
		var got strings.Builder
		var all sync.WaitGroup
		all.Go(func() { _, _ = io.Copy(&got, reader) })
		all.Go(func() { _, _ = io.Copy(io.Discard, slow) })
		pass(100 * time.Second)
		mu.Lock()
		if ended["/idle"] != 10*time.Second {
			t.Errorf("the client that did not read was let go after %v", ended["/idle"])
		}
		if n := len(ended); n != 1 {
			t.Errorf("%d streams have ended: %v", n, ended)
		}
		mu.Unlock()
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		mu.Lock()
		if ended["/reader"] != 100*time.Second || ended["/slow"] != 100*time.Second {
			t.Errorf("the others ended after %v", ended)
		}
		mu.Unlock()
		if err := srv.Close(); err != nil {
			t.Fatal(err)
		}
		all.Wait()
		_ = idle.Close()
		if n := strings.Count(got.String(), ":\n\n"); n < 100 || n > 101 { // the last tick meets Close
			t.Errorf("%d comments in 100 s", n)
		}
	})
}

// A real server, real clients, and calls meanwhile.
func TestHystrixOverHTTP(t *testing.T) {
	g := mustGuard(t, `{client: {rules: [{methods: ['*'], breaker: {}, concurrency_limit: {max_in_flight: 100}}]},
		server: {rules: [{methods: ['*'], breaker: {}}]}}`)
	var inside sync.WaitGroup
	h := g.HystrixStream()
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		inside.Add(1)
		defer inside.Done()
		h.ServeHTTP(unwrapped{wrapped{w}}, r)
	}))
	defer web.Close()
	conn := rpctest.Start(t, &rpctest.Service{Unary: func(_ context.Context, req *rpctest.Message) (*rpctest.Message, error) {
		if req.GetValue() == "fail" {
			return nil, errDown
		}
		return req, nil
	}}, g.ServerOptions(), g.DialOptions())
	ctx, stop := context.WithCancel(t.Context())
	var calls sync.WaitGroup
	calls.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			text := "ok"
			if i%4 == 0 {
				text = "fail"
			}
			_, _ = rpctest.Call(ctx, conn, rpctest.Unary, text)
		}
	})
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			reader, leave := context.WithCancel(t.Context())
			defer leave()
			req, err := http.NewRequestWithContext(reader, "GET", web.URL+"?delay=100", nil)
			if err != nil {
				t.Error(err)
				return
			}
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			seen, lines := map[string]int{}, bufio.NewScanner(resp.Body)
			for (seen["HystrixCommand"] < 8 || seen["calls"] == 0) && lines.Scan() {
				if lines.Text() == "" || lines.Text() == ":" {
					continue
				}
				e := parseHystrix(t, lines.Text()+"\n\n")[0]
				seen[e["type"].(string)]++
				if e["type"] == "HystrixCommand" {
					seen["calls"] += e.number("rollingCountSuccess") + e.number("rollingCountFailure")
				}
			}
			if seen["HystrixCommand"] < 8 || seen["HystrixThreadPool"] < 3 || seen["calls"] == 0 {
				t.Errorf("saw %v: %v", seen, lines.Err())
			}
		})
	}
	readers.Wait() // and are gone:
	inside.Wait()
	stop()
	calls.Wait()
}

// Over HTTP/2 a write deadline ends a stream even when nothing is being written.
func TestHystrixOverHTTP2(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, "server: {}")
		protocols := new(http.Protocols)
		protocols.SetUnencryptedHTTP2(true)
		srv := &http.Server{WriteTimeout: 3 * time.Second, Protocols: protocols, Handler: g.HystrixStream()}
		lis := newPipeListener()
		go func() { _ = srv.Serve(lis) }()
		transport := &http.Transport{Protocols: protocols, DialContext: func(context.Context, string, string) (net.Conn, error) { return lis.dial(), nil }}
		resp, err := (&http.Client{Transport: transport}).Get("http://hystrix/?delay=30000")
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		text := make([]byte, 3)
		for i := range 4 {
			if _, err := io.ReadFull(resp.Body, text); err != nil || string(text) != ":\n\n" {
				t.Fatalf("set %d: %q, %v", i, text, err)
			}
		}
		if took := time.Since(began); took != 90*time.Second || resp.ProtoMajor != 2 {
			t.Errorf("four sets in %v over %s", took, resp.Proto)
		}
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(resp.Body, text); err != io.EOF {
			t.Errorf("after Close: %v, want the end", err)
		}
		_ = resp.Body.Close()
		transport.CloseIdleConnections()
		if err := srv.Close(); err != nil {
			t.Fatal(err)
		}
	})
}
