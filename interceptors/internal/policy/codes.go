package policy

import (
	"slices"
	"strings"
)

// codes are gRPC's names of the status codes; the index is the number.
var codes = []string{
	"OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
	"ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED",
	"OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
}

const codeUnknown = 2

// failureCodes can be failures: neither a success nor the caller's own cancel is one.
var failureCodes = codes[codeUnknown:]

// DefaultFailureCodes say that the service is unwell: UNKNOWN, DEADLINE_EXCEEDED,
// INTERNAL, UNAVAILABLE, DATA_LOSS. Bit n stands for gRPC's code n.
const DefaultFailureCodes = 1<<codeUnknown | 1<<4 | 1<<13 | 1<<14 | 1<<15

// codeNumber returns the number of a code by its name in any case; -1: there
// is none. CANCELED is Go's spelling.
func codeNumber(name string) int {
	if strings.EqualFold(name, "CANCELED") {
		name = "CANCELLED"
	}
	return slices.IndexFunc(codes, func(code string) bool { return strings.EqualFold(code, name) })
}
