# Every target installs first when needed. `make help` lists what a person types.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo up stack test compose-test systemd-test compatibility upgrade-test check lint format lock contracts variables model wheel bench soak chaos chaos-mutants screenshots clean

PYTHON ?= python3
BROKERS ?= 1
DURATION_S ?= 600
SEED ?= 1
PORT ?= 8000
PEERS ?= 0
SIZE ?= standard
SOAK_S ?= 3600
VENV ?= .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m
INSTALLED := $(VENV)/installed
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## .venv with the locked dependencies, the package and its commands

# The stamp is written last: an install that was killed half-way is done again.
$(INSTALLED): pyproject.toml requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "needs Python 3.11 or newer; say which with PYTHON=" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "needs Python's venv: install python3-venv" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the locked dependencies into $(VENV)"
	@$(RUN) pip install --quiet --require-hashes -r requirements/dev.txt
	@$(RUN) pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(INSTALLED) ## book thousands of seats over HTTP and show them in the analysts' tables
	@DEVSTACK_PARENT=$$PPID exec $(RUN) devstack demo

up: $(INSTALLED) ## the same stack, kept up with the booking page on 127.0.0.1:8000 (PORT=)
	@DEVSTACK_PARENT=$$PPID exec $(RUN) devstack up --port $(PORT)

stack: $(INSTALLED) ## databases, Kafka, migrations and topics in the foreground (BROKERS=1 or 3)
	@DEVSTACK_PARENT=$$PPID exec $(RUN) devstack stack --brokers $(BROKERS)

# Each worker has servers of its own; tests wait much, so three do for two cores. A file's tests stay
# together, so that they share them.
test: $(INSTALLED) ## all tests, on a real Postgres and a real Kafka
	@exec $(RUN) pytest --numprocesses 3 --dist loadfile

compose-test: $(INSTALLED) ## docker-compose.yml up, booked and killed under load; needs a Docker engine
	@exec $(RUN) tests.compose

chaos: $(INSTALLED) ## break every part while clients book, then audit every place (DURATION_S=, SEED=)
	@DEVSTACK_PARENT=$$PPID exec $(RUN) chaos --duration-s $(DURATION_S) --seed $(SEED)

chaos-mutants: $(INSTALLED) ## does that audit find bugs? ten deliberate ones, each by its fault
	@DEVSTACK_PARENT=$$PPID exec $(RUN) chaos.mutation

systemd-test: $(INSTALLED) ## install on a real systemd; kill, freeze, starve, upgrade, reboot (root; SYSTEMD_BOX= boots it)
	@DEVSTACK_PARENT=$$PPID exec $(RUN) tests.systemd

compatibility: $(INSTALLED) ## the product on PostgreSQL 15, 16, 18 and Kafka 4.3, 3.9, 3.9 with ZooKeeper
	@DEVSTACK_PARENT=$$PPID exec $(RUN) tests.compatibility

upgrade-test: $(INSTALLED) ## the version before beside this one, under load, and back (FROM= another commit)
	@DEVSTACK_PARENT=$$PPID exec $(RUN) tests.compatibility.upgrade $(if $(FROM),--from $(FROM))

check: $(INSTALLED) ## the quick tests and lint, in under a minute, without any server
	@$(RUN) ruff check --quiet . && $(RUN) ruff format --quiet --check . && exec $(RUN) pytest -q -m "not needs_postgres and not needs_kafka"

lint: $(INSTALLED) ## ruff (all rules), format check, mypy strict
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy

format: $(INSTALLED) ## let ruff format and mend what it can
	@$(RUN) ruff check --fix . && $(RUN) ruff format .

lock: $(INSTALLED) ## compile the lock files again from pyproject.toml
	@COMPILE="$(BIN)/uv pip compile --quiet --generate-hashes --no-header --universal --python-version 3.11 --no-emit-find-links --upgrade"; \
	$$COMPILE pyproject.toml --all-extras --group dev -o requirements/dev.txt; \
	$$COMPILE --group pyproject.toml:build -c requirements/dev.txt -o requirements/build.txt; \
	for extra in service relay loader tracing; do $$COMPILE pyproject.toml --extra $$extra -c requirements/dev.txt -o requirements/$$extra.txt; done

contracts: $(INSTALLED) ## generate contracts/asyncapi.yaml and contracts/analytics.odcs.yaml again
	@exec $(RUN) contracts

variables: $(INSTALLED) ## write the table of variables in docs/operations.md again
	@exec $(RUN) tests.repository.variables

model: $(INSTALLED) ## search the models of docs/model through: relay, loader, and the wrong ways
	@exec $(RUN) docs.model

wheel: $(INSTALLED) ## build the wheel into dist/
	@$(RUN) pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

bench: $(INSTALLED) ## measure every part: PEERS=1 Debezium too, SIZE=quick, standard or full
	@DEVSTACK_PARENT=$$PPID exec $(RUN) benchmarks --size $(SIZE) $(if $(filter 1,$(PEERS)),--peers)

soak: $(INSTALLED) ## an hour at 300 bookings a second: does anything grow? (SOAK_S=)
	@DEVSTACK_PARENT=$$PPID exec $(RUN) benchmarks.soak --duration-s $(SOAK_S)

screenshots: $(INSTALLED) ## take the pictures of the booking pages in docs/images again (needs Chromium)
	@DEVSTACK_PARENT=$$PPID exec $(RUN) tests.browser.screenshots

clean: ## remove what was made here, but keep the download cache
	@rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@test ! -d .devstack || find .devstack -mindepth 1 -maxdepth 1 ! -name cache -exec rm -rf {} +
	@find . -path ./.devstack -prune -o -name __pycache__ -type d -exec rm -rf {} +
