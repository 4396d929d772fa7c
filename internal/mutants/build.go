package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"go/version"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// noInlining, for the packages of the module: what a package exports is then the same
// whatever its functions do, and they compile 40 % faster.
const noInlining = "-gcflags=./...=-l"

// goPackage is what `go list` says of a package; see `go help list`.
type goPackage struct {
	Dir, ImportPath, ForTest, Export    string
	GoFiles, EmbedFiles, Imports, Deps  []string
	CgoFiles, SFiles, HFiles, SysoFiles []string
	DefaultGODEBUG                      string
	ImportMap                           map[string]string
	Module                              *struct {
		Main      bool
		GoVersion string
	}
}

// path is the import path without the test that the package is compiled for.
func (p *goPackage) path() string {
	path, _, _ := strings.Cut(p.ImportPath, " ")
	return path
}

// builder makes the tests of one package, with a file changed.
type builder struct {
	all  map[string]*goPackage // by ImportPath
	main *goPackage            // the tests' program
}

// newBuilders returns those of the mutants' tests that are of one package.
func newBuilders(ctx context.Context, root string, mutants []mutant) (map[group]*builder, error) {
	builders := map[group]*builder{}
	for _, m := range mutants {
		g := m.tests()
		if builders[g] != nil || len(m.pkgs) > 1 || strings.Contains(g.pkgs, "...") {
			continue
		}
		b, err := newBuilder(ctx, filepath.Join(root, g.dir), g.pkgs)
		if err != nil {
			return nil, fmt.Errorf("%s %s: does not build: %w", g.dir, g.pkgs, err)
		}
		builders[g] = b
	}
	return builders, nil
}

// newBuilder compiles the tests of a package and all that they need.
func newBuilder(ctx context.Context, dir, pkg string) (*builder, error) {
	cmd := exec.CommandContext(ctx, "go", "list", "-test", "-deps", "-export", "-json", noInlining, pkg)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list %s: %w\n%s", pkg, err, stderr.Bytes())
	}
	b := &builder{all: map[string]*goPackage{}}
	for decoder := json.NewDecoder(bytes.NewReader(stdout)); ; {
		p := &goPackage{}
		if err := decoder.Decode(p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		b.all[p.ImportPath] = p
		if strings.HasSuffix(p.ImportPath, ".test") {
			b.main = p
		}
	}
	if b.main == nil {
		return nil, fmt.Errorf("%s has no tests", pkg)
	}
	return b, nil
}

// build makes the tests' program, in folder, with text in place of file. It compiles
// the file's package, and none of those that import it: these are the larger part, and not
// affected while what the package exports stays as it is. The linker refuses if it did not.
func (b *builder) build(ctx context.Context, folder, file string, text []byte) (program string, err error) {
	p := b.owner(file)
	if p == nil {
		return "", errors.New("not one of the packages' plain Go files")
	}
	mutant, object, program := filepath.Join(folder, "mutant.go"), filepath.Join(folder, "mutant.a"), filepath.Join(folder, "mutant.test")
	if err := os.WriteFile(mutant, text, 0o600); err != nil {
		return "", err
	}
	var files []string // in the order in which the go command gives them: it matters
	for _, name := range p.GoFiles {
		if name = filepath.Join(p.Dir, name); name == file {
			name = mutant
		}
		files = append(files, name)
	}
	imports, err := b.importConfig(folder, "imports", p.Imports, p.ImportMap, nil)
	if err != nil {
		return "", err
	}
	compile := []string{"tool", "compile", "-l", "-pack", "-p", p.path(), "-lang=" + version.Lang("go"+p.Module.GoVersion),
		"-trimpath", mutant + "=>" + file, "-importcfg", imports, "-o", object}
	if err := runGo(ctx, append(compile, files...)...); err != nil {
		return "", err
	}
	packages, err := b.importConfig(folder, "packages", b.main.Deps, nil, map[*goPackage]string{p: object})
	if err != nil {
		return "", err
	}
	return program, b.link(ctx, packages, program)
}

// link does what `go test` does, but for what debuggers and debug.ReadBuildInfo want.
func (b *builder) link(ctx context.Context, packages, program string) error {
	err := runGo(ctx, "tool", "link", "-s", "-w", "-X=testing.testBinary=1", "-X=runtime.godebugDefault="+b.main.DefaultGODEBUG,
		"-importcfg", packages, "-o", program, b.main.Export)
	if err != nil && strings.Contains(err.Error(), "fingerprint mismatch") {
		return errors.New("what the package exports has changed")
	}
	return err
}

// unchanged makes the tests' program of the code as it is.
func (b *builder) unchanged(ctx context.Context, folder string) (program string, err error) {
	packages, err := b.importConfig(folder, "packages", b.main.Deps, nil, nil)
	if err != nil {
		return "", err
	}
	program = filepath.Join(folder, "unchanged.test")
	return program, b.link(ctx, packages, program)
}

// owner is the package with a file, as the tests import it.
func (b *builder) owner(file string) *goPackage {
	for _, path := range b.main.Deps {
		p := b.all[path]
		if p.Dir != filepath.Dir(file) || !slices.Contains(p.GoFiles, filepath.Base(file)) {
			continue
		}
		if p.Module == nil || !p.Module.Main || len(p.EmbedFiles)+len(p.CgoFiles)+len(p.SFiles)+len(p.HFiles)+len(p.SysoFiles) > 0 {
			return nil
		}
		return p
	}
	return nil
}

// importConfig writes where the compiler or the linker finds packages; renamed is what
// import paths mean, instead has other files.
func (b *builder) importConfig(folder, name string, imports []string, renamed map[string]string, instead map[*goPackage]string) (string, error) {
	var config bytes.Buffer
	for _, path := range imports {
		if other, ok := renamed[path]; ok {
			path = other
		}
		p := b.all[path]
		switch {
		case path == "unsafe" || path == "C":
		case p == nil || p.Export == "":
			return "", fmt.Errorf("%s is not compiled", path)
		case instead[p] != "":
			fmt.Fprintf(&config, "packagefile %s=%s\n", p.path(), instead[p])
		default:
			fmt.Fprintf(&config, "packagefile %s=%s\n", p.path(), p.Export)
		}
	}
	name = filepath.Join(folder, name)
	return name, os.WriteFile(name, config.Bytes(), 0o600)
}

func runGo(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, "go", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args[:2], " "), err, out)
	}
	return nil
}
