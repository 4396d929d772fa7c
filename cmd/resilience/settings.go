package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// command is one command of hystrix-go's settings.
type command struct {
	name   string
	at     place
	values [len(settings)]int // never 0
	method string             // set by assign
}

// Indices of settings.
const (
	timeout = iota
	maxConcurrent
	requestVolume
	sleepWindow
	errorPercent
)

// settings are those of hystrix.CommandConfig. 0 and nothing mean hystrix-go's
// default; a policy allows 1 to most.
var settings = [...]struct {
	name         string
	number       string
	preset, most int
}{
	timeout:       {"timeout", "a whole number of milliseconds", 1000, 24 * 60 * 60 * 1000},
	maxConcurrent: {"max_concurrent_requests", "a whole number", 10, 1_000_000},
	requestVolume: {"request_volume_threshold", "a whole number", 20, 1_000_000},
	sleepWindow:   {"sleep_window", "a whole number of milliseconds", 5000, 60 * 60 * 1000},
	errorPercent:  {"error_percent_threshold", "a whole number", 50, 100},
}

func settingNames() []string {
	names := make([]string, len(settings))
	for i, s := range settings {
		names[i] = s.name
	}
	return names
}

// readSettings returns the commands of a JSON object of command names, and
// every mistake in it. It refuses what encoding/json silently drops: unknown
// fields, null, and all but the last of equal keys.
func readSettings(text []byte) ([]*command, []mistake) {
	r := reader{text: bytes.TrimPrefix(text, []byte("\ufeff")), here: beginning}
	value, end, ok := r.first()
	if !ok {
		return nil, r.mistakes
	}
	var commands []*command
	at := r.place(end - len(value))
	if value[0] != '{' {
		r.fail(at, "", "found %s, allowed an object of command names", found(value))
	} else {
		commands = r.commands(value, end-len(value))
		if len(commands) == 0 {
			r.fail(at, "", "found no command, allowed one or more")
		}
	}
	if rest := bytes.TrimLeft(r.text[end:], space); len(rest) > 0 {
		r.fail(r.place(len(r.text)-len(rest)), "", "found more after the end, allowed one JSON object")
	}
	return commands, r.mistakes
}

// reader walks through a JSON text, forwards only.
type reader struct {
	text     []byte
	offset   int   // in bytes
	here     place // of offset
	mistakes []mistake
}

// space is what JSON takes for it.
const space = " \t\r\n"

// place goes on to an offset.
func (r *reader) place(offset int) place {
	for _, c := range string(r.text[r.offset:offset]) {
		r.here.col++
		if c == '\n' {
			r.here = place{r.here.line + 1, 1}
		}
	}
	r.offset = offset
	return r.here
}

func (r *reader) fail(at place, path, format string, args ...any) {
	r.mistakes = append(r.mistakes, mistake{at, path, fmt.Sprintf(format, args...)})
}

// first returns the first value of the text, and where it ends.
func (r *reader) first() (value json.RawMessage, end int, ok bool) {
	for i := 0; i < len(r.text); {
		c, n := utf8.DecodeRune(r.text[i:])
		if c == utf8.RuneError && n == 1 {
			r.fail(r.place(i), "", "found a byte that is not UTF-8 (0x%02x), allowed UTF-8 text", r.text[i])
			return nil, 0, false
		}
		i += n
	}
	dec := json.NewDecoder(bytes.NewReader(r.text))
	err := dec.Decode(&value)
	var syntax *json.SyntaxError
	switch {
	case errors.As(err, &syntax):
		r.fail(r.place(int(syntax.Offset)-1), "", "found a syntax error (%v), allowed JSON", err)
	case err != nil:
		r.fail(r.place(len(r.text)), "", "found the end of the text, allowed a JSON object of command names")
	}
	return value, int(dec.InputOffset()), err == nil
}

// members calls each with the members of an object that begins at an offset.
func (r *reader) members(object []byte, offset int, each func(key string, at place, value []byte, offset int)) {
	dec := json.NewDecoder(bytes.NewReader(object))
	_, err := dec.Token()
	for err == nil && dec.More() {
		gap := object[dec.InputOffset():]
		at := r.place(offset + len(object) - len(bytes.TrimLeft(gap, space+",")))
		var key json.Token
		if key, err = dec.Token(); err != nil {
			break
		}
		var value json.RawMessage
		if err = dec.Decode(&value); err == nil {
			each(key.(string), at, value, offset+int(dec.InputOffset())-len(value))
		}
	}
	if err != nil { // the object is JSON
		r.fail(r.here, "", "found an error (%v), allowed JSON", err)
	}
}

func (r *reader) commands(object []byte, offset int) (commands []*command) {
	first := make(map[string]place)
	r.members(object, offset, func(name string, at place, value []byte, offset int) {
		cmd := &command{name: name, at: at}
		if once, twice := first[name]; twice {
			r.fail(at, step(name), "found %s twice, first at %v, allowed once", step(name), once)
		} else {
			first[name] = at
			commands = append(commands, cmd)
		}
		r.command(cmd, value, offset)
	})
	return commands
}

func (r *reader) command(cmd *command, value []byte, offset int) {
	path := step(cmd.name)
	if value[0] != '{' {
		r.fail(r.place(offset), path, "found %s, allowed an object with %s", found(value), strings.Join(settingNames(), ", "))
		return
	}
	for i, s := range settings {
		cmd.values[i] = s.preset
	}
	var first [len(settings)]place
	r.members(value, offset, func(key string, at place, value []byte, offset int) {
		i := 0 // encoding/json ignores case
		for i < len(settings) && !strings.EqualFold(key, settings[i].name) {
			i++
		}
		if i == len(settings) {
			r.fail(at, path, "found unknown field %s, nearest is %s, allowed %s",
				quoted(key), nearest(key, settingNames()), strings.Join(settingNames(), ", "))
			return
		}
		s := settings[i]
		if first[i] != (place{}) {
			r.fail(at, path, "found %s twice, first at %v, allowed once", s.name, first[i])
		} else {
			first[i] = at
		}
		switch n, err := strconv.Atoi(string(value)); {
		case err != nil || n < 0 || n > s.most:
			r.fail(r.place(offset), path+"."+s.name, "found %s, allowed %s from 1 to %d, or 0 for hystrix-go's default %d",
				found(value), s.number, s.most, s.preset)
		case n > 0:
			cmd.values[i] = n
		}
	})
}

// found says what a JSON value is.
func found(value []byte) string {
	switch value[0] {
	case '{':
		return "an object"
	case '[':
		return "a list"
	case '"':
		var s string
		if json.Unmarshal(value, &s) == nil {
			return quoted(s)
		}
	}
	return short(string(value))
}
