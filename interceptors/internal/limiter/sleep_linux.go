package limiter

import (
	"errors"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

// napFiles are timerfds. A goroutine that reads from one is parked in the runtime's
// poller and holds neither a thread nor a P. They are never closed unless broken.
var napFiles struct {
	mu   sync.Mutex
	free []*os.File
	made int
}

// maxNapFiles bounds what naps cost a process with many paced methods. With that many
// waiting, timers beside them are seldom late.
const maxNapFiles = 4

// nap waits for d, more than 0, and reports whether it could. The file wakes a
// process that is idle; one that is busy looks at its timers, and so at the
// deadline, more often than at the poller.
func nap(d time.Duration) bool {
	f := napFile()
	if f == nil {
		return false
	}
	err := f.SetReadDeadline(time.Now().Add(d))
	if err == nil {
		err = setNapFile(f, d)
	}
	if err == nil {
		var expirations [8]byte
		_, err = f.Read(expirations[:])
	}
	ok := err == nil || errors.Is(err, os.ErrDeadlineExceeded)
	napFiles.mu.Lock()
	defer napFiles.mu.Unlock()
	if ok {
		napFiles.free = append(napFiles.free, f)
	} else {
		napFiles.made--
		_ = f.Close()
	}
	return ok
}

// napFile returns nil if there is none.
func napFile() *os.File {
	napFiles.mu.Lock()
	defer napFiles.mu.Unlock()
	if n := len(napFiles.free); n > 0 {
		f := napFiles.free[n-1]
		napFiles.free = napFiles.free[:n-1]
		return f
	}
	if napFiles.made == maxNapFiles {
		return nil
	}
	const monotonic = 1
	fd, _, errno := syscall.RawSyscall(syscall.SYS_TIMERFD_CREATE, monotonic, syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if errno != 0 {
		return nil
	}
	napFiles.made++
	return os.NewFile(fd, "timerfd") // which the poller takes, since it does not block
}

// setNapFile lets f be readable in d. What it was before is forgotten.
func setNapFile(f *os.File, d time.Duration) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	spec := struct{ interval, value syscall.Timespec }{value: syscall.NsecToTimespec(int64(d))}
	var errno syscall.Errno
	err = conn.Control(func(fd uintptr) {
		_, _, errno = syscall.RawSyscall6(syscall.SYS_TIMERFD_SETTIME, fd, 0, uintptr(unsafe.Pointer(&spec)), 0, 0, 0)
	})
	if err == nil && errno != 0 {
		err = errno
	}
	return err
}
