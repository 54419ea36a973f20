PYTHON ?= python3
VENV := .venv
COMPAT := .venv-compat
BOOK := src/modicum/embedded/texts/busterbrown.txt

export PIP_DISABLE_PIP_VERSION_CHECK := 1
INSTALL := -m pip install --quiet

# One thread in each process: pytest runs several, and they would fight over the cores. Tests need no network.
TESTING := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: venv run test test-compat bench lint clean

venv: $(VENV)/.stamp

# torch goes first, on its own, so that nothing installed later picks another build of it. On Linux the package
# index gives the CUDA build; for the small one: make venv PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
$(VENV)/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(INSTALL) -c constraints.txt torch
	$(VENV)/bin/python $(INSTALL) -c constraints.txt -e ".[dev]"
	touch $@

$(COMPAT)/.stamp: pyproject.toml constraints-compat.txt
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python $(INSTALL) -c constraints-compat.txt torch
	$(COMPAT)/bin/python $(INSTALL) -c constraints-compat.txt -e . pytest pytest-xdist hypothesis
	touch $@

run: venv
	$(VENV)/bin/modicum run --model stories --policy keydiff --budget 256 --prompt-file $(BOOK) --max-new-tokens 120

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: lint
	$(TESTING) $(VENV)/bin/pytest -n 2
	$(MAKE) test-compat

# The contract tests ask of transformers what modicum relies on, so they run against the oldest one too.
test-compat: $(COMPAT)/.stamp
	$(TESTING) $(COMPAT)/bin/pytest -q tests/contract

bench: venv
	$(VENV)/bin/python benchmarks/kv_cpu.py

clean:
	rm -rf $(VENV) $(COMPAT) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
