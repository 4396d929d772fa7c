package main

import (
	"cmp"
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// place is a place in a file; lines and columns count from 1, columns in
// characters.
type place struct{ line, col int }

var beginning = place{1, 1}

func (p place) String() string { return fmt.Sprintf("%d:%d", p.line, p.col) }

func (p place) compare(q place) int {
	return cmp.Or(cmp.Compare(p.line, q.line), cmp.Compare(p.col, q.col))
}

// mistake is one thing that is wrong with a file. It reads like those of
// policies: "line:col: path: what was found, what is allowed".
type mistake struct {
	at   place
	path string // the command or setting, "" for the settings as a whole
	text string // what was found, what is allowed
}

func (m mistake) String() string {
	return fmt.Sprintf("%v: %s: %s", m.at, cmp.Or(m.path, "settings"), m.text)
}

var plain = regexp.MustCompile(`^[\w./-]{1,100}$`)

// step is a name as paths show it: as it is if nothing in it can mislead.
func step(name string) string {
	if plain.MatchString(name) {
		return name
	}
	return quoted(name)
}

// quoted is a text as messages show it: in quotes, on one line, and short.
func quoted(s string) string {
	return strconv.Quote(short(s))
}

func short(s string) string {
	const most = 60
	if utf8.RuneCountInString(s) > most {
		return string([]rune(s)[:most]) + "…"
	}
	return s
}

func printable(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

// nearest is the name at the smallest edit distance (Levenshtein) from s. Case
// does not count, nor what goes beyond 64 bytes.
func nearest(s string, names []string) string {
	a := strings.ToLower(s[:min(len(s), 64)])
	best, least := "", math.MaxInt
	for _, name := range names {
		b := strings.ToLower(name[:min(len(name), 64)])
		row := make([]int, len(b)+1) // edits from a's beginning to each beginning of b
		for j := range row {
			row[j] = j
		}
		for i := range len(a) {
			diagonal := row[0]
			row[0] = i + 1
			for j := range len(b) {
				substitute := diagonal
				if a[i] != b[j] {
					substitute++
				}
				diagonal = row[j+1]
				row[j+1] = min(substitute, row[j]+1, row[j+1]+1)
			}
		}
		if row[len(b)] < least {
			best, least = name, row[len(b)]
		}
	}
	return best
}
