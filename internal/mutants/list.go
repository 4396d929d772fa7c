package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// mutant is one deliberate mistake and the tests that must notice it.
type mutant struct {
	line int // of the list, where the mutant begins
	name string
	file string
	find string
	nth  int // which of the lines that equal find; 0: there must be one only
	with string
	dir  string
	pkgs []string
	run  string // regexp of the tests; empty: all
}

// parse reads a list of mutants. Its error names every mistake.
func parse(list io.Reader) ([]mutant, error) {
	var (
		mutants []mutant
		errs    []error
		seen    map[string]bool // keys of the block that is being read
		names   = map[string]bool{}
		number  int
	)
	end := func() {
		if seen == nil {
			return
		}
		m := mutants[len(mutants)-1]
		for _, key := range []string{"name", "file", "find", "with", "test"} {
			if !seen[key] {
				errs = append(errs, fmt.Errorf("line %d: %q has no %s", m.line, m.name, key))
			}
		}
		if names[m.name] {
			errs = append(errs, fmt.Errorf("line %d: a second mutant named %q", m.line, m.name))
		}
		if m.find != "" && m.find == m.with {
			errs = append(errs, fmt.Errorf("line %d: %q changes nothing", m.line, m.name))
		}
		names[m.name] = true
		seen = nil
	}
	lines := bufio.NewScanner(list)
	for lines.Scan() {
		number++
		text := strings.TrimSpace(lines.Text())
		if text == "" {
			end()
			continue
		}
		if strings.HasPrefix(text, "#") {
			continue
		}
		if seen == nil {
			seen = map[string]bool{}
			mutants = append(mutants, mutant{line: number, dir: "."})
		}
		key, value, found := strings.Cut(text, ":")
		if !found {
			errs = append(errs, fmt.Errorf("line %d: %q is not \"key: value\"", number, text))
			continue
		}
		name, err := mutants[len(mutants)-1].set(key, strings.TrimSpace(value))
		if err == nil && seen[name] {
			err = fmt.Errorf("%s twice", name)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("line %d: %w", number, err))
		}
		seen[name] = true
	}
	end()
	return mutants, errors.Join(append(errs, lines.Err())...)
}

// set stores one value and returns the key's name, without an occurrence.
func (m *mutant) set(key, value string) (name string, err error) {
	name, nth, counted := strings.Cut(key, "#")
	if counted {
		m.nth, err = strconv.Atoi(nth)
		if name != "find" || err != nil || m.nth < 1 {
			return name, fmt.Errorf("unknown key %q", key)
		}
	}
	if value == "" && name != "with" {
		return name, fmt.Errorf("%s is empty", name)
	}
	switch name {
	case "name":
		m.name = value
	case "file":
		m.file = value
	case "find":
		m.find = value
	case "with":
		m.with = value
	case "dir":
		m.dir = value
	case "test":
		m.pkgs = strings.Fields(value)
		if i := slices.Index(m.pkgs, "-run"); i >= 0 {
			if i != len(m.pkgs)-2 {
				return name, errors.New("one word is expected after -run")
			}
			m.pkgs, m.run = m.pkgs[:i], m.pkgs[i+1]
		}
		if len(m.pkgs) == 0 {
			return name, errors.New("test names no package")
		}
	default:
		return name, fmt.Errorf("unknown key %q", key)
	}
	return name, nil
}

// apply returns the mutated text of the file.
func (m *mutant) apply(root string) ([]byte, error) {
	text, err := os.ReadFile(filepath.Join(root, m.file))
	if err != nil {
		return nil, fmt.Errorf("line %d: %s: %w", m.line, m.name, err)
	}
	lines := bytes.Split(text, []byte("\n"))
	var at []int
	for i, line := range lines {
		if string(bytes.TrimSpace(line)) == m.find {
			at = append(at, i)
		}
	}
	switch {
	case len(at) == 0:
		return nil, fmt.Errorf("line %d: %s: %s has no line %q", m.line, m.name, m.file, m.find)
	case m.nth == 0 && len(at) > 1:
		return nil, fmt.Errorf("line %d: %s: %s has %d lines %q, say which with find#1", m.line, m.name, m.file, len(at), m.find)
	case m.nth > len(at):
		return nil, fmt.Errorf("line %d: %s: %s has %d lines %q, not %d", m.line, m.name, m.file, len(at), m.find, m.nth)
	}
	i := at[max(m.nth, 1)-1]
	indent := lines[i][:len(lines[i])-len(bytes.TrimLeft(lines[i], "\t "))]
	lines[i] = slices.Concat(indent, []byte(m.with))
	return bytes.Join(lines, []byte("\n")), nil
}
