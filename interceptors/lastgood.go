package interceptors

import (
	"cmp"
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
	"weak"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// The defaults of LastGoodConfig.
const (
	defaultMaxEntries = 1000
	defaultMaxBytes   = 16 << 20
)

// LastGoodConfig says what LastGood keeps, and for how long. The zero value is
// not valid: MaxAge and Key are required.
type LastGoodConfig struct {
	// MaxAge is how old, since its call ended, a reply may be to be an answer.
	// Required, more than 0.
	MaxAge time.Duration

	// MaxEntries is how many replies are kept; beyond that, the one that was
	// learned or handed out the longest ago is forgotten. 0: 1000.
	MaxEntries int

	// MaxBytes is how many bytes the replies and their keys may take, marshalled;
	// beyond that, as with MaxEntries. What does not fit alone is not kept. The
	// bookkeeping of an entry, some 300 bytes, is not in it. 0: 16 MiB.
	MaxBytes int

	// Key says which calls have the same answer, of those that are made on one
	// channel, to one method: ok is false for a call that is neither to be learned
	// nor to be answered. Required, because only the program knows what decides a
	// reply: WholeRequest if that is nothing but the request and the outgoing
	// metadata, else a function that has the caller in its key.
	//
	// ctx, req and opts are those that the guard was given. opts must not be changed.
	// It is called before each call, on the caller's goroutine, and must be safe for
	// concurrent use. If it panics, the panic is logged, once, and the call is not
	// learned or answered.
	Key func(ctx context.Context, method string, req any, opts []grpc.CallOption) (key string, ok bool)
}

// LastGood is a fallback that answers with the last good reply to the same
// request, if it is not older than cfg.MaxAge; it returns the cause if there is
// none. It is asked when a fallback of WithFallback would be, whether or not the
// call's deadline is over. It learns from the calls that returned nil with the
// outcome Success; replies that are no proto.Message are not learned, and none is
// an answer where another message type is asked for. The caller's reply is a
// copy of its own.
//
// The same request is one with the same cfg.Key, of the same method, on the same
// channel: an answer never crosses channels (those who chain by hand and give no
// channel share one that has no name). Callers of one channel are another matter:
// whoever makes a key that another caller made is given that one's reply. A key that
// leaves out what the server tells callers apart by gives one user what another was
// told.
//
// A reply is as old as the call that it was learned from. Where a guard further in
// has a LastGood of its own, what that answers is a success to this one, which
// learns it as if it were new: what is handed out may be as old as both MaxAges
// together.
//
// What it has learned belongs to one guard and goes with it; no goroutine is
// started. New returns an error for what WithFallback names, for a cfg.MaxAge that
// is not more than 0, for a nil cfg.Key, and for limits below 0.
func LastGood(pattern string, cfg LastGoodConfig) Option {
	return optionFunc(func(o *options) error {
		var errs []error
		if cfg.MaxAge <= 0 {
			errs = append(errs, fmt.Errorf("LastGood: MaxAge of %q: found %v, allowed more than 0s", pattern, cfg.MaxAge))
		}
		if cfg.MaxEntries < 0 {
			errs = append(errs, fmt.Errorf("LastGood: MaxEntries of %q: found %d, allowed 0 (%d) or more", pattern, cfg.MaxEntries, defaultMaxEntries))
		}
		if cfg.MaxBytes < 0 {
			errs = append(errs, fmt.Errorf("LastGood: MaxBytes of %q: found %d, allowed 0 (%d) or more", pattern, cfg.MaxBytes, defaultMaxBytes))
		}
		if cfg.Key == nil {
			errs = append(errs, fmt.Errorf("LastGood: Key of %q is required: interceptors.WholeRequest if nothing but the request and the outgoing metadata decides the reply, else a function that has the caller in its key", pattern))
		}
		errs = append(errs, o.addFallback("LastGood", pattern, &fallback{lastGood: newLastGood(cfg)}))
		return errors.Join(errs...)
	})
}

// lastGood holds the replies that a pattern's calls were given, marshalled: a
// message in memory takes many times the size that could be accounted for.
type lastGood struct {
	maxAge               time.Duration
	maxEntries, maxBytes int
	key                  func(ctx context.Context, method string, req any, opts []grpc.CallOption) (string, bool)

	mu      sync.Mutex // guards what follows
	entries map[entryKey]*list.Element
	order   *list.List // of *entry, the latest used first
	bytes   int        // of all entries
}

// entryKey is what calls have in common that have the same answer.
type entryKey struct {
	channel     weak.Pointer[grpc.ClientConn] // for its target and credentials
	method, key string
}

// entry is a reply. It is not changed once it is made.
type entry struct {
	key     entryKey
	kind    protoreflect.FullName
	reply   []byte
	learned time.Duration
}

func (e *entry) size() int { return e.key.size() + len(e.reply) }

func (k *entryKey) size() int { return len(k.method) + len(k.key) }

func newLastGood(cfg LastGoodConfig) *lastGood {
	return &lastGood{
		maxAge:     cfg.MaxAge,
		maxEntries: cmp.Or(cfg.MaxEntries, defaultMaxEntries),
		maxBytes:   cmp.Or(cfg.MaxBytes, defaultMaxBytes),
		key:        cfg.Key,
		entries:    map[entryKey]*list.Element{},
		order:      list.New(),
	}
}

// question is what a call asks, in a lastGood's words.
type question struct {
	to  *lastGood
	key entryKey
}

// ask makes the question of a call, nil if its fallback is no lastGood or its
// reply is neither to be learned nor to be answered.
func (c *call) ask(ctx context.Context, req any, cc *grpc.ClientConn, opts []grpc.CallOption) (q *question) {
	f := c.guard.opts.fallbacks.of(c.method)
	if f == nil || f.lastGood == nil {
		return nil
	}
	l := f.lastGood
	c.guard.contain(f.keyName, func() {
		if key, ok := l.key(ctx, c.method, req, opts); ok {
			q = &question{to: l, key: entryKey{weak.Make(cc), c.method, key}}
		}
	})
	return q
}

// WholeRequest is the Key of LastGood for methods whose reply is decided by the
// request and the outgoing metadata in ctx, as the guard sees both, and by nothing
// else. The key is their SHA-256, 32 bytes whatever their size; the copy of the
// request that it is made from is not kept while the call runs.
//
// It cannot see what is added behind the guard: metadata from interceptors further
// in, such as those given to DialOptions as extra, from stats handlers, and from the
// channel's own credentials (grpc.WithPerRPCCredentials, grpc.WithCredentialsBundle).
// Where these choose by ctx in whose name a call is made, WholeRequest takes all
// callers of the channel for one, and gives each of them the replies of the others:
// put that interceptor in front of the guard, or write a Key that has the caller in
// it. What is the same for all calls of a channel does no harm.
//
// ok is false for a request that is no proto.Message or cannot be marshalled, and
// for a call with any option but these: grpc.EmptyCallOption, StaticMethod, Header,
// Trailer, Peer, OnFinish, WaitForReady, FailFast, MaxCallRecvMsgSize,
// MaxCallSendMsgSize, MaxRetryRPCBufferSize and UseCompressor. Others may be
// credentials (grpc.PerRPCCredentials), another server (grpc.CallAuthority), or
// what an interceptor further in goes by.
//
// Metadata that is new on each call, such as a request id, makes each request
// another one: nothing is ever answered. There, too, write a Key.
func WholeRequest(ctx context.Context, method string, req any, opts []grpc.CallOption) (key string, ok bool) {
	for _, opt := range opts {
		if !harmless(opt) {
			return "", false
		}
	}
	m, ok := req.(proto.Message)
	if !ok {
		return "", false
	}
	// The metadata, sorted, each string with its length, and the request.
	md, _ := metadata.FromOutgoingContext(ctx)
	b := binary.AppendUvarint(nil, uint64(len(md)))
	for _, name := range slices.Sorted(maps.Keys(md)) {
		b = appendString(b, name)
		b = binary.AppendUvarint(b, uint64(len(md[name])))
		for _, value := range md[name] {
			b = appendString(b, value)
		}
	}
	b, err := proto.MarshalOptions{Deterministic: true}.MarshalAppend(b, m)
	if err != nil {
		return "", false
	}
	sum := sha256.Sum256(b)
	return string(sum[:]), true
}

// harmless reports whether an option is one of gRPC's own that say nothing about
// who asks for what. A type that wraps one of them may do anything beside.
func harmless(opt grpc.CallOption) bool {
	switch opt.(type) {
	case grpc.EmptyCallOption, grpc.StaticMethodCallOption, // generated code gives the latter
		grpc.HeaderCallOption, grpc.TrailerCallOption, grpc.PeerCallOption, grpc.OnFinishCallOption,
		grpc.FailFastCallOption, grpc.CompressorCallOption,
		grpc.MaxRecvMsgSizeCallOption, grpc.MaxSendMsgSizeCallOption, grpc.MaxRetryRPCBufferSizeCallOption:
		return true
	}
	return false
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// learn keeps the reply to a question. Where it cannot be kept, what was known
// before is not the last one any more.
func (l *lastGood) learn(key entryKey, reply any, now time.Duration) {
	m, ok := reply.(proto.Message)
	if !ok {
		return
	}
	var e *entry
	if key.size()+proto.Size(m) <= l.maxBytes {
		if b, err := (proto.MarshalOptions{AllowPartial: true}).Marshal(m); err == nil {
			e = &entry{key: key, kind: m.ProtoReflect().Descriptor().FullName(), reply: b, learned: now}
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.forgetLocked(l.entries[key])
	if e == nil {
		return
	}
	l.entries[key] = l.order.PushFront(e)
	l.bytes += e.size()
	for l.bytes > l.maxBytes || l.order.Len() > l.maxEntries {
		l.forgetLocked(l.order.Back())
	}
}

func (l *lastGood) forgetLocked(at *list.Element) {
	if at == nil {
		return
	}
	e := l.order.Remove(at).(*entry)
	delete(l.entries, e.key)
	l.bytes -= e.size()
}

// find returns what was learned, nil if that is nothing or too old.
func (l *lastGood) find(key entryKey, now time.Duration) *entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := l.entries[key]
	if at == nil {
		return nil
	}
	e := at.Value.(*entry)
	if now-e.learned > l.maxAge {
		l.forgetLocked(at)
		return nil
	}
	l.order.MoveToFront(at)
	return e
}

// answer fills reply, or returns cause; it does the latter for a nil question.
func (q *question) answer(reply any, now time.Duration, cause error) error {
	m, ok := reply.(proto.Message)
	if !ok || q == nil {
		return cause
	}
	e := q.to.find(q.key, now)
	if e == nil || e.kind != m.ProtoReflect().Descriptor().FullName() {
		return cause
	}
	if (proto.UnmarshalOptions{AllowPartial: true}).Unmarshal(e.reply, m) != nil {
		return cause
	}
	return nil
}
