package breaker

// Applied reports whether hystrix-go has applied all that it was told.
func (h *Hystrix) Applied() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return !h.queuedLocked()
}
