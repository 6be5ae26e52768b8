PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint test-common test-floor clean

# The environment: rebuilt when the pins or the package's metadata change. CPU-only machines may install a CPU build
# of torch into .venv beforehand; it is kept.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/.installed
	$(BIN)/python examples/sudoku/demo.py

test: .venv/.installed
	$(BIN)/python -m pytest

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# transformers' own tests of a model, fetched from its source distribution
test-common: .venv/.installed
	$(BIN)/python tests/common_model_tests.py

# The suite on the oldest supported transformers
.venv-floor/.installed: pyproject.toml constraints.txt
	test -x .venv-floor/bin/python || $(PYTHON) -m venv .venv-floor
	grep -vE "^(transformers|huggingface_hub|tokenizers)==" constraints.txt > .venv-floor/constraints.txt
	.venv-floor/bin/python -m pip install --quiet -c .venv-floor/constraints.txt torch
	.venv-floor/bin/python -m pip install --quiet -c .venv-floor/constraints.txt -e ".[dev]" "transformers==5.17.0"
	touch $@

test-floor: .venv-floor/.installed
	.venv-floor/bin/python -m pytest
	.venv-floor/bin/python tests/common_model_tests.py

clean:
	rm -rf .venv .venv-floor build *.egg-info .pytest_cache .ruff_cache .hypothesis
