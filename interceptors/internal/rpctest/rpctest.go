// Package rpctest runs a gRPC server and a client in one process, over memory,
// for tests. Inside a testing/synctest bubble it all happens in virtual time, and
// the bubble's end proves that no goroutine is left.
package rpctest

import (
	"context"
	"net"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// The full names of the test service's methods.
const (
	Unary        = "/test.v1.Test/Unary"
	Other        = "/test.v1.Test/Other" // unary too
	ServerStream = "/test.v1.Test/ServerStream"
	ClientStream = "/test.v1.Test/ClientStream"
	Bidi         = "/test.v1.Test/Bidi"
)

// Message is the request and the response of every method.
type Message = wrapperspb.StringValue

// Service is what the server does. A nil function echoes: a unary call its
// request, a stream each message; a client stream answers with its last one.
type Service struct {
	Unary  func(ctx context.Context, req *Message) (*Message, error)
	Stream func(ss grpc.ServerStream) error // ServerStream, ClientStream and Bidi
}

func (s *Service) unary(ctx context.Context, req *Message) (*Message, error) {
	if s.Unary == nil {
		return req, nil
	}
	return s.Unary(ctx, req)
}

func (s *Service) stream(ss grpc.ServerStream) error {
	if s.Stream != nil {
		return s.Stream(ss)
	}
	method, _ := grpc.Method(ss.Context())
	last := new(Message)
	for {
		m := new(Message)
		if err := ss.RecvMsg(m); err != nil {
			if method == ClientStream {
				return ss.SendMsg(last)
			}
			return nil
		}
		last = m
		if method != ClientStream {
			if err := ss.SendMsg(m); err != nil {
				return err
			}
		}
	}
}

func unaryHandler(method string) grpc.MethodHandler {
	return func(srv any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
		req := new(Message)
		if err := decode(req); err != nil {
			return nil, err
		}
		handler := func(ctx context.Context, req any) (any, error) { return srv.(*Service).unary(ctx, req.(*Message)) }
		if interceptor == nil {
			return handler(ctx, req)
		}
		return interceptor(ctx, req, &grpc.UnaryServerInfo{Server: srv, FullMethod: method}, handler)
	}
}

func streamHandler(srv any, ss grpc.ServerStream) error { return srv.(*Service).stream(ss) }

// Desc describes the test service for grpc.Server.RegisterService.
var Desc = grpc.ServiceDesc{
	ServiceName: "test.v1.Test",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{
		{MethodName: "Unary", Handler: unaryHandler(Unary)},
		{MethodName: "Other", Handler: unaryHandler(Other)},
	},
	Streams: []grpc.StreamDesc{
		{StreamName: "ServerStream", Handler: streamHandler, ServerStreams: true},
		{StreamName: "ClientStream", Handler: streamHandler, ClientStreams: true},
		{StreamName: "Bidi", Handler: streamHandler, ServerStreams: true, ClientStreams: true},
	},
}

// StreamDesc returns the description of a stream method for NewStream.
func StreamDesc(method string) *grpc.StreamDesc {
	for i := range Desc.Streams {
		if method == "/"+Desc.ServiceName+"/"+Desc.Streams[i].StreamName {
			return &Desc.Streams[i]
		}
	}
	panic("rpctest: no stream " + method)
}

// NewServer returns a server of the test service that is not serving yet.
func NewServer(s *Service, opts ...grpc.ServerOption) *grpc.Server {
	srv := grpc.NewServer(opts...)
	srv.RegisterService(&Desc, s)
	return srv
}

// Listen returns a listener in memory.
func Listen() *bufconn.Listener { return bufconn.Listen(1 << 20) }

// Dial connects to a listener in memory; the channel is closed when the test
// ends. The target is passthrough:///test.
func Dial(t testing.TB, lis *bufconn.Listener, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	return DialTarget(t, "passthrough:///test", lis, opts...)
}

// DialTarget is Dial with a target.
func DialTarget(t testing.TB, target string, lis *bufconn.Listener, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(target, append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }),
	}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// Start serves s and connects to it; everything ends with the test.
func Start(t testing.TB, s *Service, server []grpc.ServerOption, dial []grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	srv, lis := NewServer(s, server...), Listen()
	served := make(chan error, 1)
	go func() { served <- srv.Serve(lis) }()
	t.Cleanup(func() {
		srv.Stop()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return Dial(t, lis, dial...)
}

// Call makes a unary call of a method with a text and returns the answer's.
func Call(ctx context.Context, conn grpc.ClientConnInterface, method, text string, opts ...grpc.CallOption) (string, error) {
	reply := new(Message)
	err := conn.Invoke(ctx, method, wrapperspb.String(text), reply, opts...)
	return reply.GetValue(), err
}

// Open opens a stream of a method.
func Open(ctx context.Context, conn grpc.ClientConnInterface, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	return conn.NewStream(ctx, StreamDesc(method), method, opts...)
}

// Send sends a text.
func Send(s interface{ SendMsg(any) error }, text string) error {
	return s.SendMsg(wrapperspb.String(text))
}

// Recv receives a text.
func Recv(s interface{ RecvMsg(any) error }) (string, error) {
	m := new(Message)
	err := s.RecvMsg(m)
	return m.GetValue(), err
}
