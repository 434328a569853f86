# make demo   a real genome in, a cache, a student, a page: minutes on two cores
# make test   the test suite; test-slow, test-kernels, lint, types, docs, clean
# make bench-stream   what stage two reads, against the hardware; bench-peers: against other loaders
# make bench-teacher  the teacher against published code and this CPU; bench-gpu: all that wants a GPU
#
# The first target that needs it makes .venv from constraints.txt. PYTHON=... chooses the Python.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-kernels lint types docs bench-stream bench-peers bench-teacher bench-gpu clean

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCS_INSTALLED := $(VENV)/.installed-docs
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
RECIPE := pipelines/demo/demo.toml
PYTEST_ARGS ?=
# Test files are dealt out to so many processes, each with a core of its own.
TESTERS ?= 2
# BENCH=--full takes twenty minutes and belongs on a machine with nothing else to do.
BENCH ?= --quick
PEERS := .venv-peers-zarr/.installed .venv-peers-torch/.installed .venv-peers-mds/.installed

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

$(INSTALLED): pyproject.toml constraints.txt
	@python="$(PYTHON)"; \
	for candidate in python3.11 python3.12 python3.13 python3; do \
	  if [ -z "$$python" ] && "$$candidate" -c '$(SUPPORTED)' 2>/dev/null; then \
	    python="$$candidate"; \
	  fi; \
	done; \
	if [ -z "$$python" ] || ! "$$python" -c '$(SUPPORTED)'; then \
	  echo "make: found $$("$${python:-python3}" --version 2>&1 || echo no Python);" \
	    "had-pipe needs Python 3.11, 3.12 or 3.13: install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; \
	fi; \
	if ! [ -x $(BIN)/python ]; then \
	  "$$python" -m venv $(VENV) || { echo "make: $$python cannot make a virtual environment;" \
	    "on Debian and Ubuntu install its -venv package" >&2; rm -rf $(VENV); exit 1; }; \
	fi
	$(BIN)/python -m pip install --quiet --constraint constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation \
	  --editable '.[extract,dev]'
	@touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation \
	  --editable '.[extract,dev,docs]'
	@touch $@

# Each verb says when nothing is left to do, so a second `make demo` redoes nothing.
demo: $(INSTALLED)
	@told="$$(mktemp -d)"; trap 'rm -rf "$$told"' EXIT; \
	export PATH="$(CURDIR)/$(BIN):$$PATH"; \
	run() { printf '\n$$ had-pipe %s\n' "$$*"; command had-pipe "$$@"; }; \
	run plan $(RECIPE); \
	run extract-teacher $(RECIPE) | tee "$$told/extract"; \
	run cache inspect cache/demo; \
	run cache verify cache/demo; \
	run distill $(RECIPE) | tee "$$told/distill"; \
	run report runs/demo --cache cache/demo | tee "$$told/report"; \
	printf '\nWhat was made\n'; \
	for verb in extract distill; do sed -e '/^\$$ /d' -e '/^$$/d' -e '/^next /d' "$$told/$$verb"; done; \
	grep '^page ' "$$told/report"

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not soak" \
	  --numprocesses $(TESTERS) --dist loadfile $(PYTEST_ARGS)

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not soak" \
	  --numprocesses $(TESTERS) --dist loadfile $(PYTEST_ARGS)

# Laid over the environment, not put into it: 0.7 GB that only this check needs.
.fla/.installed: tests/requirements-fla.txt $(INSTALLED)
	rm -rf .fla
	$(BIN)/python -m pip install --quiet --no-deps --target .fla --requirement $<
	@touch $@

# flash-linear-attention's kernels and our part of them, in Triton's interpreter: a minute or two.
test-kernels: .fla/.installed
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 PYTHONPATH=.fla $(BIN)/python -m pytest tests/test_fla.py \
	  $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(DOCS_INSTALLED)
	$(BIN)/mkdocs build --strict

bench-stream: $(INSTALLED)
	$(BIN)/python benchmarks/stream.py $(BENCH) --json --only local wait remote growth

bench-peers: $(INSTALLED) $(PEERS)
	$(BIN)/python benchmarks/stream.py $(BENCH) --json --only peers

bench-teacher: $(INSTALLED)
	$(BIN)/python benchmarks/teacher.py $(BENCH) --json --device cpu

# Right first, then fast: the tests that want a GPU, then scripts that check what they time. The
# first wrong result ends it all; tables and JSON of those before it stay in benchmarks/results.
bench-gpu: $(INSTALLED)
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit( \
	  f"make: torch {torch.__version__} finds no CUDA device here, so nothing was measured; " \
	  "make bench-teacher measures the teacher on this CPU")'
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)
	@mkdir -p benchmarks/results; rm -f benchmarks/results/*; \
	measure() { \
	  printf '\n$$ python benchmarks/%s.py %s\n' "$$1" "$${*:2}"; \
	  $(BIN)/python benchmarks/$$1.py "$${@:2}" > benchmarks/results/$$1.txt; \
	  tail -n 1 benchmarks/results/$$1.txt > benchmarks/results/$$1.json; \
	  sed -i '$$d' benchmarks/results/$$1.txt; \
	  cat benchmarks/results/$$1.txt; \
	}; \
	measure teacher $(BENCH) --json --device cuda; \
	measure extract $(BENCH) --json --device cuda; \
	measure stream $(BENCH) --json --only local wait; \
	measure student $(BENCH) --json --device cuda; \
	measure online_vs_cached $(BENCH) --json --device cuda; \
	printf '\nThe tables above and their JSON lie in benchmarks/results\n'

# Loaders that cannot live together, or not with us. zarr-python 3.4 needs Python 3.12 or later;
# where there is none, `make bench-peers` goes on without that environment, and says so.
.venv-peers-%/.installed: benchmarks/peers/requirements-%.txt
	@python=; \
	case $* in zarr) lowest=12;; *) lowest=11;; esac; \
	for candidate in $(PEERS_PYTHON) python3.11 python3.12 python3.13 python3 \
	    $(wildcard $(HOME)/.pyenv/versions/3.1[123].*/bin/python3); do \
	  if [ -z "$$python" ] && "$$candidate" -c "import sys; sys.exit(not \
	      (3, $$lowest) <= sys.version_info[:2] <= (3, 13))" 2>/dev/null; then \
	    python="$$candidate"; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "make: the peers of $* need Python 3.$$lowest to 3.13; none was found: name it," \
	    "make bench-peers PEERS_PYTHON=/path/to/python3.12" >&2; \
	  exit 0; \
	fi; \
	"$$python" -m venv .venv-peers-$*; \
	.venv-peers-$*/bin/python -m pip install --quiet --requirement $<; \
	touch $@

# What was computed stays: caches and runs are removed by hand.
clean:
	rm -rf $(VENV) .venv-peers-* .fla build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis
