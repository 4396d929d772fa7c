package interceptors_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

func TestLastGoodMaxAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(t, interceptors.LastGoodConfig{MaxAge: time.Minute})
		m.learn(ask{})
		time.Sleep(30 * time.Second)
		m.want("half as old", ask{}, "answer")
		time.Sleep(30 * time.Second)
		m.want("as old as may be, though used since", ask{}, "answer")
		time.Sleep(time.Nanosecond)
		m.want("older", ask{}, "")
		m.learn(ask{answer: "new"})
		time.Sleep(time.Minute)
		m.want("learned again", ask{}, "new")
	})
}

func TestLastGoodDefaultMaxEntries(t *testing.T) {
	m := newMemory(t, interceptors.LastGoodConfig{})
	numbered := func(i int) ask { return ask{req: wrapperspb.String(fmt.Sprint(i))} }
	for i := range 1001 {
		m.learn(numbered(i))
	}
	m.want("the first", numbered(0), "")
	m.want("the second", numbered(1), "answer")
	m.want("the last", numbered(1000), "answer")
}

func TestLastGoodDefaultMaxBytes(t *testing.T) {
	m := newMemory(t, interceptors.LastGoodConfig{})
	text := strings.Repeat("x", 5<<20)
	for i := range 4 {
		m.learn(ask{req: wrapperspb.String(fmt.Sprint(i)), answer: text})
	}
	m.want("the first of 20 MiB", ask{req: wrapperspb.String("0")}, "")
	m.want("the second", ask{req: wrapperspb.String("1")}, text)
	m.learn(ask{answer: strings.Repeat(text, 4)})
	m.want("20 MiB at once", ask{}, "")
	m.want("the last but that", ask{req: wrapperspb.String("3")}, text)
}

// A reply that cannot be kept makes the one before it the last no more.
func TestLastGoodForgetsWhatIsNotTheLast(t *testing.T) {
	m := newMemory(t, interceptors.LastGoodConfig{MaxBytes: 200})
	m.learn(ask{})
	m.learn(ask{answer: strings.Repeat("x", 200)})
	m.want("after a reply that is too large", ask{}, "")
	m.learn(ask{})
	m.want("after one that fits", ask{}, "answer")
}

// modelEntry is what the naive model keeps: a list, the latest used last.
type modelEntry struct {
	key, reply string
	learned    time.Time
}

func TestLastGoodAgainstModel(t *testing.T) {
	const maxAge, maxEntries, maxBytes = time.Minute, 6, 400
	for seed := range uint64(200) {
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 17))
			m := newMemory(t, interceptors.LastGoodConfig{MaxAge: maxAge, MaxEntries: maxEntries, MaxBytes: maxBytes,
				Key: func(_ context.Context, _ string, req any, _ []grpc.CallOption) (string, bool) {
					return req.(*rpctest.Message).GetValue(), true
				}})
			var model []modelEntry
			find := func(key string) int {
				return slices.IndexFunc(model, func(e modelEntry) bool { return e.key == key })
			}
			bytes := func(entries ...modelEntry) (n int) {
				for _, e := range entries {
					n += len(rpctest.Unary) + len(e.key) + proto.Size(wrapperspb.String(e.reply))
				}
				return n
			}
			for step := range 300 {
				key := strings.Repeat(string(rune('a'+r.IntN(10))), 1+r.IntN(2)*r.IntN(40))
				call := ask{req: wrapperspb.String(key)}
				switch i := find(key); r.IntN(5) {
				case 0:
					time.Sleep(time.Duration(r.Int64N(int64(maxAge / 3))))
				case 1, 2: // learn
					e := modelEntry{key, fmt.Sprint(step) + strings.Repeat("x", r.IntN(2)*r.IntN(450)), time.Now()}
					call.answer = e.reply
					m.learn(call)
					if i >= 0 {
						model = slices.Delete(model, i, i+1)
					}
					if bytes(e) > maxBytes {
						break
					}
					for model = append(model, e); len(model) > maxEntries || bytes(model...) > maxBytes; {
						model = model[1:]
					}
				default: // answer
					want := ""
					if i >= 0 {
						e := model[i]
						model = slices.Delete(model, i, i+1)
						if time.Since(e.learned) <= maxAge {
							model, want = append(model, e), e.reply
						}
					}
					m.want(fmt.Sprintf("seed %d, step %d, key %q", seed, step, key), call, want)
				}
				if t.Failed() {
					t.FailNow()
				}
			}
		})
	}
}

// MaxBytes bounds the heap, not the wire alone: in memory a message can be many
// times what it is on the wire.
func TestLastGoodMemoryIsBounded(t *testing.T) {
	const maxEntries, maxBytes = 1000, 1 << 20
	m := newMemory(t, interceptors.LastGoodConfig{MaxEntries: maxEntries, MaxBytes: maxBytes})
	dense := func(i int) *structpb.ListValue { // many small values
		l := new(structpb.ListValue)
		for j := range 1000 {
			l.Values = append(l.Values, structpb.NewNumberValue(float64(i+j)))
		}
		return l
	}
	m.learn(ask{reply: new(structpb.ListValue), answer: dense(0)})
	heap := heapInUse()
	for i := range 2 * maxEntries {
		m.learn(ask{req: wrapperspb.Int64(int64(i))}) // all of maxEntries small ones
	}
	for i := range 150 { // 1.6 MiB
		m.learn(ask{req: wrapperspb.Int64(int64(i)), reply: new(structpb.ListValue), answer: dense(i)})
	}
	grown := heapInUse() - heap
	t.Logf("%d KiB of heap, %d KiB of them for replies", grown>>10, maxBytes>>10)
	if most := int64(maxBytes + maxEntries*400); grown > most {
		t.Errorf("%d bytes of heap, want at most %d", grown, most)
	}
	runtime.KeepAlive(m)
}

// A channel that was closed is not kept for its answers.
func TestLastGoodKeepsNoChannel(t *testing.T) {
	m := newMemory(t, interceptors.LastGoodConfig{})
	collected := make(chan struct{})
	func() {
		cc, err := grpc.NewClient("passthrough:///gone", grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		runtime.AddCleanup(cc, func(c chan struct{}) { close(c) }, collected)
		m.learn(ask{cc: cc})
		m.want("the channel", ask{cc: cc}, "answer")
		_ = cc.Close()
	}()
	for range 100 {
		runtime.GC()
		select {
		case <-collected:
			runtime.KeepAlive(m)
			return
		default:
			runtime.Gosched()
		}
	}
	t.Error("it is still there")
}

func TestLastGoodIsSafeForConcurrentUse(t *testing.T) {
	m := newMemory(t, interceptors.LastGoodConfig{MaxEntries: 5, MaxBytes: 500})
	var calls sync.WaitGroup
	for worker := range 8 {
		calls.Go(func() {
			r := rand.New(rand.NewPCG(uint64(worker), 1))
			for range 2000 {
				key := fmt.Sprint(r.IntN(10))
				a := ask{ctx: context.Background(), req: wrapperspb.String(key), answer: key + " " + strings.Repeat("x", r.IntN(100))}
				if r.IntN(2) == 0 {
					a.answer, a.err = "left over", errDown
				}
				reply, err := m.call(a)
				got := reply.(*rpctest.Message).GetValue()
				if err != nil && err != errDown || err == nil && !strings.HasPrefix(got, key+" ") {
					t.Errorf("key %s: %q, %v", key, got, err)
				}
				reply.(*rpctest.Message).Value = "spoilt"
			}
		})
	}
	calls.Wait()
	checkIdle(t, m.g)
}
