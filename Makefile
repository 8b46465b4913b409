# SPDX-License-Identifier: Apache-2.0
# make demo   install into .venv and run the embedded model
# make test   lint, types and the whole test suite

PYTHON ?= python3
# A second interpreter, if there is one, runs the suite on the newest JAX.
PYTHON312 ?= $(firstword $(shell command -v python3.12 >/dev/null && python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null) \
  $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12))
PIP := -m pip install --quiet --disable-pip-version-check
SOURCES := pyproject.toml $(wildcard CMakeLists.txt ffi/CMakeLists.txt ffi/src/* ffi/src/*/*)

.PHONY: demo test lint fast newest clean

demo: .venv/.installed
	.venv/bin/ktx-jax demo

test: lint .venv/.dev
	.venv/bin/python -m pytest
ifneq ($(PYTHON312),)
	$(MAKE) newest
endif

# The newest JAX, on Python 3.12: the tests that do not take long.
newest: .venv312/.dev
	.venv312/bin/python -m pytest -m "not slow"

fast: .venv/.dev
	.venv/bin/python -m pytest -m "not slow"

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

clean:
	rm -rf .venv .venv312 build dist

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "ktx-jax needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv

.venv312/bin/python:
	$(PYTHON312) -m venv .venv312

.venv/.installed: .venv/bin/python $(SOURCES)
	.venv/bin/python $(PIP) -e .
	@touch $@

.venv/.dev: .venv/.installed
	.venv/bin/python $(PIP) -e '.[dev]'
	@touch $@

.venv312/.dev: .venv312/bin/python $(SOURCES)
	.venv312/bin/python $(PIP) -e '.[dev]'
	@touch $@
