# The commands of this project. Each works from a fresh clone: what is missing is made first.
#   make quickstart   train a small Chain-of-Experts model on two CPU ranks, and see what it learned
#   make check        format, lint, types (make lint) and the fast tests
#   make test         the tests to run before a change is handed in
#   make test-rest    the slow tests that make test leaves out
#   make test-all     both: everything that needs no GPU, with a covering few of the many layouts
#   make test-full    make test-all, and all layouts with all ZeRO stages (about an hour more)
#   make gpu          what holds on this machine's first GPU, in eight minutes: gpu-report/, rows in the README
#   make combinations measure every pair of settings and layouts against one process: docs/combinations.md (minutes)
#   make format       format and fix what can be fixed; make docs: write docs/settings.md anew
# Python 3.11 installs Megatron-Core 0.16.1, Python 3.12 and newer 0.19.2. Both can live side by side, for example
# make test PYTHON=python3.12 VENV=.venv-3.12
PYTHON ?= python3
VENV ?= .venv
# Files or folders of tests, all when empty: make test TESTS="tests/model tests/zero"
TESTS ?=
# Files of tests that run side by side, each with up to a few processes that also wait: one more than cores is about
# right. Jobs with time limits, slow networks and what takes minutes of all cores have the machine to themselves.
WORKERS ?= 3
ALONE := slurm or network or alone
BIN := $(VENV)/bin
SIDE_BY_SIDE := $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
INSTALLED := $(VENV)/installed
export PYTHONUNBUFFERED := 1
# Some containers set it; without byte code every process compiles its imports, and pytest all tests, again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-side test-rest test-all test-full gpu combinations lint check format docs clean

quickstart: $(INSTALLED) data/builtin/manifest.json
	OMP_NUM_THREADS=1 $(BIN)/python launch/one_host.py -- --nproc-per-node 2 launch/pretrain_coe.py configs/quickstart.yaml

CORPUS := $(wildcard coe_megatron/data/*.py coe_megatron/corpus/*.py coe_megatron/corpus/*/*.py coe_megatron/corpus/*/*/*.py)
data/builtin/manifest.json: $(INSTALLED) $(CORPUS)
	$(BIN)/python launch/prepare_data.py --builtin 20000 --vocab-size 2048 --output data/builtin --overwrite

# Threads of several processes that share the cores would only wait for each other.
test test-side test-rest test-full check: export OMP_NUM_THREADS := 1

test: test-side
	$(BIN)/pytest -m "($(ALONE)) and not slow and not full" $(TESTS)

# The tests of make test that run side by side.
test-side: $(INSTALLED)
	$(SIDE_BY_SIDE) -m "not gpu and not slow and not full and not ($(ALONE))" $(TESTS)

test-rest: $(INSTALLED)
	$(SIDE_BY_SIDE) -m "slow and not gpu and not full and not ($(ALONE))"
	$(BIN)/pytest -m "slow and ($(ALONE)) and not full"

test-all:
	$(MAKE) test
	$(MAKE) test-rest

test-full: test-all
	$(SIDE_BY_SIDE) -m "full and not gpu and not ($(ALONE))"

gpu: $(INSTALLED)
	$(BIN)/python benchmarks/gpu_day.py

combinations: $(INSTALLED)
	$(BIN)/python tests/combinations/combination_page.py

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint
	$(SIDE_BY_SIDE) -q -m "not gpu and not thorough and not ranks and not run and not network and not slurm and not slow and not full"

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(INSTALLED)
	$(BIN)/python -m coe_megatron.config.settings_page docs/settings.md
	$(BIN)/python -m coe_megatron.config.megatron_flags docs/from-megatron.md

# Installed once, and again when the pins or the project's metadata change.
$(INSTALLED): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one with make PYTHON=..." >&2; exit 1; }
	@command -v c++ >/dev/null || \
		{ echo "error: a C++ compiler (c++) is needed: DeepSpeed builds kernels with it" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -c 'import platform; from importlib.metadata import version; \
		print("installed for Python", platform.python_version() + ": Megatron-Core", version("megatron-core"))'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs data .pytest_cache .mypy_cache .ruff_cache
