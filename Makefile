# Needs python3, pip and make. Everything lives in .venv; `make clean` removes it.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -c constraints.txt

.PHONY: demo test fast lint docs clean

demo: .venv/.demo
	$(BIN)/wherefrom demo

test: .venv/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal

fast: .venv/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache

docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Some systems ship Python without ensurepip: then their own pip fills the environment.
.venv/.made:
	$(PYTHON) -m venv --clear .venv || { \
	    $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	touch $@

.venv/.demo: .venv/.made pyproject.toml constraints.txt
	$(INSTALL) -e ".[demo]"
	touch $@

.venv/.dev: .venv/.made pyproject.toml constraints.txt oracles.txt
	$(INSTALL) -e ".[dev]"
	$(INSTALL) --no-deps -r oracles.txt
	touch $@

clean:
	rm -rf .venv site .pytest_cache .ruff_cache .hypothesis build dist src/*.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
