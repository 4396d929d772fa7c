package limiter

import (
	"sync"
	"testing"
	"time"
)

func TestNap(t *testing.T) {
	var naps sync.WaitGroup
	for range 10 * maxNapFiles {
		naps.Go(func() {
			for _, d := range []time.Duration{1, time.Millisecond} {
				began := time.Now()
				if nap(d) && time.Since(began) < d {
					t.Errorf("%v ended after %v", d, time.Since(began))
				}
			}
		})
	}
	naps.Wait()
	made := napFiles.made
	if made == 0 || made > maxNapFiles || len(napFiles.free) != made {
		t.Fatalf("%d files made, %d free", made, len(napFiles.free))
	}

	last := napFiles.free[made-1]
	if err := last.Close(); err != nil {
		t.Fatal(err)
	}
	if nap(time.Millisecond) || napFiles.made != made-1 || len(napFiles.free) != made-1 {
		t.Errorf("with a broken file: %d made, %d free, of %d", napFiles.made, len(napFiles.free), made)
	}
	if !nap(time.Millisecond) {
		t.Error("no nap after a broken file")
	}
}
