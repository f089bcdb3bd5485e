# make demo: from nothing to out/demo/report.html.   make test: lint, types, tests.   make test-all: the long ones too.
PYTHON ?= python3
# extra arguments for pip, such as an index of CPU-only PyTorch builds
PIP_ARGS ?=
DEMO_ARGS ?=
OUT ?= out/demo
BIN := .venv/bin

.PHONY: demo test test-all docs clean

demo: .venv/installed
	$(BIN)/linearize run demo --out $(OUT) $(DEMO_ARGS)

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2

test-all: test
	$(BIN)/pytest -n 2 --dist loadfile -m slow

docs: .venv/installed
	$(BIN)/python -m benchmarks.documents

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv out
