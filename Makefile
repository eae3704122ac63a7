# make run     builds .venv, installs creto into it and runs the demo: no network services, no account needed
# make test    every check and every test
# make bench   the benchmarks; make bench-peers: beside other proxies; make soak: half an hour; make wheel: tests on a wheel
# make fuzz    parsers against inputs nobody thought of; make sanitize: the tests of the compiled code under ASan and UBSan
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TESTS  ?= tests
JOBS   ?= 2
VENV   ?= .venv
BIN    := $(VENV)/bin
# The environment is rebuilt when one of these changes, and only then.
BUILD  := pyproject.toml setup.py $(wildcard ext/creto_hotpath/*.pyx ext/creto_hotpath/*.pxd ext/creto_hotpath/*.h ext/creto_hotpath/*_py.py)
# Programs the tests drive; the left side is the command looked for, the right side the Debian package.
TOOLS  := nft=nftables nginx=nginx-light wrk=wrk node=nodejs git=git curl=curl openssl=openssl ip=iproute2 promtool=prometheus h2load=nghttp2-client systemd-analyze=systemd
APT    := DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends
# What Creto is measured beside, and with; Python programs get an environment each, named after their package.
RIVALS := nginx=nginx-light haproxy=haproxy wrk=wrk h2load=nghttp2-client openssl=openssl
PEERS  := .benchmarks/peers
ROUNDS ?= 5
SECONDS ?= 4
MINUTES ?= 30
FUZZ_SECONDS ?= 30
# Undefined behaviour ends the run as a bad access does; assertions of the Python headers are on.
SANITIZE  := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -UNDEBUG
SANITIZED := build/sanitized

# $(call install,COMMAND=PACKAGE ...,what is lost without them): from Debian, as root; otherwise says what to install.
define install
missing=(); for tool in $(1); do \
   PATH="$$PATH:/usr/sbin:/sbin" command -v "$${tool%%=*}" >/dev/null || missing+=("$${tool#*=}"); done; \
if [ $${#missing[@]} -gt 0 ]; then \
   if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -q && $(APT) "$${missing[@]}"; \
   else echo "make: $(2); install: $${missing[*]}" >&2; fi; fi
endef

.PHONY: help run test lint bench bench-peers soak fuzz sanitize wheel deps system clean

help:
	@sed -n 's/^# //p' $(firstword $(MAKEFILE_LIST)) | head -4

run: $(VENV)/.installed-demo
	@$(BIN)/python examples/demo/run.py $(ARGS)

# Test files side by side, as many as there are JOBS: most of what tests do is wait for other processes.
test: deps lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(TESTS) $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	@mkdir -p .benchmarks
	$(BIN)/python -m pytest benches -s --benchmark-json=.benchmarks/latest.json $(ARGS)

# Beside nginx, haproxy, mitmproxy, an aiohttp proxy and LiteLLM; writes docs/performance.md. ROUNDS, SECONDS, ONLY=cpu,tls.
bench-peers: $(VENV)/.installed-dev $(addprefix $(PEERS)/venv-,$(addsuffix /.installed,mitmproxy aiohttp litellm py-spy))
	@$(call install,$(RIVALS),peers that are not there are left out)
	PYTHONPATH=benches$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python -m peers --rounds $(ROUNDS) --seconds $(SECONDS) --only '$(ONLY)' $(ARGS)

soak: $(VENV)/.installed-dev
	@$(call install,$(RIVALS),the soak needs these programs)
	$(BIN)/python benches/soak.py --minutes $(MINUTES) $(ARGS)

# Never part of what is installed; one that cannot be built is left out of the comparison.
$(PEERS)/venv-%/.installed: | $(BIN)/python
	@mkdir -p $(PEERS)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check $(if $(filter litellm,$*),'litellm[proxy]',$* $(if $(filter aiohttp,$*),uvloop)) \
	   && touch $@ || echo "make: the comparison goes on without $*" >&2

deps: $(VENV)/.installed-dev $(VENV)/.autobahn | $(BIN)/h2spec
	@$(call install,$(TOOLS),tests that drive these programs will be skipped)

# Autobahn's WebSocket test suite, which is Python 2.7; where that is missing, its test is skipped.
$(VENV)/.autobahn: tests/e2e/install_autobahn.py | $(BIN)/python
	$(BIN)/python $< $(VENV)/autobahn
	@touch $@

# The HTTP/2 conformance suite, from its Go module; its test is skipped where there is no Go to build it.
$(BIN)/h2spec: | $(BIN)/python
	@if command -v go >/dev/null; then GOBIN="$(abspath $(BIN))" go install github.com/summerwind/h2spec/cmd/h2spec@latest; \
	else echo "make: no go, so the h2spec test will be skipped" >&2; fi

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

# HTTP/2 is framed by nghttp2 where its headers are when creto is built, and by the h2 package elsewhere; tests run both.
$(VENV)/.installed-dev: $(BUILD) | $(BIN)/python
	@if [ ! -e /usr/include/nghttp2/nghttp2.h ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	   apt-get update -q && $(APT) libnghttp2-dev || echo "make: going on without nghttp2" >&2; fi
	$(BIN)/python -m pip install -q --disable-pip-version-check 'setuptools>=77' 'Cython>=3.1'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[dev]'
	@touch $@ $(VENV)/.installed-demo

# atheris is not in the dev extra: only this needs it, and it has wheels for fewer Pythons.
fuzz: $(VENV)/.installed-dev
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check 'atheris>=3.0'
	$(BIN)/python -m tests.fuzz.explore --seconds $(FUZZ_SECONDS) $(ARGS)

# The compiled modules a second time, in a folder of their own that comes first on the path. CPython itself never frees
# everything, so leaks are looked for by tests/fuzz/test_growth.py, without the sanitizers, at the end. Left out:
# killing_a_process_anywhere, whose processes lose the quota table's patience of 200 ms when they run this slowly.
sanitize: $(VENV)/.installed-dev
	CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(BIN)/python setup.py -q build_py --build-lib $(SANITIZED) \
	   build_ext --parallel 2 --build-lib $(SANITIZED) --build-temp $(SANITIZED)-objects
	PYTHONPATH=$(SANITIZED) PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	   LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(cc -print-file-name=libubsan.so)" CRETO_SANITIZED=$(SANITIZED) \
	   $(BIN)/python -m pytest -p no:cacheprovider tests/fuzz tests/ext -k 'not killing_a_process_anywhere' $(ARGS)
	CRETO_FUZZ_MESSAGES=3000 $(BIN)/python -m pytest tests/fuzz/test_growth.py

# What a user gets: the wheel built from the sdist, in an environment that knows nothing of this checkout's packages.
wheel: $(VENV)/.installed-dev
	rm -rf dist $(VENV)-wheel
	$(BIN)/python -m build -q
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install -q --disable-pip-version-check "$$(echo dist/*.whl)[dev]"
	$(VENV)-wheel/bin/python -m pytest -n $(JOBS) --dist loadfile $(TESTS) $(ARGS)

clean:
	rm -rf build dist $(VENV) $(VENV)-wheel *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find ext \( -name '*.so' -o -name '*_c.c' \) -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
