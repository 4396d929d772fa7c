package interceptors_test

import (
	"encoding/json"
	"fmt"
	"testing"
	"testing/synctest"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
	"github.com/grpc-resilience/grpc-resilience/interceptors/internal/rpctest"
)

func TestSnapshotAsJSON(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := mustGuard(t, `
client: {rules: [{methods: ["/test.v1.Test/Unary"], breaker: {request_volume_threshold: 1, sleep_window: 1500ms}}]}
server: {rules: [{methods: ["/test.v1.Test/*"], rate_limit: {requests_per_second: 10, burst: 4}, concurrency_limit: {max_in_flight: 2, max_queue: 5}}]}`)
		cc := channel(t, "example.com")
		_ = callOn(g, cc, rpctest.Unary, errDown)
		_ = callOn(g, cc, rpctest.Unary, nil)
		_ = callOn(g, cc, "/not.in/ThePolicy", nil)
		d := newDesk()
		conn := rpctest.Start(t, d.service(), g.ServerOptions(), nil)
		a := arm{method: rpctest.Unary}
		for i := range 4 {
			a.start(t.Context(), conn, fmt.Sprint(i))
		}
		stream := arm{method: rpctest.Bidi}
		stream.start(t.Context(), conn, "")
		if err := a.call(t.Context(), conn, ""); reasonOf(err) != interceptors.ReasonRateLimited {
			t.Fatal(err)
		}
		_ = serveOn(g, "/test.v1.Test/Fails", errDown)
		got, err := json.MarshalIndent(g.Snapshot(), "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != snapshotJSON {
			t.Errorf("got %s", got)
		}
		for range 5 {
			d.next(nil)
		}
		checkIdle(t, g)
	})
}

const snapshotJSON = `{
  "methods": [
    {
      "side": "client",
      "target": "dns:///example.com",
      "method": "/test.v1.Test/Unary",
      "breaker": {
        "engine": "window",
        "state": "open",
        "requests": 0,
        "failures": 0,
        "retry_after_seconds": 1.5
      },
      "counts": {
        "admitted": 1,
        "rejected": {
          "BREAKER_OPEN": 1
        },
        "would_reject": {},
        "success": 0,
        "failure": 1,
        "neutral": 0,
        "dropped": 0
      }
    },
    {
      "side": "server",
      "target": "",
      "method": "/test.v1.Test/Bidi",
      "rate_limit": {
        "requests_per_second": 10,
        "available": 3,
        "waiting": 0
      },
      "concurrency_limit": {
        "limit": 2,
        "in_flight": 0,
        "streams": 1,
        "queued": 0
      },
      "counts": {
        "admitted": 1,
        "rejected": {},
        "would_reject": {},
        "success": 0,
        "failure": 0,
        "neutral": 0,
        "dropped": 0
      }
    },
    {
      "side": "server",
      "target": "",
      "method": "/test.v1.Test/Fails",
      "rate_limit": {
        "requests_per_second": 10,
        "available": 3,
        "waiting": 0
      },
      "concurrency_limit": {
        "limit": 2,
        "in_flight": 0,
        "streams": 0,
        "queued": 0
      },
      "counts": {
        "admitted": 1,
        "rejected": {},
        "would_reject": {},
        "success": 0,
        "failure": 1,
        "neutral": 0,
        "dropped": 0
      }
    },
    {
      "side": "server",
      "target": "",
      "method": "/test.v1.Test/Unary",
      "rate_limit": {
        "requests_per_second": 10,
        "available": 0,
        "waiting": 0
      },
      "concurrency_limit": {
        "limit": 2,
        "in_flight": 2,
        "streams": 0,
        "queued": 2
      },
      "counts": {
        "admitted": 2,
        "rejected": {
          "RATE_LIMITED": 1
        },
        "would_reject": {},
        "success": 0,
        "failure": 0,
        "neutral": 0,
        "dropped": 0
      }
    }
  ],
  "drain": {
    "phase": "serving",
    "in_flight": 5
  },
  "panics": 0
}`
