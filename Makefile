SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# Every module with Go packages. Those under tools/ only pin versions.
MODULES := $(sort $(patsubst %/go.mod,%,$(shell find . -name go.mod -not -path './tools/*' -not -path '*/testdata/*')))

BUF  := go tool -modfile=$(CURDIR)/tools/buf/go.mod buf
LINT := go tool -modfile=$(CURDIR)/tools/lint/go.mod golangci-lint

# How long each fuzz target runs.
FUZZTIME ?= 10m

# How many server processes `make soak` ends.
SOAK ?= 10000

.PHONY: help
help: ## Show the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: test
test: ## Test every module with the race detector.
	@failed=; for m in $(MODULES); do \
		echo "== $$m: go test -race ./..."; \
		(cd $$m && go test -race ./...) || failed+=" $$m"; \
	done; \
	if [[ $$failed ]]; then echo "make test: failed in:$$failed" >&2; exit 1; fi

.PHONY: lint
lint: ## Lint every module: requirements, code, formatting, import rules.
	@failed=; for m in $(MODULES); do \
		echo "== $$m: go mod tidy -diff, golangci-lint run"; \
		(cd $$m; rc=0; go mod tidy -diff || rc=1; $(LINT) run || rc=1; exit $$rc) || failed+=" $$m"; \
	done; \
	if [[ $$failed ]]; then echo "make lint: failed in:$$failed" >&2; exit 1; fi

.PHONY: generate
generate: ## Generate the Go code of every .proto file.
	@$(BUF) generate

.PHONY: check-generated
check-generated: ## Check .proto files and that the generated code is up to date.
	@$(BUF) lint
	@$(BUF) format --diff --exit-code
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; mkdir "$$tmp/tree" "$$tmp/generated"; \
	find . -name '*.pb.go' -print0 | tar -cf - --null -T - | tar -xf - -C "$$tmp/tree"; \
	$(BUF) generate -o "$$tmp/generated"; \
	if ! (cd "$$tmp" && diff -ruN tree generated); then \
		echo "make check-generated: the generated code is stale, run make generate (and delete what no .proto file makes)" >&2; exit 1; \
	fi

.PHONY: mutants
mutants: ## Break the code on purpose, line by line: a test must fail each time.
	@go run ./internal/mutants

.PHONY: bench
bench: ## Measure this project and others in one run, some 10 minutes: docs/performance.md.
	@cd benchmarks && go run . -o $(CURDIR)/docs/performance.md

.PHONY: bench-balancing
bench-balancing: ## Compare load balancing with that of grpc-go, some 5 minutes: docs/balancing.md.
	@cd benchmarks && go run ./balancing -o $(CURDIR)/docs/balancing.md

.PHONY: soak
soak: ## End SOAK server processes (default 10000) that have answers on their way: none may be lost.
	@GRPC_RESILIENCE_SOAK_ROUNDS=$(SOAK) go test -race -count=1 -timeout 12h -v -run '^TestCase35' ./interceptors

.PHONY: fuzz
fuzz: ## Fuzz each target for FUZZTIME (default 10m).
	@grep -rHoE --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*' . | sort | while IFS=: read -r file func; do \
		echo "== $${file%/*}: $${func#func }"; \
		(cd "$${file%/*}" && go test -run '^$$' -fuzz "^$${func#func }$$" -fuzztime $(FUZZTIME) .); \
	done
