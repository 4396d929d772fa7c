package limiter

import (
	"syscall"
	"time"
)

const canNap = true

// sleepThread may return early, when a signal comes.
func sleepThread(d time.Duration) {
	spec := syscall.NsecToTimespec(int64(d))
	_ = syscall.Nanosleep(&spec, nil)
}
