package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"github.com/grpc-resilience/grpc-resilience/interceptors"
)

const word = `[A-Za-z_]\w*`

var (
	// methodName is what a command's name must look like to be taken for a method.
	// Without a leading slash it needs a package: "users/list" is no method.
	methodName = regexp.MustCompile(`^(/(` + word + `\.)*|(` + word + `\.)+)` + word + `/` + word + `$`)
	// mapped is a method as a policy may name it.
	mapped = regexp.MustCompile(`^/[!-)+-.0-~]+/[!-)+-.0-~]+$`)
)

func (c *call) convert(args []string) int {
	flags := flag.NewFlagSet("convert", flag.ContinueOnError)
	side, methods := "client", map[string]string{}
	flags.Func("side", "", func(s string) error {
		if s != "client" && s != "server" {
			return errors.New("allowed client or server")
		}
		side = s
		return nil
	})
	flags.Func("map", "", func(s string) error { return addMapping(methods, s) })
	if status, ok := c.parse(flags, args); !ok {
		return status
	}
	if flags.NArg() != 1 {
		return c.wrong("convert: found %d files, allowed one, after the flags", flags.NArg())
	}

	name, text, err := c.read(flags.Arg(0))
	if err != nil {
		return c.fail(err)
	}
	commands, mistakes := readSettings(text)
	if len(commands) > 0 {
		mistakes = append(mistakes, assign(commands, methods)...)
	}
	if len(mistakes) > 0 {
		slices.SortStableFunc(mistakes, func(a, b mistake) int { return a.at.compare(b.at) })
		for _, m := range mistakes {
			fmt.Fprintf(c.stderr, "%s:%v\n", name, m)
		}
		return exitMistakes
	}
	policy, err := write(filepath.Base(name), side, commands)
	if err == nil {
		_, err = interceptors.Parse("policy", policy)
	}
	if err != nil { // too many rules, too large
		return c.fail(fmt.Errorf("%s: the policy made from it does not load:\n%w", name, err))
	}
	return c.print(string(policy))
}

// addMapping adds a value of -map, NAME=/pkg.Service/Method. A name may hold "=".
func addMapping(methods map[string]string, s string) error {
	i := strings.LastIndexByte(s, '=')
	if i < 0 {
		return errors.New("allowed NAME=/pkg.Service/Method")
	}
	name, method := s[:i], rooted(s[i+1:])
	if !mapped.MatchString(method) {
		return fmt.Errorf("found the method %s, allowed /pkg.Service/Method", quoted(s[i+1:]))
	}
	if methods[name] != "" {
		return fmt.Errorf("found %s twice, allowed one method for a command: several would not share its circuit", quoted(name))
	}
	methods[name] = method
	return nil
}

func rooted(method string) string {
	return "/" + strings.TrimPrefix(method, "/")
}

// assign gives each command its method.
func assign(commands []*command, methods map[string]string) (mistakes []mistake) {
	names := make([]string, len(commands))
	of := map[string]*command{} // by method
	unused := map[string]bool{}
	for name := range methods {
		unused[name] = true
	}
	for i, cmd := range commands {
		names[i] = cmd.name
		delete(unused, cmd.name)
		switch method := methods[cmd.name]; {
		case method != "":
			cmd.method = method
		case methodName.MatchString(cmd.name):
			cmd.method = rooted(cmd.name)
		default:
			mistakes = append(mistakes, mistake{cmd.at, step(cmd.name), fmt.Sprintf(
				"found a name that is not a method, allowed /pkg.Service/Method, or any name with a -map: add %s", suggestion(cmd.name))})
			continue
		}
		if first := of[cmd.method]; first != nil {
			mistakes = append(mistakes, mistake{cmd.at, step(cmd.name), fmt.Sprintf(
				"found the method %s a second time, allowed for one command, first for %s at %v", quoted(cmd.method), step(first.name), first.at)})
		} else {
			of[cmd.method] = cmd
		}
	}
	for _, name := range slices.Sorted(maps.Keys(unused)) {
		mistakes = append(mistakes, mistake{beginning, step(name), fmt.Sprintf(
			"found a -map for a command that is not in the file, nearest is %s, allowed only for one that is", step(nearest(name, names)))})
	}
	return mistakes
}

