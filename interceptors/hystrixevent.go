package interceptors

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/breaker"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/limiter"
)

// hystrixCommand is the state of one circuit breaker, as Hystrix's dashboard and
// Turbine read it. All keys are always there: the dashboard drops an event that
// lacks one.
type hystrixCommand struct {
	Type           string `json:"type"`
	Name           string `json:"name"` // what the dashboard knows a circuit by
	Group          string `json:"group"`
	ThreadPool     string `json:"threadPool"`
	CurrentTime    int64  `json:"currentTime"` // ms since 1970
	ReportingHosts int    `json:"reportingHosts"`

	Open            bool   `json:"isCircuitBreakerOpen"`
	RequestCount    uint64 `json:"requestCount"`
	ErrorCount      uint64 `json:"errorCount"`
	ErrorPercentage uint64 `json:"errorPercentage"`

	Success           uint64 `json:"rollingCountSuccess"`
	Failure           uint64 `json:"rollingCountFailure"`
	Timeout           uint64 `json:"rollingCountTimeout"`
	ShortCircuited    uint64 `json:"rollingCountShortCircuited"`
	SemaphoreRejected uint64 `json:"rollingCountSemaphoreRejected"`
	BadRequests       uint64 `json:"rollingCountBadRequests"`
	ExceptionsThrown  uint64 `json:"rollingCountExceptionsThrown"`
	FallbackSuccess   uint64 `json:"rollingCountFallbackSuccess"`
	FallbackFailure   uint64 `json:"rollingCountFallbackFailure"`
	FallbackMissing   uint64 `json:"rollingCountFallbackMissing"`

	InFlight    int `json:"currentConcurrentExecutionCount"`
	MaxInFlight int `json:"rollingMaxConcurrentExecutionCount"`

	LatencyExecuteMean uint32         `json:"latencyExecute_mean"`
	LatencyExecute     hystrixLatency `json:"latencyExecute"`
	LatencyTotalMean   uint32         `json:"latencyTotal_mean"`
	LatencyTotal       hystrixLatency `json:"latencyTotal"`

	ErrorThreshold  int    `json:"propertyValue_circuitBreakerErrorThresholdPercentage"`
	VolumeThreshold int    `json:"propertyValue_circuitBreakerRequestVolumeThreshold"`
	SleepWindow     int64  `json:"propertyValue_circuitBreakerSleepWindowInMilliseconds"`
	BreakerEnabled  bool   `json:"propertyValue_circuitBreakerEnabled"`
	Isolation       string `json:"propertyValue_executionIsolationStrategy"`
	MaxConcurrent   int    `json:"propertyValue_executionIsolationSemaphoreMaxConcurrentRequests"` // 0: unlimited
	TimeoutMillis   int64  `json:"propertyValue_executionTimeoutInMilliseconds"`                   // 0: none
	ThreadTimeout   int64  `json:"propertyValue_executionIsolationThreadTimeoutInMilliseconds"`    // the same by its older name
	Interrupt       bool   `json:"propertyValue_executionIsolationThreadInterruptOnTimeout"`
	Window          int64  `json:"propertyValue_metricsRollingStatisticalWindowInMilliseconds"` // of the counts

	hystrixAbsent
}

// hystrixAbsent are the keys of what there is none of here: collapsing, caching,
// threads, limits on fallbacks, breakers forced by hand.
type hystrixAbsent struct {
	Collapsed          int    `json:"rollingCountCollapsedRequests"`
	Emit               int    `json:"rollingCountEmit"`
	FallbackEmit       int    `json:"rollingCountFallbackEmit"`
	FallbackRejection  int    `json:"rollingCountFallbackRejection"`
	FromCache          int    `json:"rollingCountResponsesFromCache"`
	ThreadPoolRejected int    `json:"rollingCountThreadPoolRejected"`
	ForceOpen          bool   `json:"propertyValue_circuitBreakerForceOpen"`
	ForceClosed        bool   `json:"propertyValue_circuitBreakerForceClosed"`
	PoolOverride       string `json:"propertyValue_executionIsolationThreadPoolKeyOverride"`
	FallbackConcurrent int    `json:"propertyValue_fallbackIsolationSemaphoreMaxConcurrentRequests"` // 0: unlimited
	RequestCache       bool   `json:"propertyValue_requestCacheEnabled"`
	RequestLog         bool   `json:"propertyValue_requestLogEnabled"`
}

// hystrixLatency are percentiles in milliseconds.
type hystrixLatency struct {
	P0   uint32 `json:"0"`
	P25  uint32 `json:"25"`
	P50  uint32 `json:"50"`
	P75  uint32 `json:"75"`
	P90  uint32 `json:"90"`
	P95  uint32 `json:"95"`
	P99  uint32 `json:"99"`
	P995 uint32 `json:"99.5"`
	P100 uint32 `json:"100"`
}

