# Each target installs what it needs into .venv first; a second run installs nothing.
# PYTHON=/path/to/python3.12 chooses the interpreter, otherwise one is looked for on PATH.

BIN := .venv/bin
SOURCES := pyproject.toml constraints.txt .ci/install

.PHONY: help demo bench bench-quick bench-growth bench-shapes test docs lint format check

help:
	@echo "make demo    fine-tune a real model on the CPU in about five minutes, and see that it learned"
	@echo "make test    all tests, those with the real model too"
	@echo "make bench   speed and memory against the floor and the peers, half an hour or more (bench-quick: a few minutes)"
	@echo "make bench-growth, make bench-shapes   how cost grows; two more shapes (half an hour or more each)"
	@echo "make docs    the documentation site, into site/"
	@echo "make lint    formatting, lint, types, layering"
	@echo "make format  rewrite the sources in the project's format"
	@echo "make check   lint, docs and test: what CI runs"

.venv/.core-installed: $(SOURCES)
	.ci/install ""
	@touch $@

.venv/.dev-installed: .venv/.core-installed
	.ci/install "[dev]"
	@touch $@

demo: .venv/.core-installed
	$(BIN)/thrifty demo

# The end-to-end rows need DATA, the folder of snips_train.jsonl and gsm8k_train.jsonl.
bench: .venv/.dev-installed
	$(BIN)/python -m benchmarks bench

bench-quick: .venv/.dev-installed
	$(BIN)/python -m benchmarks quick

bench-growth: .venv/.dev-installed
	$(BIN)/python -m benchmarks growth

bench-shapes: .venv/.dev-installed
	$(BIN)/python -m benchmarks shapes

test: .venv/.dev-installed
	$(BIN)/python -m pytest -m "" -q -n 2 --dist loadfile

docs: .venv/.dev-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: .venv/.dev-installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: .venv/.dev-installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: lint docs test
