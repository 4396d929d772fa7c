package balance

import (
	"context"
	"fmt"
	"runtime"
	"testing"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/resolver"
)

const (
	us  = time.Microsecond
	ms  = time.Millisecond
	sec = time.Second
)

func settings() Settings { return Settings{Decay: 2 * sec, SlowStart: 10 * sec} }

// eachLoad is few and many calls, for as long as it takes to count.
func eachLoad(t *testing.T, f func(t *testing.T, every, during time.Duration)) {
	for _, every := range []time.Duration{20 * ms, ms, ms / 4} {
		t.Run(every.String(), func(t *testing.T) { f(t, every, max(1000*every, 5*sec)) })
	}
}

func TestEven(t *testing.T) {
	eachLoad(t, func(t *testing.T, every, during time.Duration) {
		for _, n := range []int{2, 10, 200} {
			m := newSim(t, settings(), n, takes(10*ms))
			m.run(every, sec)
			m.reset()
			m.run(every, during*time.Duration(max(1, n/40)))
			for _, name := range m.list[:min(n, 10)] {
				m.wantShare(name, 0.4/float64(n), 1.8/float64(n))
			}
		}
	})
}

// One of ten is ten times slower: it gets no more than a fifth of its share, and when it
// has healed its share.
func TestSlow(t *testing.T) {
	eachLoad(t, func(t *testing.T, every, during time.Duration) {
		for _, n := range []int{2, 10} {
			m := newSim(t, settings(), n, takes(10*ms))
			m.server["e000"] = takes(100 * ms)
			m.run(every, sec)
			m.reset()
			m.run(every, during)
			m.wantShare("e000", 0, 0.2/float64(n))
			m.server["e000"] = takes(10 * ms)
			m.run(every, 8*sec)
			m.reset()
			m.run(every, during)
			m.wantShare("e000", 0.75/float64(n), 2)
		}
	})
}

// Who fails or rejects at once is fast, and not attractive for it.
func TestFailsFast(t *testing.T) {
	for _, err := range []error{errDown, errFull} {
		t.Run(err.Error(), func(t *testing.T) {
			eachLoad(t, func(t *testing.T, every, during time.Duration) {
				m := newSim(t, settings(), 10, takes(10*ms))
				m.run(every, 2*sec)
				m.server["e000"] = fails(err)
				m.run(every, 2*sec)
				m.reset()
				m.run(every, 4*during)
				if part := float64(m.errs) / float64(m.calls); part > 0.01 {
					t.Errorf("%.4f of the calls failed after 2s", part)
				}
				m.server["e000"] = takes(10 * ms)
				m.run(every, 10*sec)
				m.reset()
				m.run(every, during)
				m.wantShare("e000", 0.075, 1)
			})
		})
	}
}

// One call that takes long, among many that do not, costs its endpoint little.
func TestOneLongCall(t *testing.T) {
	m := newSim(t, settings(), 10, takes(10*ms))
	m.run(ms, 2*sec)
	m.server["e000"] = takes(900 * ms)
	for before := m.took["e000"]; m.took["e000"] == before; {
		m.run(ms, ms)
	}
	m.server["e000"] = takes(10 * ms)
	m.run(ms, sec)
	m.reset()
	m.run(ms, 2*sec)
	m.wantShare("e000", 0.05, 0.12)
}

// What a failure costs does not depend on how long it took, and ends with the first success:
// then the endpoint has its share at once.
func TestPenaltyEnds(t *testing.T) {
	for _, s := range []server{fails(errFull), takes(900 * ms), takes(time.Hour)} {
		m := newSim(t, settings(), 10, takes(10*ms))
		m.run(ms, 2*sec)
		m.server["e000"] = func(now time.Duration) (time.Duration, error) {
			d, _ := s(now)
			return min(d, 900*ms), errFull
		}
		m.run(ms, 30*sec)
		m.server["e000"] = takes(10 * ms)
		m.run(ms, sec) // the end of what was in flight
		m.reset()
		began := m.now
		for m.took["e000"] == 0 {
			m.run(ms, ms)
		}
		if took := m.now - began; took > 8*sec {
			t.Errorf("it was asked again after %v", took)
		}
		m.run(ms, 100*ms)
		m.reset()
		m.run(ms, sec)
		m.wantShare("e000", 0.08, 0.2)
	}
}

