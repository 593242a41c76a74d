# The one entry point of people and of CI. Needs Python 3.11 to 3.13 and make, nothing else: every
# target first makes .venv as it needs it. Variables: see `make help`.

PYTHON ?= python3
PY := .venv/bin/python
# The environment's own Python starts at once, where a version manager's shim takes its time.
SETUP := if [ -x $(PY) ]; then $(PY) -I -S tools/setup.py; else $(PYTHON) tools/setup.py; fi
SETUP_DEV := if [ -x $(PY) ]; then $(PY) -I -S tools/setup.py --dev; else $(PYTHON) tools/setup.py --dev; fi
SETUP_BENCH := if [ -x $(PY) ]; then $(PY) -I -S tools/setup.py --bench; else $(PYTHON) tools/setup.py --bench; fi

SETUP_DEPLOY := if [ -x $(PY) ]; then $(PY) -I -S tools/setup.py --deploy; else $(PYTHON) tools/setup.py --deploy; fi

SOURCES := libs services tools tests deploy/docker docs/clients/python
TESTS := $(wildcard tests/tidy tests/unit tests/sim tests/integration tests/system)
FLAGS = $(if $(ENGINE),--engine "$(ENGINE)") $(if $(MODEL),--model "$(MODEL)") \
	$(if $(CAPACITY),--capacity "$(CAPACITY)") $(if $(WORKERS),--workers "$(WORKERS)") \
	$(if $(GATEWAYS),--gateways "$(GATEWAYS)") $(ARGS)
PYTEST = $(PY) -m pytest $(if $(K),-k "$(K)")
# Much of a test is waiting for processes and timers, so more of them than cores run together. A file
# stays in one process: its tests may share what takes long to start.
JOBS ?= 3
TOGETHER = --numprocesses $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help run stop psql setup setup-dev setup-bench setup-deploy test check lint types imports \
	gen-check protos unit integration system conformance chaos deploy-check bench fix gen lock clean

help: ## This text
	@awk 'BEGIN { FS = ":.*## " } \
		/^##   / { printf "    %s\n", substr($$0, 6); next } \
		/^## / { printf "\n%s\n", substr($$0, 4) } \
		/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

## Run it. MODEL=<file.gguf> ENGINE=sim|llamacpp|trtllm CAPACITY=<streams> WORKERS=<number> GATEWAYS=<number>
##   MAAS_PORT_BASE=<port> moves all ports, ARGS=--detach returns when ready

run: setup ## Start the whole suite here; Ctrl-C stops it
	@exec $(PY) -m tools.up $(FLAGS)

stop: setup ## Stop what `make run ARGS=--detach` started
	@exec $(PY) -m tools.down

psql: setup ## Open a shell on the local database
	@exec $(PY) -m tools.psql

## Test it. T=<path> K=<expression> narrow what runs

test: check ## Everything that CI asks for: check, unit, integration, system
	@exec $(PYTEST) $(if $(T)$(K),,$(TOGETHER)) $(or $(T),$(TESTS))

check: lint types imports gen-check protos ## All that needs no test to run

lint: setup-dev ## Style, spelling, formatting
	@$(PY) -m ruff check $(SOURCES)
	@$(PY) -m ruff format --check --quiet $(SOURCES)
	@.venv/bin/codespell $(SOURCES) deploy docs protos $(wildcard *.md)

types: setup-dev ## Types, strictly
	@$(PY) -m mypy

imports: setup-dev ## Which part may import which
	@.venv/bin/lint-imports --no-cache

gen-check: setup-dev ## gen/ is what protos/ say
	@$(PY) -m tools.gen --check

protos: setup-dev ## Lint and formatting of the contracts
	@.venv/bin/buf lint
	@.venv/bin/buf format --diff --exit-code

unit: setup-dev ## Unit tests
	@exec $(PYTEST) $(or $(T),tests/unit)

integration: setup-dev ## One service at a time, with a real PostgreSQL and real gRPC
	@exec $(PYTEST) $(or $(T),tests/integration)

system: setup-dev ## The whole suite as real processes
	@exec $(PYTEST) $(or $(T),tests/system)

conformance: $(if $(filter engine,$(GROUP)),setup-dev,setup) ## Show what is promised from outside; GROUP=stream|request|engine ONLY=U3,W-1
	@GRPC_VERBOSITY=ERROR exec $(PY) -m tools.conformance --group "$(or $(GROUP),stream)" \
		$(if $(ONLY),--only "$(ONLY)") $(ARGS)

chaos: setup-dev ## Kill a suite of its own under load, then audit every token. SECONDS=60 KILLS=1000 SEED=7
	@GRPC_VERBOSITY=ERROR exec $(PY) -m tools.chaos $(if $(SECONDS),--seconds "$(SECONDS)") \
		$(if $(KILLS),--kills "$(KILLS)") $(if $(SEED),--seed "$(SEED)") $(ARGS)

deploy-check: setup-deploy ## Images and manifests, by their own linters; needs kubectl or kustomize
	@exec $(PY) -m tools.deploy.check

gpu-check: setup-dev ## On a GPU machine: the trtllm engine's contract and throughput; MODEL=<directory>
	@GRPC_VERBOSITY=ERROR exec $(PY) -m tools.gpu_check $(if $(MODEL),--model "$(MODEL)") $(ARGS)

bench: setup-bench ## Speed beside its floors; ARGS=--quick, ARGS="--only paced"
	@exec $(PY) -m tests.bench $(ARGS)

## Change it

fix: setup-dev ## Repair what can be repaired by itself
	@$(PY) -m ruff check --fix --quiet $(SOURCES) || true
	@$(PY) -m ruff format --quiet $(SOURCES)
	@.venv/bin/buf format --write

gen: setup-dev ## Generate gen/ from protos/
	@$(PY) -m tools.gen

lock: setup ## Resolve the dependencies of pyproject.toml anew
	@$(PY) -m tools.lock

setup: ## .venv with what running needs
	@$(SETUP)

setup-dev: ## .venv with what testing needs
	@$(SETUP_DEV)

setup-bench: ## .venv with what testing and `make bench` need
	@$(SETUP_BENCH)

setup-deploy: ## .venv with what testing and `make deploy-check` need
	@$(SETUP_DEPLOY)

clean: setup stop ## Remove the state of `make run` and all caches; keeps .venv
	@$(PY) -m tools.clean
