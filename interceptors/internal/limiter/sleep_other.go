//go:build !linux

package limiter

import "time"

const canNap = false

func sleepThread(time.Duration) {}
