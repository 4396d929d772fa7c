// Package page is what the reports of the benchmarks have in common.
package page

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"unicode/utf8"
)

// Table writes a table that can be read as it stands, too.
func Table(head []string, rows [][]string) string {
	width := make([]int, len(head))
	for _, row := range append([][]string{head}, rows...) {
		for i, cell := range row {
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	rule := make([]string, len(head))
	for i := range rule {
		rule[i] = strings.Repeat("-", max(3, width[i]))
	}
	var out strings.Builder
	out.WriteByte('\n')
	for _, row := range append([][]string{head, rule}, rows...) {
		for i, cell := range row {
			fmt.Fprintf(&out, "| %s%s ", cell, strings.Repeat(" ", max(0, width[i]-utf8.RuneCountInString(cell))))
		}
		out.WriteString("|\n")
	}
	return out.String()
}

// Machine says on what a run was made, and with which versions of the modules, whose
// paths are divided by white space.
func Machine(modules string) []string {
	info, _ := debug.ReadBuildInfo()
	commit, err := exec.Command("git", "describe", "--always", "--dirty").Output()
	if err != nil {
		commit = []byte("unknown")
	}
	var versions []string
	for _, m := range info.Deps {
		if slices.Contains(strings.Fields(modules), m.Path) {
			versions = append(versions, m.Path+" "+m.Version)
		}
	}
	load, _ := os.ReadFile("/proc/loadavg")
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return []string{
		fmt.Sprintf("machine: %s, %d cores, %s/%s, kernel %s", cpuModel(), runtime.NumCPU(), runtime.GOOS, runtime.GOARCH, strings.TrimSpace(string(kernel))),
		fmt.Sprintf("load average at the end of the run, its own part included: %s", strings.Join(strings.Fields(string(load) + " ? ? ?")[:3], " ")),
		fmt.Sprintf("commit %s, %s, GOMAXPROCS %d", strings.TrimSpace(string(commit)), runtime.Version(), runtime.GOMAXPROCS(0)),
		"modules: " + strings.Join(versions, ", "),
	}
}

func cpuModel() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "unknown CPU"
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if name, model, ok := strings.Cut(lines.Text(), ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(model)
		}
	}
	return "unknown CPU"
}