// hystrixPool is the state of one concurrency limit.
type hystrixPool struct {
	Type           string `json:"type"`
	Name           string `json:"name"`
	CurrentTime    int64  `json:"currentTime"`
	ReportingHosts int    `json:"reportingHosts"`

	Active    int    `json:"currentActiveCount"`
	Completed uint64 `json:"currentCompletedTaskCount"` // since the state was made, as is
	Tasks     uint64 `json:"currentTaskCount"`          // this: completed, active and queued
	Queued    int    `json:"currentQueueSize"`

	// A pool of threads grows; a limit has one size.
	Size        int `json:"currentPoolSize"`
	CoreSize    int `json:"currentCorePoolSize"`
	LargestSize int `json:"currentLargestPoolSize"`
	MaximumSize int `json:"currentMaximumPoolSize"`

	Executed  uint64 `json:"rollingCountThreadsExecuted"`
	MaxActive int    `json:"rollingMaxActiveThreads"`
	Rejected  uint64 `json:"rollingCountCommandRejections"`

	QueueLimit int   `json:"propertyValue_queueSizeRejectionThreshold"`
	Window     int64 `json:"propertyValue_metricsRollingStatisticalWindowInMilliseconds"`
}

const hystrixWindow = int64(countBuckets * countSpan / time.Millisecond)

// writeHystrix writes one event for each circuit breaker and each concurrency limit
// in use, sorted by name, or a comment if there is none.
func (g *Guard) writeHystrix(out *bufio.Writer) error {
	e := hystrixWriter{guard: g, out: out, at: time.Now().UnixMilli(), shared: map[*limiter.Semaphore]*hystrixPool{}}
	e.json = json.NewEncoder(out)
	states := g.states()
	slices.SortFunc(states, func(a, b *gates) int {
		return cmp.Or(cmp.Compare(a.side, b.side), cmp.Compare(a.target, b.target), cmp.Compare(a.method, b.method))
	})
	var beyond []*gates // the cap
	for _, m := range states {
		switch r := m.recorder.Load(); {
		case r == nil:
		case m.method == overflow:
			beyond = append(beyond, m)
		default:
			e.method(m, r)
		}
	}
	for _, m := range beyond {
		e.overflow(m)
	}
	for _, p := range e.pools {
		e.event(p)
	}
	if !e.written {
		e.text(":\n\n")
	}
	return e.err
}

// hystrixWriter writes the events of one tick.
type hystrixWriter struct {
	guard   *Guard
	out     io.Writer
	json    *json.Encoder
	at      int64
	recent  recent                              // of the method at hand
	pools   []*hystrixPool                      // limits of scope rule, which come last
	shared  map[*limiter.Semaphore]*hystrixPool // the same
	written bool
	err     error // the first
}

func (e *hystrixWriter) text(s string) {
	if e.err == nil {
		_, e.err = io.WriteString(e.out, s)
	}
}

func (e *hystrixWriter) event(v any) {
	e.written = true
	e.text("data: ")
	if e.err == nil {
		e.err = e.json.Encode(v) // ends the line
	}
	e.text("\n")
}

func (e *hystrixWriter) method(m *gates, r *recorder) {
	// Not the time of the tick: a client may have been slow to read the methods before
	// this one, and an engine believes the time that it is told.
	now := e.guard.now()
	r.read(&e.recent, now)
	stream := m.streams(e.recent.kind)
	name, pool := m.hystrixName(), m.poolName(stream)
	if m.breaker != nil {
		e.event(e.command(m, m.breaker.Stats(now), stream, name, cmp.Or(pool, name)))
	}
	if pool != "" {
		e.pool(m, stream, pool)
	}
}

// overflow adds the calls of methods beyond the cap to the limit that they share with
// methods that are shown.
func (e *hystrixWriter) overflow(m *gates) {
	if p := e.shared[m.unary]; p != nil {
		m.recorder.Load().read(&e.recent, e.guard.now())
		e.add(p, m)
	}
}

func (e *hystrixWriter) command(m *gates, st breaker.Stats, stream bool, name, pool string) *hystrixCommand {
	b, n := m.policy.Breaker, &e.recent.events
	c := &hystrixCommand{
		Type: "HystrixCommand", Name: name, Group: m.side.String(), ThreadPool: pool, CurrentTime: e.at, ReportingHosts: 1,
		Open:              st.State != breaker.Closed,
		RequestCount:      n[eventSuccess] + n[eventFailure] + n[eventTimeout],
		ErrorCount:        n[eventFailure] + n[eventTimeout],
		Success:           n[eventSuccess],
		Failure:           n[eventFailure],
		Timeout:           n[eventTimeout],
		ShortCircuited:    n[eventShortCircuited],
		SemaphoreRejected: n[eventRejected] + n[eventNoPlace],
		BadRequests:       n[eventBadRequest],
		FallbackSuccess:   n[eventFallbackSuccess],
		FallbackFailure:   n[eventFallbackFailure],
		InFlight:          int(m.counts.inFlight()),
		ErrorThreshold:    b.ErrorPercent,
		VolumeThreshold:   b.RequestVolume,
		SleepWindow:       b.SleepWindow.Milliseconds(),
		BreakerEnabled:    true,
		Isolation:         "SEMAPHORE",
		MaxConcurrent:     m.places(stream),
		TimeoutMillis:     m.timeout(stream).Milliseconds(),
		Interrupt:         true,
		Window:            hystrixWindow,
	}
	if m.side == Client {
		c.Group += " " + safe(m.target)
	}
	if c.RequestCount > 0 {
		c.ErrorPercentage = 100 * c.ErrorCount / c.RequestCount
	}
	// A fallback may be counted a bucket later than what it is for.
	bad := c.ErrorCount + c.ShortCircuited + c.SemaphoreRejected
	c.FallbackMissing = less(bad+n[eventFallbackNotBad], c.FallbackSuccess+c.FallbackFailure)
	c.ExceptionsThrown = less(bad+c.BadRequests, c.FallbackSuccess)
	c.ThreadTimeout, c.MaxInFlight = c.TimeoutMillis, max(c.InFlight, e.recent.calls)
	c.LatencyExecuteMean, c.LatencyExecute = latency(e.recent.execute)
	c.LatencyTotalMean, c.LatencyTotal = latency(e.recent.total)
	return c
}

