package interceptors

import (
	"testing"
	"unsafe"
)

// What the calls of two cores write is not to lie beside the pointers that they read.
func TestCountsBeginACacheLine(t *testing.T) {
	if unsafe.Sizeof(uintptr(0)) != 8 {
		t.Skip("the padding is for 64 bits")
	}
	for range 100 {
		m := new(state)
		if at := uintptr(unsafe.Pointer(&m.counts)) % 64; at != 0 {
			t.Errorf("the counts of %p lie %d bytes into a cache line", m, at) // m is on the heap for this
		}
	}
}
