# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
# Processes that run tests; each computes with one thread.
JOBS ?= 2
BIN := .venv/bin
# The newest Python at hand, for the cache room alone, which must not need what the stages need.
NEWEST ?= $(firstword $(foreach python,python3.15 python3.14 python3.13 python3.12, \
	$(shell $(python) -c 'import sys; print(sys.executable)' 2>/dev/null)) \
	$(lastword $(sort $(wildcard $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python3))) $(PYTHON))
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test test-light test-slow bench lint browser install install-dev install-bench clean

demo: install  ## install, then run the default experiment: teacher, cache, student, scores, report
	dvc repro
	@ls -t runs/*/evaluation/report.html | sed -n '1s/^/look: /p'

test: install-dev  ## install, then run the tests
	pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder

test-light: .venv-light/.installed  ## the cache room's tests without torch and diffusers, on the newest Python
	.venv-light/bin/python -m pytest -n $(JOBS) tests/cache

test-slow: install-dev  ## the long campaigns
	pytest -m slow

bench: install-bench  ## measure everything beside its alternatives, under half an hour; the README quotes the result
	python -m benchmarks

lint: install-dev  ## what CI checks besides the tests
	pre-commit run --all-files

browser:  ## what the page's tests need: Debian's Chromium (as root), and the onnxruntime-web that pages name
	command -v chromium && command -v chromedriver || (apt-get update -qq && apt-get install -y -qq chromium chromium-driver)
	command -v npm || (apt-get update -qq && apt-get install -y -qq npm)
	npm install --silent --no-save --no-audit --no-fund --prefix .browser onnxruntime-web@1.30.0

install: .venv/.installed
install-dev: .venv/.installed-dev
install-bench: .venv/.installed-bench

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/.installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ .venv/.installed

.venv/.installed-bench: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	@touch $@ .venv/.installed

.venv-light/.installed: pyproject.toml
	$(NEWEST) -m venv .venv-light
	.venv-light/bin/python -m pip install --quiet 'dask[array]' google-crc32c hypothesis 'numcodecs[pcodec]' numpy pytest pytest-xdist scipy tensorstore zarr
	.venv-light/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

clean:  ## remove the environments; caches, teachers and runs stay
	rm -rf .venv .venv-light
