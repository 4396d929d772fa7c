package interceptors

import (
	"bufio"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"
)

const (
	minHystrixDelay = 100 // ms
	maxHystrixDelay = 60_000
	// hystrixWriteTimeout is how long a client may not read before it is cut off.
	hystrixWriteTimeout = 10 * time.Second
	// hystrixBuffer is what is written at once; net/http and the network buffer more.
	hystrixBuffer = 32 << 10
)

// HystrixStream returns the event stream of Hystrix's dashboard (text/event-stream)
// for the guard: a HystrixCommand event for each circuit breaker, whatever its engine,
// and a HystrixThreadPool event for each concurrency limit, once a second. Mount it
// where the dashboard and Turbine look for it:
//
//	http.Handle("/hystrix.stream", guard.HystrixStream())
//
// The query's delay sets another interval in milliseconds, 100 to 60000. Counts are
// of the last 10 s, latencies (in milliseconds) of the last 60 s, at most 100 of each
// 10 s, both from the first call of HystrixStream: until then nothing is recorded and
// calls pay nothing; after it, a call takes one short lock of its method more and still
// allocates nothing, and a method with a breaker or a concurrency limit has 5.4 KB more.
// There is no way back. What each key means is in docs/policy.md.
//
// The handler is safe for concurrent use, and any number of clients may read; each
// has one goroutine, net/http's own. A stream ends with its request, when the client
// does not read for 10 s, and when the guard is closed; http.Server.WriteTimeout does
// not cut it. http.Server.Shutdown waits for it: close the guard first.
//
// The response writer must be able to flush, itself or by an Unwrap method
// ([http.ResponseController]); otherwise the answer is 500, as on a nil guard. After
// Close it is 503. Behind a writer that flushes but cannot set a write deadline (a
// wrapper with Flush and without Unwrap), http.Server.WriteTimeout ends the stream;
// without one, a write to a client that does not read lasts until the connection ends:
// neither the 10 s nor Close cuts it. Between writes Close still does.
//
// Nobody is asked who they are: names of methods and targets are for those who may see
// them.
func (g *Guard) HystrixStream() http.Handler {
	if g == nil {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, errNilGuard.Error(), http.StatusInternalServerError)
		})
	}
	g.client.startRecording()
	g.server.startRecording()
	return http.HandlerFunc(g.serveHystrix)
}

func (g *Guard) serveHystrix(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet {
		w.Header().Set("Allow", http.MethodGet)
		http.Error(w, "an event stream is read with GET", http.StatusMethodNotAllowed)
		return
	}
	delay, err := hystrixDelay(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if g.closed.Load() {
		http.Error(w, errClosed.Error(), http.StatusServiceUnavailable)
		return
	}
	s := sseWriter{w, http.NewResponseController(w)}
	header := w.Header()
	header.Set("Content-Type", "text/event-stream")
	header.Set("Cache-Control", "no-cache, no-store, max-age=0, must-revalidate")
	header.Set("X-Accel-Buffering", "no") // nginx
	header.Set("X-Content-Type-Options", "nosniff")
	if err := s.flush(); errors.Is(err, errors.ErrUnsupported) {
		http.Error(w, fmt.Sprintf("an event stream needs a response writer that can flush; %T cannot", w), http.StatusInternalServerError)
		return
	}
	defer s.limit() // net/http writes the end

	out, pause := bufio.NewWriterSize(s, hystrixBuffer), time.NewTimer(delay)
	defer pause.Stop()
	for {
		if g.writeHystrix(out) != nil || out.Flush() != nil || s.flush() != nil {
			return // the client is gone
		}
		pause.Reset(delay) // after the write, as in Hystrix: a slow one is not chased
		select {
		case <-r.Context().Done():
			return
		case <-g.done:
			return
		case <-pause.C:
		}
	}
}

func hystrixDelay(r *http.Request) (time.Duration, error) {
	query := r.URL.Query()
	if !query.Has("delay") {
		return time.Second, nil
	}
	millis, err := strconv.Atoi(query.Get("delay"))
	if err != nil || millis < minHystrixDelay || millis > maxHystrixDelay {
		return 0, fmt.Errorf("delay: found %q, allowed %d to %d (milliseconds)", query.Get("delay"), minHystrixDelay, maxHystrixDelay)
	}
	return time.Duration(millis) * time.Millisecond, nil
}

// sseWriter gives each write its time. A writer that has no deadlines does without.
type sseWriter struct {
	w       http.ResponseWriter
	control *http.ResponseController
}

func (s sseWriter) limit() { _ = s.control.SetWriteDeadline(time.Now().Add(hystrixWriteTimeout)) }

func (s sseWriter) Write(p []byte) (int, error) {
	s.limit()
	return s.w.Write(p)
}

// flush sends what was written. Between ticks there is no deadline: it would end an
// HTTP/2 stream that has nothing to write.
func (s sseWriter) flush() error {
	s.limit()
	err := s.control.Flush()
	_ = s.control.SetWriteDeadline(time.Time{})
	return err
}
