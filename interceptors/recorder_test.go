package interceptors

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
	"unsafe"
)

// model is a recorder that keeps everything.
type model struct {
	now   time.Duration
	seen  []seen
	stays kind
}

type seen struct {
	at             time.Duration
	event          event
	ended          bool
	execute, total time.Duration
	calls, places  int
}

func (m *model) note(s seen) {
	m.now = max(m.now, s.at)
	s.at = m.now
	m.seen = append(m.seen, s)
}

// read applies the definition of the windows: the latest n buckets, the one of now
// included, and of each bucket of latencies the 100 latest.
func (m *model) read(now time.Duration) (v recent) {
	m.now = max(m.now, now)
	v.kind = m.stays
	bySpan := map[time.Duration][]sample{}
	for _, s := range m.seen {
		if m.now/countSpan-s.at/countSpan < countBuckets {
			v.events[s.event]++
			if s.ended {
				v.calls, v.places = max(v.calls, s.calls), max(v.places, s.places)
			}
		}
		if span := s.at / sampleSpan; s.ended && m.now/sampleSpan-span < sampleBuckets {
			bySpan[span] = append(bySpan[span], sample{uint32(s.execute / time.Millisecond), uint32(s.total / time.Millisecond)})
		}
	}
	for _, all := range bySpan {
		for _, s := range all[max(0, len(all)-sampleSize):] {
			v.execute, v.total = append(v.execute, s.execute), append(v.total, s.total)
		}
	}
	return v
}

func same(a, b recent) bool {
	for _, s := range [][]uint32{a.execute, a.total, b.execute, b.total} {
		slices.Sort(s)
	}
	return a.events == b.events && a.calls == b.calls && a.places == b.places && a.kind == b.kind &&
		slices.Equal(a.execute, b.execute) && slices.Equal(a.total, b.total)
}

func TestRecorderAgainstModel(t *testing.T) {
	// Mostly busy, with pauses of every length that matters, and with calls that
	// took their time before others.
	steps := []time.Duration{0, 0, 0, time.Millisecond, 30 * time.Millisecond, 300 * time.Millisecond, -5 * time.Millisecond, -time.Second,
		time.Second, 2 * time.Second, 9 * time.Second, 10 * time.Second, 11 * time.Second, 50 * time.Second, time.Minute, 7 * time.Hour}
	for seed := range uint64(300) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		r, m := new(recorder), new(model)
		busy := 1 + rnd.IntN(len(steps))
		var v recent
		for now, i := time.Duration(0), 0; i < 600; i++ {
			now = max(0, now+steps[rnd.IntN(busy)])
			e := event(rnd.IntN(int(events)))
			switch rnd.IntN(8) {
			case 0:
				if r.read(&v, now); !same(v, m.read(now)) {
					t.Fatalf("seed %d, step %d, at %v: got %+v, want %+v", seed, i, now, v, m.read(now))
				}
			case 1, 2:
				r.count(now, e)
				m.note(seen{at: now, event: e})
			default:
				s := seen{at: now, event: e, ended: true, execute: time.Duration(rnd.IntN(1e9)), calls: rnd.IntN(99), places: rnd.IntN(99)}
				s.total = s.execute + time.Duration(rnd.IntN(1e9))
				m.stays = kindOf(rnd.IntN(2) == 0)
				r.ended(e, now, s.execute, s.total, s.calls, s.places, m.stays)
				m.note(s)
			}
		}
	}
}

func TestRecorderAtTheEdgesOfItsWindows(t *testing.T) {
	const start = 3*time.Hour + 999*time.Millisecond // the last ms of its buckets' first second
	for _, tt := range []struct {
		after           time.Duration
		events, samples int
	}{
		{0, 1, 1},
		{9 * time.Second, 1, 1},
		{9*time.Second + time.Millisecond - 1, 1, 1},
		{9*time.Second + time.Millisecond, 0, 1}, // its bucket comes round again
		{10 * time.Second, 0, 1},
		{60*time.Second - 999*time.Millisecond - 1, 0, 1},
		{60*time.Second - 999*time.Millisecond, 0, 0},
		{time.Minute, 0, 0},
		{240 * time.Hour, 0, 0},
		{-time.Hour, 1, 1}, // stands still
	} {
		r, v := new(recorder), recent{}
		r.ended(eventSuccess, start, time.Second, time.Second, 1, 1, kindUnary)
		r.read(&v, start+tt.after)
		if got := int(v.events[eventSuccess]); got != tt.events || v.calls != tt.events || v.places != tt.events {
			t.Errorf("after %v: %d events, %d and %d in flight, want %d", tt.after, got, v.calls, v.places, tt.events)
		}
		if len(v.execute) != tt.samples || len(v.total) != tt.samples {
			t.Errorf("after %v: %d samples, want %d", tt.after, len(v.execute), tt.samples)
		}
	}
}

