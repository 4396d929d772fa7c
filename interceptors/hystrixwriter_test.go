package interceptors_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// rigid is a writer that cannot flush.
type rigid struct {
	header http.Header
	code   int
	body   strings.Builder
}

func (r *rigid) Header() http.Header         { return r.header }
func (r *rigid) WriteHeader(code int)        { r.code = code }
func (r *rigid) Write(p []byte) (int, error) { return r.body.Write(p) }

// wrapped hides what it wraps, unwrapped does not.
type wrapped struct{ http.ResponseWriter }

type unwrapped struct{ wrapped }

func (u unwrapped) Unwrap() http.ResponseWriter { return u.ResponseWriter }

func TestHystrixWriters(t *testing.T) {
	g := mustGuard(t, "server: {}")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r := httptest.NewRequestWithContext(ctx, "GET", "/", nil)
	for name, wrap := range map[string]func(http.ResponseWriter) http.ResponseWriter{
		"unwrapped":       func(w http.ResponseWriter) http.ResponseWriter { return unwrapped{wrapped{w}} },
		"unwrapped twice": func(w http.ResponseWriter) http.ResponseWriter { return unwrapped{wrapped{unwrapped{wrapped{w}}}} },
	} {
		w := httptest.NewRecorder()
		g.HystrixStream().ServeHTTP(wrap(w), r)
		if w.Code != 200 || w.Body.String() != ":\n\n" || !w.Flushed {
			t.Errorf("%s: %d %q", name, w.Code, w.Body)
		}
	}
	for name, wrap := range map[string]func(http.ResponseWriter) http.ResponseWriter{
		"mute":            func(w http.ResponseWriter) http.ResponseWriter { return w },
		"mute, unwrapped": func(w http.ResponseWriter) http.ResponseWriter { return unwrapped{wrapped{w}} },
		"hidden":          func(w http.ResponseWriter) http.ResponseWriter { return wrapped{w} },
	} {
		w := &rigid{header: http.Header{}}
		g.HystrixStream().ServeHTTP(wrap(w), r)
		if w.code != 500 || !strings.Contains(w.body.String(), "can flush") || !strings.HasPrefix(w.header.Get("Content-Type"), "text/plain") {
			t.Errorf("%s: %d %q %v", name, w.code, &w.body, w.header)
		}
	}
}

// sluggish is a writer that takes its time for each write, and notes the time that
// writes and flushes were given.
type sluggish struct {
	*httptest.ResponseRecorder
	takes    time.Duration
	deadline time.Time
	given    []time.Duration
}

func (s *sluggish) SetWriteDeadline(t time.Time) error {
	s.deadline = t
	return nil
}

func (s *sluggish) Flush() { s.given = append(s.given, time.Until(s.deadline)) }

func (s *sluggish) Write(p []byte) (int, error) {
	s.given = append(s.given, time.Until(s.deadline))
	time.Sleep(s.takes)
	return s.ResponseRecorder.Write(p)
}

// A set of events may take as many writes as it needs, each of ten seconds, and so may
// what net/http writes when the stream has ended.
func TestHystrixEachWriteHasItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, `server: {rules: [{methods: ['*'], breaker: {}}]}`)
		g.HystrixStream()
		for i := range 100 {
			_ = serveOn(g, fmt.Sprintf("/a.A/M%d", i), nil)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		w := &sluggish{ResponseRecorder: httptest.NewRecorder(), takes: 8 * time.Second}
		g.HystrixStream().ServeHTTP(w, httptest.NewRequestWithContext(ctx, "GET", "/", nil))
		if len(w.given) < 5 || slices.ContainsFunc(w.given, func(d time.Duration) bool { return d != 10*time.Second }) {
			t.Errorf("writes were given %v", w.given)
		}
		if got := time.Until(w.deadline); got != 10*time.Second {
			t.Errorf("the end is given %v", got)
		}
	})
}

// Behind a slow client the events that are written last are of when they are written.
func TestHystrixSlowClientIsToldTheTruth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, `server: {rules: [{methods: ['*'], breaker: {}}]}`)
		g.HystrixStream()
		for i := range 100 {
			_ = serveOn(g, fmt.Sprintf("/a.A/M%02d", i), nil)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		w := &sluggish{ResponseRecorder: httptest.NewRecorder(), takes: 10 * time.Second}
		g.HystrixStream().ServeHTTP(w, httptest.NewRequestWithContext(ctx, "GET", "/", nil))
		all := parseHystrix(t, w.Body.String())
		first, last := only(t, all, "HystrixCommand", "a.A/M00"), only(t, all, "HystrixCommand", "a.A/M99")
		if got := first.number("rollingCountSuccess") + 10*last.number("rollingCountSuccess"); got != 1 {
			t.Errorf("got %d: the first method's call is of the last 10 s, the last one's is not any more", got)
		}
	})
}

// flushing is a writer that flushes and has no deadlines.
type flushing struct{ wrapped }

func (f flushing) Flush() { f.ResponseWriter.(http.Flusher).Flush() }

// Behind a writer without deadlines, a client that does not read is let go by the
// server's WriteTimeout, or when the connection ends; Close does not.
func TestHystrixWithoutDeadlines(t *testing.T) {
	for _, timeout := range []time.Duration{0, 3 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			g := mustGuard(t, "server: {}")
			h, began, ended := g.HystrixStream(), time.Now(), time.Duration(0)
			srv := &http.Server{WriteTimeout: timeout, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				h.ServeHTTP(flushing{wrapped{w}}, r)
				ended = time.Since(began)
			})}
			lis := newPipeListener()
			go func() { _ = srv.Serve(lis) }()
			client := lis.dial()
			if _, err := fmt.Fprint(client, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			pass(time.Minute)
			if ended != timeout {
				t.Errorf("with a WriteTimeout of %v it was let go after %v", timeout, ended)
			}
			if err := g.Close(); err != nil {
				t.Fatal(err)
			}
			pass(time.Minute)
			if ended != timeout {
				t.Errorf("with a WriteTimeout of %v it was let go by Close", timeout)
			}
			_ = client.Close()
			synctest.Wait()
			if ended == 0 {
				t.Error("it goes on without its connection")
			}
			if err := srv.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}
