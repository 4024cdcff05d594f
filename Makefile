# Every target builds .venv on first use and is quick afterwards. Needs Python >= 3.11 with venv and pip, and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint bench clean

demo: $(STAMP)
	$(BIN)/python examples/quickstart.py

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The quick part; `pytest benchmarks` runs all of it, a billion draws of noise included.
bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks/test_noise.py benchmarks/test_steps.py benchmarks/test_trajectories.py -k "(test_normal and 4194304) or (test_large and threads) or test_small or memory or linear_sde or models or few or first_call" --benchmark-disable-gc --benchmark-columns=median,iqr,rounds --benchmark-sort=name

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("sdesolve needs Python 3.11 or later, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
