package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// row is one claim and what was counted.
type row struct {
	Claim    string `json:"claim"`
	Expected string `json:"expected"`
	Counted  string `json:"counted"`
	OK       bool   `json:"ok"`
}

// failed is the number of claims that did not hold.
func failed(rows []row) int {
	n := 0
	for _, r := range rows {
		if !r.OK {
			n++
		}
	}
	return n
}

// writeJSON prints the rows as an array, one field a line.
func writeJSON(out io.Writer, rows []row) error {
	encoder := json.NewEncoder(out)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	return encoder.Encode(rows)
}

// writeTable prints the rows in columns.
func writeTable(out io.Writer, rows []row, coloured bool) error {
	head := row{Claim: "CLAIM", Expected: "EXPECTED", Counted: "COUNTED"}
	var claim, expected, counted int // widths
	for _, r := range append(rows, head) {
		claim, expected, counted = max(claim, len(r.Claim)), max(expected, len(r.Expected)), max(counted, len(r.Counted))
	}
	var b strings.Builder
	line := func(r row, verdict string) {
		fmt.Fprintf(&b, "%-*s  %-*s  %-*s  %s\n", claim, r.Claim, expected, r.Expected, counted, r.Counted, verdict)
	}
	b.WriteByte('\n')
	line(head, "OK")
	for _, r := range rows {
		verdict, colour := "yes", green
		if !r.OK {
			verdict, colour = "NO", red
		}
		if coloured {
			verdict = colour + verdict + plain
		}
		line(r, verdict)
	}
	_, err := io.WriteString(out, b.String())
	return err
}
