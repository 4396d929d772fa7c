package main

import (
	"context"
	_ "embed"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

// The section on what a client notices of a replica that turns slow and then dies,
// with two others beside it.

//go:embed replicas.yaml
var replicasYAML []byte

// searchers are so few that two replicas have places for all.
const searchers = 6

func (w *walk) replicas(ctx context.Context) error {
	policy, err := interceptors.Parse("replicas.yaml", replicasYAML)
	if err != nil {
		return err
	}
	guard, err := interceptors.New(policy, interceptors.WithLogger(slog.New(slog.NewTextHandler(w.show, withoutTime))))
	if err != nil {
		return err
	}
	defer guard.Close()
	w.show.turnTo(guard)
	defer w.show.turnTo(w.guard)
	f, err := startFleet(ctx, guard, 3)
	if err != nil {
		return err
	}
	defer f.close()
	spell := max(w.spell, time.Second) // some hundreds of calls

	if err := f.meet(ctx); err != nil {
		return err
	}
	counts, errs, err := f.during(ctx, spell)
	if err != nil {
		return err
	}
	w.claimAll("replicas: with three that are well, calls that are OK", errs, isOK)
	each := shares(counts)
	w.claimThat(slices.Min(each) >= 10, "replicas: what each of them gets", "at least 10 %", fmt.Sprintf("%.0f %%, %.0f %%, %.0f %%", each[0], each[1], each[2]))

	victim := f.servers[0]
	if _, err := victim.set(ctx, "index", slow); err != nil {
		return err
	}
	if counts, errs, err = f.during(ctx, spell); err != nil {
		return err
	}
	w.claimAll("replicas: with the first ten times slower, calls that are OK", errs, isOK)
	w.claimThat(shares(counts)[0] <= 100./3/5, "replicas: what the first gets, a fifth of its share at most", "at most 6.7 %", fmt.Sprintf("%.1f %%", shares(counts)[0]))

	end := load(ctx, searchers, func() error { return f.client.call(ctx, search) })
	defer end()
	if _, err := victim.await(ctx, patience, func(r report) bool { return r.Methods[search].inFlight() > 0 }); err != nil {
		return err
	}
	victim.kill()
	pause(ctx, spell/2)
	errs = end()
	w.claim("replicas: the first ends by", "signal: killed", victim.fate())
	w.claim("replicas: calls that are lost, before it and after", outOf(0, len(errs)), outOf(len(failures(errs)), len(errs)))
	f.remove(victim)
	return nil
}

// meet calls until each server has had a call: until the client is connected to all.
func (f *fleet) meet(ctx context.Context) error {
	end := load(ctx, searchers, func() error { return f.client.call(ctx, search) })
	defer end()
	for _, server := range f.servers {
		if _, err := server.await(ctx, patience, func(r report) bool { return r.Methods[search].Ended > 0 }); err != nil {
			return err
		}
	}
	return nil
}

// during has the searchers call for a while, and returns how many calls each server
// has seen and what they returned.
func (f *fleet) during(ctx context.Context, spell time.Duration) (counts []int, errs []error, err error) {
	before, err := f.searches(ctx)
	if err != nil {
		return nil, nil, err
	}
	end := load(ctx, searchers, func() error { return f.client.call(ctx, search) })
	pause(ctx, spell)
	errs = end()
	if counts, err = f.searches(ctx); err != nil {
		return nil, nil, err
	}
	for i := range counts {
		counts[i] -= before[i]
	}
	return counts, errs, nil
}

// searches is how many calls of Search each server has seen.
func (f *fleet) searches(ctx context.Context) (counts []int, err error) {
	for _, server := range f.servers {
		book, err := server.look(ctx)
		if err != nil {
			return nil, err
		}
		counts = append(counts, book.Methods[search].Started)
	}
	return counts, nil
}

// shares are counts in per cent of them all.
func shares(counts []int) (percent []float64) {
	all := 0
	for _, n := range counts {
		all += n
	}
	for _, n := range counts {
		percent = append(percent, 100*float64(n)/float64(max(all, 1)))
	}
	return percent
}
