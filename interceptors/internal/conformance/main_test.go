// Package conformance holds the tests that need more than the root module may:
// models of the engines, a real metrics exporter, and the test suite of
// go-grpc-middleware.
package conformance

import (
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// The suite's own: after TearDownSuite it waits for a restart for ever.
		goleak.IgnoreTopFunction("github.com/grpc-ecosystem/go-grpc-middleware/v2/testing/testpb.(*InterceptorTestSuite).SetupSuite.func1"))
}
