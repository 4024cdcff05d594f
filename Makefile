# Every target builds .venv on first use and is quick afterwards. Needs Python >= 3.11 with venv and pip, and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-fast lint docs docs-check resolve wheel-smoke matrix bench bench-twice bench-record peers clean

demo: $(STAMP)
	$(BIN)/python examples/quickstart.py

# Two processes of one thread each: a parallel loop of two threads waits for whichever core is busy with something else.
# Tests start some fifty processes, each of which would compile the library's sources where Python may not keep bytecode.
test: $(STAMP)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The first case of each test, and none that starts a process: while one works on something. CI runs `make test`.
test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --fast

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in docs/_build/index.html; warnings are errors. Sphinx is installed on first use.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -b html -W --keep-going -j 2 -q docs docs/_build

# Its pages, pictures and search in a headless Chromium.
docs-check: docs
	$(BIN)/python tools/docs_check.py docs/_build

# Whether pip finds all of constraints.txt for every supported Python, written down for the test; after changes to it.
resolve: $(STAMP)
	$(BIN)/python tests/setting_up/test_resolution.py

# The wheel, installed without constraints beside torch 2.6 and the newest, each time into a clean environment; 8 GB.
wheel-smoke:
	$(PYTHON) tools/wheel_smoke.py

# The same on every Python that is here and a row of torches, written into docs/support.md.
matrix:
	$(PYTHON) tools/wheel_smoke.py --matrix --into docs/support.md

# The short version, with the table at the end; `pytest benchmarks` runs all of it, a billion draws of noise included.
# Peers that are not there are named; `make peers` installs them.
BENCH := -m pytest benchmarks/test_suite.py --quick -q --benchmark-quiet
bench: $(STAMP)
	@mkdir -p outputs
	$(BIN)/python $(BENCH) --benchmark-json=outputs/bench.json
	@echo "kept in outputs/bench.json; to compare with another: $(BIN)/python -m benchmarks.compare OTHER.json outputs/bench.json"

# Whether two runs agree on every ratio within 15%. On one core: where two are virtual, whether they share a real one
# changes from second to second, by a factor of up to 1.8 in the time of whoever uses both.
bench-twice: $(STAMP)
	@mkdir -p outputs
	$(BIN)/python $(BENCH) --one-core --benchmark-json=outputs/bench-1.json
	$(BIN)/python $(BENCH) --one-core --benchmark-json=outputs/bench-2.json
	$(BIN)/python -m benchmarks.compare outputs/bench-1.json outputs/bench-2.json --agree

# What docs/performance.md shows: the whole suite, its tables and picture, scaling, and prices. On a machine with nothing else to do.
bench-record: $(STAMP)
	@mkdir -p outputs
	$(BIN)/python -m pytest benchmarks/test_suite.py -q --benchmark-quiet --benchmark-json=outputs/cpu.json
	$(BIN)/python -m benchmarks.compare outputs/cpu.json --save benchmarks/results/cpu.json --into docs/performance.md --plot assets/ratios.png
	$(BIN)/python -m benchmarks.compare benchmarks/results/cpu.json --markdown > benchmarks/results/cpu.md
	$(BIN)/python -m benchmarks.scaling --into docs/performance.md
	$(BIN)/python -m benchmarks.costs --into docs/cost.md

peers: $(STAMP)
	$(BIN)/python tools/environment.py $(VENV) dev,bench

$(VENV)/.docs: $(STAMP)
	$(BIN)/python tools/environment.py $(VENV) dev,docs
	@touch $@

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("sdesolve needs Python 3.11 or later, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	@$(PYTHON) tools/environment.py $(VENV) dev
	@touch $@

clean:
	rm -rf $(VENV) docs/_build docs/generated .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
