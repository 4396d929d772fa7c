//go:build !unix

package breaker_test

func cpu() int64 { return 0 } // not measured
