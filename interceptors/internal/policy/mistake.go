package policy

import (
	"math"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// mistake is one thing that is wrong with a policy.
type mistake struct {
	path      string // the field, "" for the policy itself
	text      string // what was found, what is allowed
	first     string // the field that the text ends with; Parse adds its position
	line, col int    // set by Parse
}

func (m mistake) String() string {
	if m.path == "" {
		return "policy: " + m.text
	}
	return m.path + ": " + m.text
}

// report collects mistakes on a walk through a policy.
type report struct {
	path     []byte // the field that the walk is at: client.rules[0].breaker
	mistakes []mistake
}

// in walks into a field of the current message.
func (r *report) in(field string, walk func()) {
	here := len(r.path)
	if here > 0 {
		r.path = append(r.path, '.')
	}
	r.path = append(r.path, field...)
	walk()
	r.path = r.path[:here]
}

// item walks into an item of the current list.
func (r *report) item(i int, walk func()) {
	here := len(r.path)
	r.path = append(strconv.AppendInt(append(r.path, '['), int64(i), 10), ']')
	walk()
	r.path = r.path[:here]
}

// parent cuts the last field or index off a path; the policy's own path is "".
func parent(path string) string {
	return path[:max(strings.LastIndexAny(path, ".["), 0)]
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

// nearest is the name at the smallest edit distance (Levenshtein) from s, where
// the letters that s leaves out at the end count little: "rate" means rate_limit.
// Case, dashes and underscores do not count.
func nearest(s string, names []string) string {
	const edit, left = 10, 1
	plain := strings.NewReplacer("_", "", "-", "")
	a := plain.Replace(strings.ToLower(s[:min(len(s), 64)]))
	best, least := "", math.MaxInt
	for _, name := range names {
		b := plain.Replace(strings.ToLower(name))
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
		for j, edits := range row {
			if distance := edits*edit + (len(b)-j)*left; distance < least {
				best, least = name, distance
			}
		}
	}
	return best
}
