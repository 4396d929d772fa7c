package main

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// deadline is what every call is given, from when it should have begun.
const deadline = time.Second

// sample is a call.
type sample struct {
	at       time.Duration // when it should have begun, 0 is the end of the warm-up
	late     time.Duration // that it began
	took     time.Duration // from when it should have begun, so that a late start hides nothing
	code     codes.Code
	endpoint int // -1: it reached none
}

// arrivals are the times of calls that come at a rate and independently of each other and
// of their answers: an open loop. They are the same in each run.
func arrivals(rate float64, from, to time.Duration) (list []time.Duration) {
	random := rand.New(rand.NewPCG(2026, 11))
	for at := from; ; {
		at += time.Duration(random.ExpFloat64() / rate * float64(time.Second))
		if at >= to {
			return list
		}
		list = append(list, at)
	}
}

// offer makes the calls and waits for them.
func offer(conn *grpc.ClientConn, f *fleet, list []time.Duration, zero time.Time) []sample {
	samples := make([]sample, len(list))
	var all sync.WaitGroup
	for i, at := range list {
		intended := zero.Add(at)
		time.Sleep(time.Until(intended))
		all.Go(func() {
			late := time.Since(intended)
			ctx, cancel := context.WithDeadline(context.Background(), intended.Add(deadline))
			defer cancel()
			var p peer.Peer
			err := conn.Invoke(ctx, method, new(emptypb.Empty), new(emptypb.Empty), grpc.Peer(&p))
			s := sample{at: at, late: late, took: time.Since(intended), code: status.Code(err), endpoint: -1}
			if p.Addr != nil {
				s.endpoint = f.index[p.Addr.String()]
			}
			samples[i] = s
		})
	}
	all.Wait()
	return samples
}

// between are the calls of a span of time. Samples are in the order of their times.
func between(samples []sample, from, to time.Duration) []sample {
	at := func(t time.Duration) int {
		i, _ := slices.BinarySearchFunc(samples, t, func(s sample, t time.Duration) int { return int(s.at - t) })
		return i
	}
	return samples[at(from):at(to)]
}

// quantile of the times of calls, failed ones included, in ms.
func quantile(samples []sample, p float64) float64 {
	return milliseconds(samples, p, func(s sample) time.Duration { return s.took })
}

// lateness is what the machine did to the calls before anybody balanced them: how late one
// of a hundred began, in ms.
func lateness(samples []sample) float64 {
	return milliseconds(samples, 0.99, func(s sample) time.Duration { return s.late })
}

func milliseconds(samples []sample, p float64, of func(sample) time.Duration) float64 {
	if len(samples) == 0 {
		return 0
	}
	times := make([]time.Duration, len(samples))
	for i, s := range samples {
		times[i] = of(s)
	}
	slices.Sort(times)
	return times[int(p*float64(len(times)-1))].Seconds() * 1e3
}

// failed is the percentage of calls that failed.
func failed(samples []sample) float64 {
	return percent(samples, func(s sample) bool { return s.code != codes.OK })
}

// share is what an endpoint had of the calls, in percent of a fair share.
func share(samples []sample, endpoint int) float64 {
	return replicas * percent(samples, func(s sample) bool { return s.endpoint == endpoint })
}

func percent(samples []sample, is func(sample) bool) float64 {
	n := 0
	for _, s := range samples {
		if is(s) {
			n++
		}
	}
	return 100 * float64(n) / float64(max(1, len(samples)))
}
