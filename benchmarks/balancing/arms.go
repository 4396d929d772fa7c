package main

import (
	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer/leastrequest"
	"google.golang.org/grpc/balancer/roundrobin"
	"google.golang.org/grpc/balancer/weightedroundrobin"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// An arm is a balancer, as somebody would use it who has read its documentation.
type arm struct {
	name  string
	about string
	dial  func() []grpc.DialOption
	orca  bool // servers report their load with each call
}

const ours = "resilience_p2c"

var arms = []arm{
	{name: ours, about: "this module, `client: {load_balancing: {}}`: all defaults", dial: oursDial},
	{name: roundrobin.Name, about: "grpc-go, one after the other", dial: config(`{"round_robin":{}}`)},
	{name: leastrequest.Name, about: "grpc-go, of two endpoints drawn at random the one with fewer calls in flight", dial: config(`{"least_request_experimental":{}}`)},
	{name: weightedroundrobin.Name, orca: true, dial: config(`{"weighted_round_robin":{"blackoutPeriod":"1s"}}`),
		about: "grpc-go, by what servers say of their load: ORCA reports with each call of calls a second, errors a second and utilization (a quarter, at a fair share); `blackoutPeriod` 1s, or it would begin after the 10 s of its default"},
}

func oursDial() []grpc.DialOption {
	policy := must(interceptors.Parse("balancing", []byte("client: {load_balancing: {}}")))
	return must(interceptors.New(policy, interceptors.WithLogger(quietLogger))).DialOptions()
}

func config(balancer string) func() []grpc.DialOption {
	return func() []grpc.DialOption {
		return []grpc.DialOption{grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[` + balancer + `]}`)}
	}
}

// connect makes the arm's channel to its fleet.
func (a arm) connect(f *fleet) *grpc.ClientConn {
	return must(grpc.NewClient(f.target(), append(a.dial(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithResolvers(f.resolver))...))
}
