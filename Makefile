# make run     builds .venv, installs creto into it and runs the demo: no network services, no account needed
# make test    every check and every test
# make bench   the benchmarks; make wheel: sdist -> wheel -> the tests on the installed wheel
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TESTS  ?= tests
VENV   ?= .venv
BIN    := $(VENV)/bin
# The environment is rebuilt when one of these changes, and only then.
BUILD  := pyproject.toml setup.py $(wildcard ext/creto_hotpath/*.pyx ext/creto_hotpath/*.pxd ext/creto_hotpath/*.h)
# Programs the tests drive; the left side is the command looked for, the right side the Debian package.
TOOLS  := nft=nftables nginx=nginx-light wrk=wrk node=nodejs git=git curl=curl openssl=openssl ip=iproute2
APT    := DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends

.PHONY: help run test lint bench wheel deps system clean

help:
	@sed -n 's/^# //p' $(firstword $(MAKEFILE_LIST)) | head -3

run: $(VENV)/.installed-demo
	@$(BIN)/python examples/demo/run.py $(ARGS)

test: deps lint
	$(BIN)/python -m pytest $(TESTS) $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	@mkdir -p .benchmarks
	$(BIN)/python -m pytest benches -s --benchmark-json=.benchmarks/latest.json $(ARGS)

deps: $(VENV)/.installed-dev
	@missing=(); for tool in $(TOOLS); do \
	   PATH="$$PATH:/usr/sbin:/sbin" command -v "$${tool%%=*}" >/dev/null || missing+=("$${tool#*=}"); done; \
	if [ $${#missing[@]} -gt 0 ]; then \
	   if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -q && $(APT) "$${missing[@]}"; \
	   else echo "make: tests that drive these programs will be skipped; install: $${missing[*]}" >&2; fi; fi

# A fresh Debian has python3 without venv and without headers.
system:
	@command -v $(PYTHON) >/dev/null || { echo "make: no '$(PYTHON)'; set PYTHON=/path/to/python3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	   { echo "make: $$($(PYTHON) --version) is too old: creto needs Python 3.11 or newer (set PYTHON=...)" >&2; exit 1; }
	@missing=(); \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv); \
	$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || missing+=(python3-dev); \
	command -v cc >/dev/null || missing+=(gcc libc6-dev); \
	if [ $${#missing[@]} -gt 0 ]; then \
	   if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -q && $(APT) "$${missing[@]}"; \
	   else echo "make: missing $${missing[*]}; on Debian and Ubuntu: sudo apt-get install $${missing[*]}" >&2; exit 1; fi; fi

$(BIN)/python: | system
	$(PYTHON) -m venv $(VENV)

# setuptools and Cython live in .venv so that a rebuild after an edit neither downloads nor recompiles everything.
$(VENV)/.installed-demo: $(BUILD) | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check 'setuptools>=77' 'Cython>=3.1'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[demo]'
	@touch $@

$(VENV)/.installed-dev: $(BUILD) | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check 'setuptools>=77' 'Cython>=3.1'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[dev]'
	@touch $@ $(VENV)/.installed-demo

# What a user gets: the wheel built from the sdist, in an environment that knows nothing of this checkout's packages.
wheel: $(VENV)/.installed-dev
	rm -rf dist $(VENV)-wheel
	$(BIN)/python -m build -q
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install -q --disable-pip-version-check "$$(echo dist/*.whl)[dev]"
	$(VENV)-wheel/bin/python -m pytest $(TESTS) $(ARGS)

clean:
	rm -rf build dist $(VENV) $(VENV)-wheel *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find ext \( -name '*.so' -o -name '*_c.c' \) -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