// A new endpoint that has only ever rejected does not look new, whatever the others take.
func TestFailsFromTheStart(t *testing.T) {
	for _, d := range []time.Duration{ms / 10, 10 * ms, sec / 2} {
		m := newSim(t, settings(), 1, takes(d))
		m.run(10*ms, 5*sec)
		m.server["new"] = fails(errFull)
		m.resolve("e000", "new")
		m.run(10*ms, sec)
		m.reset()
		m.run(10*ms, 60*sec)
		m.wantShare("new", 0, 0.02)
	}
}

// A black hole holds its calls until their deadline: what it was does not fade meanwhile.
func TestBlackHole(t *testing.T) {
	m := newSim(t, settings(), 10, takes(10*ms))
	m.run(ms, sec)
	m.server["e000"] = takes(time.Hour)
	m.reset()
	m.run(ms, 20*sec)
	m.wantShare("e000", 0, 0.003)

	// One that holds calls without a deadline.
	e := m.endpoint("e001")
	e.inFlight.Add(10)
	before := e.cost(m.now, 2*sec, 10*ms)
	if after := e.cost(m.now+time.Hour, 2*sec, 10*ms); after != before || after == 0 {
		t.Errorf("its cost was %v, is %v", before, after)
	}
}

// Deadlines that are too short to be failures tell a black hole all the same, and do not
// make an endpoint look worse than they are long.
func TestShortDeadlines(t *testing.T) {
	eachLoad(t, func(t *testing.T, every, during time.Duration) {
		m := newSim(t, ejecting(), 10, takes(5*ms))
		m.run(every, 2*sec)
		m.server["e000"] = func(time.Duration) (time.Duration, error) { return 40 * ms, errLate }
		m.run(every, sec)
		m.reset()
		m.run(every, 2*during)
		m.wantShare("e000", 0, 0.05)
		m.server["e000"] = takes(5 * ms)
		m.run(every, 8*sec)
		m.server["e000"] = func(time.Duration) (time.Duration, error) { return ms, errLate }
		m.reset()
		m.run(every, 2*during)
		m.wantShare("e000", 0.07, 0.25)
	})
}

func TestSlowStart(t *testing.T) {
	m := newSim(t, settings(), 4, takes(10*ms))
	m.run(ms, sec)
	m.wantShare("e000", 0.15, 0.35) // they are not new, the client is
	m.server["new"] = takes(10 * ms)
	m.resolve(append(m.list, "new")...)
	for _, want := range []float64{0.01 + 0.02, 0.06, 0.1, 0.14, 0.18, 0.2, 0.2} {
		m.reset()
		m.run(ms, 2*sec)
		m.wantShare("new", want-0.035, want+0.05)
	}
	m.server["new"] = nil // it loses its connection, and finds it again
	m.connect()
	m.run(ms, sec)
	m.server["new"] = takes(10 * ms)
	m.connect()
	m.run(ms, sec)
	m.reset()
	m.run(ms, 4*sec)
	m.wantShare("new", 0.15, 0.25)
}

// Prequal's rule: an endpoint with far more in flight than others is passed over, however
// fast it was.
func TestHot(t *testing.T) {
	m := newSim(t, settings(), 5, takes(100*ms))
	m.server["e000"] = takes(ms)
	m.run(10*ms, 5*sec)
	m.endpoint("e000").inFlight.Add(40) // streams
	m.until(m.now + sec)
	m.reset()
	m.run(10*ms, 5*sec)
	m.wantShare("e000", 0, 0.02)
	for _, e := range m.picker.ready { // and the one with the fewest, when all are
		if e.address != "e000" {
			e.inFlight.Add(60)
		}
	}
	m.picker.pool.survey.hot.Store(10)
	if !m.picker.better(m.endpoint("e000"), m.endpoint("e001"), m.now, m.group.settings.Load()) {
		t.Error("of two hot ones the one with more in flight is better")
	}
}

