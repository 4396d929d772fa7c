//go:build !linux

package limiter

import "time"

func nap(time.Duration) bool { return false }
