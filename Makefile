# The one front door, for people and for CI. `make` shows what there is.
PYTHON ?= python3
CONFIG ?= deploy/configs/local.yaml
MODEL ?= smollm2-135m
HTTP_PORT ?= 8000
GRPC_PORT ?= 50051
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# torch is named beside what depends on it, so that one resolution sees both.
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
PIP_INSTALL = $(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH)
# Side by side: they share nothing. Some wait more than they compute, so there is one more of them than there are cores. What
# starts workers waits most of the time: three files at once. Clusters come alone.
QUICK_WORKERS := $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 8 ? cores + 1 : 8)))
QUICK_TESTS = $(BIN)/pytest -n $(QUICK_WORKERS) -m "not long and not model and not cluster and not clients and not hosts"
# command:package of a model checker, a Redis, Prometheus' checker of rules, and a browser for the console
TOOLS := spin:spin g++:g++ redis-server:redis-server promtool:prometheus chromium:chromium
GUARDS := tests/test_architecture.py tests/test_unsafe_primitives.py tests/test_packaging.py tests/test_wire_is_fresh.py

.DEFAULT_GOAL := help
.PHONY: help install install-dev tools model serve test test-autoscaler day-night test-unit test-cluster test-clients chaos kill-sweep exactness-grid simulate test-distribution check format proto bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/installed ## Make .venv and install pdserve with engine, Ray and Redis client

install-dev: $(VENV)/installed-dev ## The same, plus what tests and checks need

model: install ## Fetch the default model into the model cache (MODEL=)
	$(BIN)/pdserve pull $(MODEL)

serve: install ## Start a cluster on this machine, models fetched; Ctrl-C stops it (CONFIG=, HTTP_PORT=, GRPC_PORT=)
	exec $(BIN)/pdserve up $(CONFIG) --set router.http_port=$(HTTP_PORT) --set router.grpc_port=$(GRPC_PORT)

tools: # What tests need beside Python, where it can be installed; tests whose tool is missing are skipped
	@missing=; for tool in $(TOOLS); do command -v $${tool%%:*} >/dev/null || missing="$$missing $${tool##*:}"; done; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi || true

test: install-dev tools model ## Run every test that this machine can run, the quick ones first
	$(QUICK_TESTS)
	$(BIN)/python tests/simulation/run.py
	$(BIN)/pytest -n 3 --dist loadfile -m "long and not model and not cluster"
	$(BIN)/pytest -n auto --maxprocesses 2 --dist loadfile -m "model and not cluster and not clients"
	$(BIN)/pytest -m "cluster and not clients"

test-unit: install-dev ## Run the quick tests: no model, no cluster, no faults in real processes, no searches
	$(QUICK_TESTS)

test-cluster: install-dev ## Hosts of namespaces, `ray up`, load and faults; writes tests/hosts/TRANSCRIPT.md (needs root, sshd, rsync, ip, redis, prometheus)
	$(BIN)/pytest -s -m hosts

test-clients: install-dev .venv-clients/installed .venv-guidellm/installed ## Run openai, langchain, litellm, llm, lm-eval and guidellm against a cluster (2 GB of venvs)
	$(BIN)/pytest -m clients

chaos: install-dev ## Every fault at every protocol step over every transport, in real processes; writes tests/chaos/MATRIX.md (31 min on two very busy cores)
	$(BIN)/python tests/chaos/run.py $(ARGS)

kill-sweep: install-dev ## Kill the decode worker after each of 64 tokens of an answer; writes tests/chaos/KILL_SWEEP.md (5 min)
	$(BIN)/python tests/chaos/sweep.py $(ARGS)

exactness-grid: install-dev ## Every combination of speculation, TP, PP, preemption, overlap and prompt batching against one reference (half an hour on two cores)
	$(BIN)/python tests/exactness/run.py $(ARGS)

simulate: install-dev ## Ten thousand simulated clusters under faults, one per seed (ARGS="--replay SEED" shows one)
	$(BIN)/python tests/simulation/run.py $(ARGS)

test-distribution: install-dev ## Two million draws through guesses, good and bad, against the exact distribution
	PDSERVE_SEARCH_TIMES=40 $(BIN)/pytest -q tests/decode_worker/speculation/test_distribution.py

test-autoscaler: install-dev ## Scale, flip, drain and roll a cluster under load for three minutes; every answer is checked (ARGS=)
	$(BIN)/python tests/scaling/run.py $(ARGS)

day-night: install-dev ## The autoscaler against every fixed split of three workers, on a load that turns; answers checked (9 min)
	$(BIN)/python tests/scaling/day_night.py $(ARGS)

check: install-dev ## Format, lint, types, floor plan, generated code: fails in about a minute
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/mypy --package benchmarks
	$(BIN)/pytest -q $(GUARDS)

format: install-dev ## Format, and mend what the linter can mend
	$(BIN)/ruff check --fix --exit-zero
	$(BIN)/ruff format

proto: install-dev ## Regenerate common/wire from proto/
	$(BIN)/python -m grpc_tools.protoc -Icommon/wire=proto --python_out=. --pyi_out=. --grpc_python_out=. proto/*.proto

bench: install ## Load a running server and print latencies and throughput (ARGS=, HTTP_PORT=)
	$(BIN)/python -m benchmarks.serve --base-url http://127.0.0.1:$(HTTP_PORT) $(ARGS)

clean: ## Remove .venv and every cache; the model cache stays
	rm -rf $(VENV) .venv-clients .venv-guidellm .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist

.NOTPARALLEL:

# Tests start some hundred processes that import the same modules: the first one compiles them for all.
unexport PYTHONDONTWRITEBYTECODE

# The stamps make a second run quick: pip is only asked again when what it reads has changed.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[engine,ray,redis]'
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[engine,ray,redis,nixl,dev]'
	@touch $(VENV)/installed $@

# The lock names every package, so nothing is left to resolve.
.venv-%/installed: tests/clients/%.lock
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --no-deps -r $<
	@touch $@