// A hot endpoint is better than one that fails, which is cold because nobody goes there.
func TestHotBesideOneThatFails(t *testing.T) {
	m := newSim(t, settings(), 3, takes(10*ms))
	m.server["e000"] = fails(errFull)
	m.run(ms, 10*sec)
	m.reset()
	for range 200 { // a burst
		_, _ = m.call(context.Background())
	}
	m.wantShare("e000", 0, 0.05)
}

// Two different ones, each pair as often as each other.
func TestDraw(t *testing.T) {
	if i, j := draw(1); i != 0 || j != 0 {
		t.Errorf("of one: %d, %d", i, j)
	}
	var count [5][5]int
	for range 20_000 {
		i, j := draw(5)
		count[i][j]++
	}
	for i := range count {
		for j, n := range count[i] {
			if want := 1000; i == j && n > 0 || i != j && (n < want*4/5 || n > want*6/5) {
				t.Errorf("%d and %d were drawn %d times", i, j, n)
			}
		}
	}
}

// Who comes back after a failure goes elsewhere.
func TestRetryGoesElsewhere(t *testing.T) {
	m := newSim(t, settings(), 3, takes(10*ms))
	for range 300 {
		ctx, cancel := context.WithCancel(NewRetried(t.Context()))
		first, _ := m.call(ctx)
		if second, _ := m.call(ctx); second == first {
			t.Fatalf("twice at %s", first)
		}
		cancel()
		m.until(m.now + ms)
	}
	m.resolve("e000")
	ctx := NewRetried(t.Context())
	_, _ = m.call(ctx)
	if name, err := m.call(ctx); name != "e000" {
		t.Errorf("the only endpoint is not tried again: %v", err)
	}
}

// A longer latency counts at once, up to the double, a shorter one by the time since the last.
func TestPeak(t *testing.T) {
	e := newEndpoint(resolver.Endpoint{}, true)
	for _, step := range []struct{ at, latency, want time.Duration }{
		{0, 10 * ms, 10 * ms}, {0, 50 * ms, 20 * ms}, {0, 39 * ms, 39 * ms}, {0, 50 * ms, 50 * ms}, {0, 10 * ms, 50 * ms}, {2 * sec, 10 * ms, 24715 * us},
		{1000 * sec, 10 * ms, 10 * ms},
	} {
		e.observe(step.at, step.latency, 2*sec)
		if got := time.Duration(load(&e.peak)).Round(us); got != step.want {
			t.Errorf("at %v: %v, want %v", step.at, got, step.want)
		}
	}
	// Idle, it fades, until it is as good as not known.
	for after, want := range map[time.Duration]time.Duration{0: 10 * ms, 2 * sec: 3679 * us, 4 * sec: 1353 * us, 5 * sec: 0} {
		if got := time.Duration(e.cost(1000*sec+after, 2*sec, 10*ms)).Round(us); got != want {
			t.Errorf("after %v its cost is %v, want %v", after, got, want)
		}
	}
}

// What says nothing about an endpoint changes nothing.
func TestNeutral(t *testing.T) {
	m := newSim(t, settings(), 1, takes(10*ms))
	m.run(ms, sec)
	m.until(m.now + sec)
	e := m.endpoint("e000")
	peak, mean := load(&e.peak), load(&e.mean)
	for _, info := range []balancer.DoneInfo{{}, {Err: errDown}, {BytesSent: true}, {Err: context.Canceled, BytesSent: true}} {
		r, _ := m.picker.Pick(balancer.PickInfo{Ctx: t.Context()})
		m.now += time.Minute
		r.Done(info)
	}
	r, _ := m.picker.Pick(balancer.PickInfo{Ctx: NewStream(t.Context(), false)})
	m.now += time.Hour
	r.Done(balancer.DoneInfo{BytesSent: true, BytesReceived: true})
	if load(&e.peak) != peak || load(&e.mean) != mean || e.inFlight.Load() != 0 {
		t.Errorf("peak %v, mean %v, %d in flight", load(&e.peak), load(&e.mean), e.inFlight.Load())
	}
}

