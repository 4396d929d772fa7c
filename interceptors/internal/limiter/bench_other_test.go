//go:build !unix

package limiter_test

func cpu() int64 { return 0 }
