PYTHON ?= python3
BIN := .venv/bin
# setuptools shows a warning at every editable install of a package whose folder has another name.
QUIET := PYTHONWARNINGS=ignore::Warning:setuptools.command.editable_wheel

.PHONY: demo web test fuzz lint docs test-common test-floor clean

# The environment of a user: rebuilt when the pins or the package's metadata change. CPU-only machines may install a CPU
# build of torch into .venv beforehand; it is kept.
#
# Editable installs find the package by an import hook, as its folder has another name. Type checkers and editors run no
# hooks. setuptools' editable_mode=strict would make them a folder of links to every file, as of the install: a new file
# would not exist until the next one, and where commands and families are discovered, nothing would tell. So the install
# is an ordinary one, and .venv/links holds two links to folders, where mypy and pyright look (see pyproject.toml).
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(QUIET) $(BIN)/python -m pip install --quiet -c constraints.txt -e .
	mkdir -p .venv/links
	ln -sfn ../.. .venv/links/loopmdm
	ln -sfn ../../cli .venv/links/loopmdm_cli
	touch $@

# What tests and lint need besides
.venv/.dev: .venv/.installed
	$(QUIET) $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/.installed
	$(BIN)/python examples/sudoku/demo.py

# The page, from the bundled model: web/dist. It takes node's npm.
.venv/.web: .venv/.installed
	$(QUIET) $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[web,web-test]"
	touch $@

web: .venv/.web
	cd web && npm ci --ignore-scripts --no-audit --no-fund
	$(BIN)/python -W ignore -m loopmdm.web.build

# A test file is one process's; every process computes on one thread.
test: .venv/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile

# Random configurations and arguments, others each time, behind those that failed before (kept in .hypothesis)
FUZZ_MINUTES ?= 60
fuzz: .venv/.dev
	FUZZ_MINUTES=$(FUZZ_MINUTES) $(BIN)/python -m pytest tests/test_fuzz.py

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

# The site, in build/site; a link that leads nowhere is an error. Its packages are installed for this target alone.
.venv/.docs-installed: .venv/.installed
	$(QUIET) $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

docs: .venv/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# transformers' own tests of a model and PEFT's of decoder models, fetched from their source distributions
test-common: .venv/.dev
	$(BIN)/python tests/common_model_tests.py
	$(BIN)/python tests/peft_tests.py

# The suite on the oldest supported transformers
.venv-floor/.installed: pyproject.toml constraints.txt
	test -x .venv-floor/bin/python || $(PYTHON) -m venv .venv-floor
	grep -vE "^(transformers|huggingface_hub|tokenizers)==" constraints.txt > .venv-floor/constraints.txt
	.venv-floor/bin/python -m pip install --quiet -c .venv-floor/constraints.txt torch
	$(QUIET) .venv-floor/bin/python -m pip install --quiet -c .venv-floor/constraints.txt -e ".[dev]" "transformers==5.18.0"
	touch $@

test-floor: .venv-floor/.installed
	.venv-floor/bin/python -m pytest
	.venv-floor/bin/python tests/common_model_tests.py

clean:
	rm -rf web/dist web/node_modules .venv .venv-floor build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .mypy_cache .import_linter_cache