// Where no latency is ever known, as among streams, who failed is tried again in time.
func TestStreamsAlone(t *testing.T) {
	m := newSim(t, settings(), 3, takes(10*ms))
	stream := func() {
		_, _ = m.call(NewStream(t.Context(), false))
		m.until(m.now + 50*ms)
	}
	m.server["e000"] = fails(errFull)
	for range 100 {
		stream()
	}
	if m.errs == 0 || m.errs > 3 {
		t.Errorf("%d errors", m.errs)
	}
	m.server["e000"] = takes(10 * ms)
	for range 200 {
		stream()
	}
	m.reset()
	for range 300 {
		stream()
	}
	m.wantShare("e000", 0.25, 0.42)

	// Beside unary calls, whose latency is known, a stream ends a penalty as well.
	e := m.endpoint("e001")
	e.observe(m.now, 10*ms, 2*sec)
	e.penalize(m.now, float64(sec))
	r, _ := (&picker{pool: m.pool, ready: []choice{{e, child{last: &m.last}}}}).Pick(balancer.PickInfo{Ctx: NewStream(t.Context(), false)})
	r.Done(balancer.DoneInfo{BytesSent: true, BytesReceived: true})
	if got := time.Duration(e.cost(m.now, 2*sec, 10*ms)); got > 20*ms {
		t.Errorf("after a stream its cost is %v", got)
	}
}

// Addresses that come and go for a day leave nothing.
func TestAddressesComeAndGo(t *testing.T) {
	m := newSim(t, settings(), 3, takes(10*ms))
	for i := range 24 * 60 {
		name := fmt.Sprintf("new%d", i)
		m.server[name] = takes(10 * ms)
		m.resolve("e000", "e001", name)
		m.run(sec, 10*sec)
		m.until(m.now + 50*sec)
		delete(m.server, name)
	}
	if n := m.pool.endpoints.Len(); n != 3 {
		t.Errorf("%d endpoints are kept", n)
	}
	m.group.forget(m.pool)
	if len(m.group.pools) != 0 {
		t.Error("the closed pool is kept")
	}
}

// A group that nobody refers to any more is not in the table.
func TestGroupsAreForgotten(t *testing.T) {
	number := NewGroup(settings(), Hooks{}).number
	for range 100 {
		runtime.GC()
		if _, ok := groups.Load(number); !ok {
			return
		}
		time.Sleep(ms)
	}
	t.Error("the group is kept")
}

func TestPickDoesNotAllocate(t *testing.T) {
	for _, n := range []int{2, 10, 1000} {
		pick := picks(t, n)
		if got := testing.AllocsPerRun(1000, pick); got != 0 {
			t.Errorf("a pick among %d: %v allocations", n, got)
		}
	}
}

// picks is a pick and its end.
func picks(tb testing.TB, n int) func() {
	m := newSim(tb, ejecting(), n, takes(10*ms))
	m.run(ms, 2*sec)
	ctx, began := context.Background(), time.Now()
	m.group.hooks.Now = func() time.Duration { return m.now + time.Since(began) }
	return func() {
		r, err := m.picker.Pick(balancer.PickInfo{Ctx: ctx})
		if err != nil {
			tb.Fatal(err)
		}
		r.Done(balancer.DoneInfo{BytesSent: true, BytesReceived: true})
	}
}

func BenchmarkPick(b *testing.B) {
	for _, n := range []int{2, 10, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			pick := picks(b, n)
			b.ReportAllocs()
			for b.Loop() {
				pick()
			}
		})
	}
}

func BenchmarkPickParallel(b *testing.B) {
	pick := picks(b, 10)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			pick()
		}
	})
}
