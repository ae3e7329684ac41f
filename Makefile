# Six words: install, demo, test, check, bench, docs, study.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: install demo test check bench docs study clean

install: $(VENV)/.runtime

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("hasten needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; set PYTHON=") if sys.version_info < (3, 11) else None'
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing hasten and what it needs (torch is large; this takes some minutes)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/.runtime
	@echo "installing what the tests need"
	@$(PIP) -e '.[test]'
	@touch $@

demo: $(VENV)/.runtime
	@$(BIN)/hasten demo

test: $(VENV)/.test
	@$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/.test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(VENV)/.runtime
	@$(PIP) -e '.[bench]'
	@$(BIN)/python benchmarks/decoder.py

docs: $(VENV)/.runtime
	@$(PIP) -e '.[docs]'
	@$(BIN)/mkdocs build --strict

study: $(VENV)/.runtime
	@$(BIN)/hasten study list

clean:
	rm -rf $(VENV) build dist site
