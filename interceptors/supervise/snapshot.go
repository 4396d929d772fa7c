package supervise

import "time"

// State is what a worker does.
type State uint8

// The states.
const (
	Running    State = iota // Run has been called and has not ended
	BackingOff              // it waits to be restarted
	Stopped                 // it has ended: as it should, or because of Stop
	Failed                  // it has ended: its last run was abnormal, or it was restarted too often
	Abandoned               // it runs on, and Stop waits for it no longer
	states
)

// String returns "running", "backing_off", "stopped", "failed" or "abandoned".
func (s State) String() string {
	if s >= states {
		return "unknown"
	}
	return [states]string{"running", "backing_off", "stopped", "failed", "abandoned"}[s]
}

// MarshalText returns what String does.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// WorkerSnapshot is the state of a worker at one time. It marshals to JSON.
type WorkerSnapshot struct {
	Name      string    `json:"name"`
	Kind      Kind      `json:"kind"`
	State     State     `json:"state"`
	Since     time.Time `json:"since"`                 // when it entered the state; if it did not come back from a backoff, when its last run ended
	Next      time.Time `json:"next_restart,omitzero"` // in state BackingOff
	Restarts  uint64    `json:"restarts"`              // of workers of this name
	Panics    uint64    `json:"panics"`                // of workers of this name, runtime.Goexit included
	LastError string    `json:"last_error,omitempty"`  // the last abnormal end, or that which was one too many; at most 256 bytes and "..."
}

// Snapshot returns the state of every worker in the order in which they were
// added. On a nil supervisor it is empty.
func (s *Supervisor) Snapshot() []WorkerSnapshot {
	all := []WorkerSnapshot{}
	if s == nil {
		return all
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.workers {
		all = append(all, w.snapshotLocked())
	}
	return all
}

func (w *worker) snapshotLocked() WorkerSnapshot {
	w.settleLocked()
	shown := WorkerSnapshot{Name: w.Name, Kind: w.Kind, State: w.state, Since: w.since, Panics: w.panics, LastError: w.lastErr}
	for _, n := range w.restarts {
		shown.Restarts += n
	}
	if w.state == BackingOff {
		shown.Next = w.next
	}
	return shown
}