// pool writes the event of the method's limit, or adds to that of a limit which
// other methods share.
func (e *hystrixWriter) pool(m *gates, stream bool, name string) {
	slot := m.slot(stream)
	p := e.shared[slot]
	if p == nil {
		size := m.places(stream)
		p = &hystrixPool{
			Type: "HystrixThreadPool", Name: name, CurrentTime: e.at, ReportingHosts: 1,
			Size: size, CoreSize: size, LargestSize: size, MaximumSize: size,
			QueueLimit: m.policy.Concurrency.MaxQueue, Window: hystrixWindow,
		}
		p.Active, p.Queued = slot.Stats()
		p.MaxActive, p.Tasks = p.Active, uint64(p.Active+p.Queued)
		if m.policy.Concurrency.Shared != 0 {
			e.shared[slot] = p
			e.pools = append(e.pools, p)
		}
	}
	e.add(p, m)
	if m.policy.Concurrency.Shared == 0 {
		e.event(p)
	}
}

// add adds what the calls of a method, which was just read, did to its limit.
func (e *hystrixWriter) add(p *hystrixPool, m *gates) {
	ended := m.counts.ended()
	p.Completed += ended
	p.Tasks += ended
	p.Executed += e.recent.executed()
	p.MaxActive = max(p.MaxActive, e.recent.places)
	p.Rejected += e.recent.events[eventNoPlace]
}

// less is a - b, 0 if b is more.
func less(a, b uint64) uint64 { return a - min(a, b) }

func latency(samples []uint32) (uint32, hystrixLatency) {
	slices.Sort(samples)
	at := func(p float64) uint32 { return percentile(samples, p) }
	return mean(samples), hystrixLatency{at(0), at(25), at(50), at(75), at(90), at(95), at(99), at(99.5), at(100)}
}

// streams reports whether the method is a stream. Before its first end since
// recording began, only a stream in flight or a limit for streams alone can tell.
func (m *gates) streams(k kind) bool {
	l := m.policy.Concurrency
	if k != kindUnknown || l == nil || l.Shared != 0 {
		return k == kindStream
	}
	return m.stream.InFlight() > 0 || l.MaxInFlight == 0
}

// places is the size of the method's concurrency limit; 0: unlimited.
func (m *gates) places(stream bool) int {
	l := m.policy.Concurrency
	switch {
	case l == nil:
		return 0
	case stream && l.Shared == 0:
		return l.MaxStreams
	}
	return l.MaxInFlight
}

// hystrixName tells the method apart from every other of the guard: the dashboard
// looks at nothing else. A server's method is its plain name, a client's has the
// target before it: of a name that is too long for its circle, the dashboard shows
// the end. Names that differ in the leading slash alone are taken for one: gRPC sends
// none without it.
func (m *gates) hystrixName() string {
	return m.hystrixPrefix() + safe(strings.TrimPrefix(m.method, "/"))
}

func (m *gates) hystrixPrefix() string {
	if m.side == Server {
		return ""
	}
	return cmp.Or(safe(m.target), "client") + " "
}

// poolName is the name of the method's limit, "" without one. A limit that methods
// share is named by its rule's place in the policy, which is all that they share.
func (m *gates) poolName(stream bool) string {
	l := m.policy.Concurrency
	switch {
	case m.places(stream) == 0:
		return ""
	case l.Shared == 0:
		return m.hystrixName()
	}
	return fmt.Sprintf("%s%s.rules[%d]", m.hystrixPrefix(), m.side, l.Shared-1)
}

// safe escapes, as in a URL, what a dashboard must not meet in a name: it puts names
// into HTML and scripts as they are. Different names stay different, and no name has
// a space.
func safe(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); {
		r, size := utf8.DecodeRuneInString(s[i:])
		if strings.ContainsRune("-._/:@,=+*[]", r) || (unicode.IsLetter(r) || unicode.IsDigit(r)) && r != utf8.RuneError {
			b.WriteString(s[i : i+size])
		} else {
			for _, c := range []byte(s[i : i+size]) {
				fmt.Fprintf(&b, "%%%02X", c)
			}
		}
		i += size
	}
	return b.String()
}
