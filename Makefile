# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test test-slow lint install install-dev clean

demo: install  ## install, then run the default experiment: teacher, cache, student, scores
	dvc repro

test: install-dev  ## install, then run the tests
	pytest

test-slow: install-dev  ## the long campaigns
	pytest -m slow

lint: install-dev  ## what CI checks besides the tests
	pre-commit run --all-files

install: .venv/.installed
install-dev: .venv/.installed-dev

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/.installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ .venv/.installed

clean:  ## remove the environment; caches, teachers and runs stay
	rm -rf .venv