// suggestion is the flag that a command lacks, for a shell.
func suggestion(name string) string {
	const method = "/pkg.Service/Method"
	switch {
	case plain.MatchString(name):
		return "-map " + name + "=" + method
	case nameable(name):
		return "-map '" + strings.ReplaceAll(name, "'", `'\''`) + "=" + method + "'"
	}
	return "-map NAME=" + method
}

// nameable reports whether a policy's rule may have the name.
func nameable(name string) bool {
	return name != "" && utf8.RuneCountInString(name) <= 100 && printable(name)
}

// What a rule holds, as it is written.
type (
	rule struct {
		Name        string      `yaml:"name,omitempty"`
		Methods     []string    `yaml:"methods,flow"`
		Timeout     string      `yaml:"timeout"`
		Breaker     breaker     `yaml:"breaker,flow"`
		Concurrency concurrency `yaml:"concurrency_limit,flow"`
	}
	breaker struct {
		Engine        string `yaml:"engine"`
		ErrorPercent  int    `yaml:"error_percent_threshold"`
		RequestVolume int    `yaml:"request_volume_threshold"`
		SleepWindow   string `yaml:"sleep_window"`
	}
	concurrency struct {
		MaxInFlight int `yaml:"max_in_flight"`
	}
)

// write makes the policy's text, one rule for each command, sorted by name.
func write(file, side string, commands []*command) ([]byte, error) {
	slices.SortFunc(commands, func(a, b *command) int { return strings.Compare(a.name, b.name) })
	rules := make([]*yaml.Node, len(commands))
	for i, cmd := range commands {
		v := cmd.values
		r := rule{
			Methods:     []string{cmd.method},
			Timeout:     milliseconds(v[timeout]),
			Breaker:     breaker{"hystrix", v[errorPercent], v[requestVolume], milliseconds(v[sleepWindow])},
			Concurrency: concurrency{v[maxConcurrent]},
		}
		comment := ""
		if nameable(cmd.name) {
			r.Name = cmd.name
		} else {
			comment = "name left out (allowed are 1 to 100 printable characters): " + quoted(cmd.name)
		}
		rules[i] = &yaml.Node{}
		if err := rules[i].Encode(r); err != nil {
			return nil, err
		}
		rules[i].HeadComment = comment
	}
	if !printable(file) {
		file = quoted(file)
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, header[side], file)
	enc := yaml.NewEncoder(&b)
	enc.SetIndent(2)
	err := enc.Encode(map[string]any{side: map[string]any{"rules": rules}})
	if err == nil {
		err = enc.Close()
	}
	return b.Bytes(), err
}

// header says what a rule does not do as hystrix-go did.
var header = map[string]string{
	"client": `# Made from hystrix-go's settings in %s. To look at:
# - timeout is for unary calls. A stream has none, unless stream_timeout is set.
# - max_in_flight is for unary calls. Streams are unlimited, unless max_streams is set.
# - A command had one circuit and one limit. A rule has one for each target that the
#   method is called on; a process has at most 256 circuits of engine hystrix.
# - hystrix-go counted every error of a command. A breaker counts the status codes of
#   failure_codes.
`,
	"server": `# Made from hystrix-go's settings in %s. To look at:
# - timeout caps the deadline that the handler of a unary call sees. A stream has none,
#   unless stream_timeout is set.
# - max_in_flight is for unary calls. Streams are unlimited, unless max_streams is set.
# - A process has at most 256 circuits of engine hystrix.
# - hystrix-go counted every error of a command. A breaker counts the status codes of
#   failure_codes.
`,
}

// milliseconds writes n of them as a duration, without the zeros of
// time.Duration's own notation (1h0m0s).
func milliseconds(n int) string {
	s := (time.Duration(n) * time.Millisecond).String()
	if strings.HasSuffix(s, "m0s") {
		s = s[:len(s)-2]
	}
	if strings.HasSuffix(s, "h0m") {
		s = s[:len(s)-2]
	}
	return s
}