func TestRecorderClampsDurations(t *testing.T) {
	r, v := new(recorder), recent{}
	r.ended(eventSuccess, 0, -time.Second, 24*365*time.Hour, 1, 0, kindStream)
	if r.read(&v, 0); v.execute[0] != 0 || v.total[0] != 1<<32-1 {
		t.Errorf("got %d and %d ms", v.execute[0], v.total[0])
	}
}

func TestRecorderIsSmallAndDoesNotAllocate(t *testing.T) {
	if size := unsafe.Sizeof(recorder{}); size > 5376 { // a size class of Go's heap
		t.Errorf("%d bytes", size)
	}
	r, v, now := new(recorder), recent{}, time.Duration(0)
	r.read(&v, 0)
	if n := testing.AllocsPerRun(1000, func() {
		now += 10 * time.Millisecond
		r.ended(eventSuccess, now, 1, 2, 3, 4, kindUnary)
		r.count(now, eventFallbackSuccess, eventFallbackNotBad)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// The figures of Hystrix's own algorithm, worked out by hand.
func TestPercentile(t *testing.T) {
	hundred := make([]uint32, 100)
	for i := range hundred {
		hundred[i] = uint32(i+1) * 10 // 10 to 1000
	}
	for _, tt := range []struct {
		samples []uint32
		p       float64
		want    uint32
	}{
		{nil, 50, 0},
		{nil, 100, 0},
		{[]uint32{7}, 0, 7},
		{[]uint32{7}, 99.5, 7},
		{[]uint32{10, 20}, 0, 10},
		{[]uint32{10, 20}, 25, 15}, // rank 0.5
		{[]uint32{10, 20}, 50, 20}, // rank 1
		{[]uint32{10, 20}, 100, 20},
		{[]uint32{10, 20, 30}, 50, 25}, // rank 1.5
		{[]uint32{1, 2, 4}, 50, 3},
		{[]uint32{1, 2, 3}, 50, 2}, // 2.5, rounded down
		{hundred, 0, 10},
		{hundred, 25, 260},
		{hundred, 50, 510},
		{hundred, 99, 1000},
		{hundred, 99.5, 1000},
		{hundred, 100, 1000},
	} {
		if got := percentile(tt.samples, tt.p); got != tt.want {
			t.Errorf("percentile %v of %v: %d, want %d", tt.p, tt.samples, got, tt.want)
		}
	}
	if got := mean(nil); got != 0 {
		t.Errorf("mean of nothing: %d", got)
	}
	if got := mean([]uint32{1, 2, 1<<32 - 1, 1<<32 - 1}); got != 1<<31 {
		t.Errorf("mean: %d", got)
	}
}

func TestSafeNames(t *testing.T) {
	for in, want := range map[string]string{
		"shop.v1.Orders/Place":   "shop.v1.Orders/Place",
		"dns:///[::1]:443":       "dns:///[::1]:443",
		"läden.v1.Läden/Öffne":   "läden.v1.Läden/Öffne",
		"a b":                    "a%20b",
		"a%20b":                  "a%2520b",
		"\"><script>alert(1)":    "%22%3E%3Cscript%3Ealert%281%29",
		`a\b'c&d` + "`":          "a%5Cb%27c%26d%60",
		"a\n\r\t\x00b":           "a%0A%0D%09%00b",
		"\xff\xfe":               "%FF%FE",
		"\u2028\ufffd\U0001f4a5": "%E2%80%A8%EF%BF%BD%F0%9F%92%A5",
		"":                       "",
	} {
		if got := safe(in); got != want {
			t.Errorf("safe(%q) = %q, want %q", in, got, want)
		}
	}
}

// What a set of events costs a busy method, in the lock and out of it.
func BenchmarkRecorderRead(b *testing.B) {
	r, v, rnd := new(recorder), recent{}, rand.New(rand.NewPCG(1, 1))
	for i := range sampleBuckets * sampleSize {
		r.ended(eventSuccess, time.Duration(i)*sampleSpan/sampleSize, time.Duration(rnd.IntN(1e9)), time.Duration(rnd.IntN(1e9)), 1, 1, kindUnary)
	}
	b.Run("read", func(b *testing.B) {
		for b.Loop() {
			r.read(&v, time.Minute-1)
		}
	})
	b.Run("sort", func(b *testing.B) {
		for b.Loop() {
			r.read(&v, time.Minute-1)
			latency(v.execute)
			latency(v.total)
		}
	})
}
