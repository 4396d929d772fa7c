// Package policy reads policies: from YAML to messages, with every mistake
// found and its position, and from messages to what applies to one method.
package policy

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	resiliencev1 "github.com/grpc-resilience/grpc-resilience/proto/resilience/v1"
	"go.yaml.in/yaml/v3"
)

// maxSize is several times what 10,000 rules need.
const maxSize = 4 << 20

// Parse reads a policy written in YAML (or JSON); name is the file's name in
// messages. The error joins every mistake, in the order of the file, each as
// "file:line:col: path: what was found, what is allowed"; lines and columns
// count from 1, columns in characters. A text that is not YAML is one mistake,
// with the column of the line's first character.
//
// Every version of YAML must read a policy alike: numbers and booleans are
// JSON's, null, tags, anchors, aliases and merge keys are refused.
func Parse(name string, text []byte) (*resiliencev1.Policy, error) {
	text = bytes.TrimPrefix(text, []byte("\ufeff"))
	root, m := document(text)
	if root == nil {
		return nil, inFile(name, m)
	}
	p := &resiliencev1.Policy{}
	d := decoder{unread: make(map[string]bool)}
	d.message(root, p.ProtoReflect())
	v := validator{unread: d.unread}
	v.policy(p)
	for i := range v.mistakes {
		m := &v.mistakes[i]
		m.line, m.col = position(root, m.path)
		if m.first != "" {
			line, col := position(root, m.first)
			m.text += fmt.Sprintf(" (%d:%d)", line, col)
		}
	}
	if mistakes := slices.Concat(d.mistakes, v.mistakes); len(mistakes) > 0 {
		slices.SortStableFunc(mistakes, func(a, b mistake) int {
			return cmp.Or(cmp.Compare(a.line, b.line), cmp.Compare(a.col, b.col))
		})
		return nil, inFile(name, mistakes...)
	}
	return p, nil
}

func inFile(name string, mistakes ...mistake) error {
	errs := make([]error, len(mistakes))
	for i, m := range mistakes {
		errs[i] = fmt.Errorf("%s:%d:%d: %v", name, m.line, m.col, m)
	}
	return errors.Join(errs...)
}

// document returns the root of the only document in the text; nil: there is
// none, because of the mistake.
func document(text []byte) (*yaml.Node, mistake) {
	if len(text) > maxSize {
		return nil, mistake{line: 1, col: 1, text: fmt.Sprintf("found %d bytes, allowed %d", len(text), maxSize)}
	}
	for i := 0; i < len(text); {
		r, n := utf8.DecodeRune(text[i:])
		next := text[i+n:]
		switch {
		case r == utf8.RuneError && n == 1:
			return nil, mistakeAt(text[:i], "found a byte that is not UTF-8 (0x%02x), allowed UTF-8 text", text[i])
		case r == '\t' || r == '\n' || r == '\r' && bytes.HasPrefix(next, []byte("\n")):
		case unicode.IsControl(r) || r == '\u2028' || r == '\u2029' || r == '\ufffe' || r == '\uffff':
			// YAML takes some of these for line ends, editors do not.
			return nil, mistakeAt(text[:i], "found the control character %U, allowed tab, LF and CRLF only", r)
		}
		i += n
	}
	docs, err := documents(bytes.NewReader(text))
	switch {
	case err != nil:
		return nil, syntaxMistake(text, err)
	case len(docs) > 1:
		return nil, mistake{line: docs[1].Line, col: docs[1].Column, text: "found a second YAML document, allowed one"}
	case len(docs) == 0 || len(docs[0].Content) == 0 || isNull(docs[0].Content[0]):
		return nil, mistake{line: 1, col: 1, text: "found nothing, the policy is empty, allowed a mapping with client, server or both"}
	}
	return docs[0].Content[0], mistake{}
}

func documents(r io.Reader) (docs []*yaml.Node, err error) {
	for dec := yaml.NewDecoder(r); ; {
		doc := new(yaml.Node)
		if err := dec.Decode(doc); errors.Is(err, io.EOF) {
			return docs, nil
		} else if err != nil {
			return nil, err
		}
		docs = append(docs, doc)
	}
}

// mistakeAt is a mistake of the whole policy, at the end of the text before.
func mistakeAt(before []byte, format string, args ...any) mistake {
	return mistake{
		line: bytes.Count(before, []byte("\n")) + 1,
		col:  utf8.RuneCount(before[bytes.LastIndexByte(before, '\n')+1:]) + 1,
		text: fmt.Sprintf(format, args...),
	}
}

// syntaxMistake finds the place of a syntax error. The parser's own errors
// name the line of the enclosing block, if any. The line wanted is the first
// after the longest beginning of the text that is YAML. It is searched
// backwards from where the parser gives up when it is fed byte by byte.
func syntaxMistake(text []byte, err error) mistake {
	read := &byteReader{text: text}
	_, _ = documents(read)
	lines := bytes.SplitAfter(text[:read.n], []byte("\n"))
	isYAML := func(n int) bool {
		_, err := documents(bytes.NewReader(bytes.Join(lines[:n], nil)))
		return err == nil
	}
	good, bad := len(lines), len(lines)
	for step := 1; good > 0 && (good == bad || !isYAML(good)); step *= 2 {
		bad, good = good, max(good-step, 0)
	}
	for good+1 < bad {
		if middle := (good + bad) / 2; isYAML(middle) {
			good = middle
		} else {
			bad = middle
		}
	}
	before := bytes.Join(lines[:good], nil)
	line, _, _ := bytes.Cut(text[len(before):], []byte("\n"))
	indent := line[:len(line)-len(bytes.TrimLeft(line, " "))]
	reason := strings.TrimPrefix(err.Error(), "yaml: ")
	if number, rest, ok := strings.Cut(reason, ": "); ok && strings.HasPrefix(number, "line ") {
		reason = rest
	}
	allowed := "well-formed YAML"
	if bytes.HasPrefix(line[len(indent):], []byte("\t")) {
		allowed += ": spaces indent, tabs do not"
	} else if bareStar.Match(line) {
		allowed += `: "*" needs quotes`
	}
	return mistakeAt(text[:len(before)+len(indent)], "found a syntax error (%s), allowed %s", reason, allowed)
}

// bareStar is how an alias begins, and a pattern without its quotes.
var bareStar = regexp.MustCompile(`[\[ ,]\*`)

// byteReader reads text one byte at a time; n have been read.
type byteReader struct {
	text []byte
	n    int
}

func (r *byteReader) Read(p []byte) (int, error) {
	if r.n == len(r.text) {
		return 0, io.EOF
	}
	n := copy(p[:1], r.text[r.n:])
	r.n += n
	return n, nil
}
