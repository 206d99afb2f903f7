# Every target sets up what it needs first: .venv, the packages, the extension.
#
#   PYTHON         the interpreter .venv is made from, 3.10 or newer
#   TORCH          what pip installs as torch
#   CONSTRAINTS    the pinned versions; with another torch than theirs: CONSTRAINTS=/dev/null
#   OUT            where measurements go; CASE: which case make gpu-cases takes, by its name
#   TABLES         the launch rules that make gpu-tune measures; default all
#   BERT_FAST_EXT  0 without the compiled extension, 1 with it; default 1 where a compiler works

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)
CONSTRAINTS ?= constraints.txt
BERT_FAST_EXT ?= $(shell $(TRY_COMPILER) && echo 1 || echo 0)

BIN := .venv/bin
# The Python that measures: .venv's, or without .venv a $(PYTHON) that has torch, taken as it is, since
# a GPU machine may have no network to install from.
HAS_TORCH = import sys; from importlib.util import find_spec as f; sys.exit(not (f("torch") and f("triton")))
AS_IS := $(shell test ! -e $(BIN) && $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null && echo 1)
MEASURE := $(if $(AS_IS),$(PYTHON),$(BIN)/python) benchmarks/run.py
READY := $(if $(AS_IS),,.venv/.extension)
OUT ?= build/benchmarks
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := .venv/.installed
EXTENSION := .venv/.extension
SANITIZED := build/sanitize
# What runs csrc.
SANITIZED_TESTS = $(wildcard tests/test_extension*.py) $(patsubst %,tests/test_%.py,attention data_path \
	embedding gelu layer_norm linear optimizer ops_contract)
# As torch chooses it: $CXX, else c++ (make's own default for CXX is g++).
COMPILER := $(if $(filter default,$(origin CXX)),c++,$(CXX))
TRY_COMPILER = echo '\#include <Python.h>' | $(COMPILER) -fopenmp -fsyntax-only -x c++ \
	-I"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null)" - 2>/dev/null

ifneq ($(filter gpu-cases,$(MAKECMDGOALS)),)
$(if $(CASE),,$(error CASE: want a case, as in make gpu-cases CASE=3; make gpu-cases CASE='*' takes all))
endif

.PHONY: help test test-long aot-table mutants demo lint gpu gpu-cases gpu-proof test-gpu gpu-tune cpu-table ledger ext sanitize clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20
	@echo 'The first one that needs .venv makes it; `make -n test` shows how.'

test: $(EXTENSION)  ## run the tests, a process for each core
	$(BIN)/python -m pytest -n auto --dist loadfile

test-long: $(EXTENSION)  ## run the tests with full counts, which `make test` leaves out
	$(BIN)/python -m pytest -n auto --dist worksteal -m long

aot-table: $(INSTALLED)  ## compile every kernel for every GPU, write tests/aot_table.json
	$(BIN)/python tests/aot_runs.py

mutants: $(INSTALLED)  ## plant faults in copies of the checkout: each must make a test fail
	$(BIN)/python tests/mutate.py

demo: $(EXTENSION)  ## BERT-base on a page of English, checked and timed; a small BERT learns from a book
	$(BIN)/python benchmarks/demo.py
	$(BIN)/python benchmarks/demo_training.py

lint: $(INSTALLED)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

gpu: $(READY)  ## what a GPU machine can tell in under 9 minutes, into $(OUT)
	$(MEASURE) gpu --out $(OUT)

gpu-cases: $(READY)  ## one case of the targets against every peer and mode: make gpu-cases CASE=3
	$(MEASURE) all --device cuda --case '$(CASE)' --out $(OUT)

gpu-proof: $(READY)  ## the tests that run on the GPU, and NVIDIA's sanitizers over every op
	$(MEASURE) proof --out $(OUT)

test-gpu: gpu-proof  ## gpu-proof, under the name the other tests have

gpu-tune: $(READY)  ## better launch rules, printed: make gpu-tune TABLES="attention.SHORT gelu.FWD_TILES"
	$(MEASURE) tune $(TABLES) --out $(OUT)

cpu-table: $(READY)  ## ops, encoders and pre-training on the CPU beside their peers, about an hour
	$(MEASURE) all --device cpu --out $(OUT)

ledger: $(INSTALLED)  ## write what is said of benchmarks/results: its README and report, docs/performance.md, README.md
	$(BIN)/python benchmarks/ledger.py
	$(BIN)/python benchmarks/performance.py
	$(BIN)/python benchmarks/report.py benchmarks/results --out benchmarks/results/report

ext:  ## build the compiled extension again
	rm -f $(EXTENSION)
	$(MAKE) $(EXTENSION)

# Leaks are not counted: Python and PyTorch hold memory until they end. What cannot be allocated is an
# exception, as without sanitizers. Their libraries come first of all, and C++'s, whose throw they watch.
sanitize: $(INSTALLED)  ## run the tests of csrc on a build with the address and undefined behaviour sanitizers
	rm -rf $(SANITIZED)/bert_fast
	PATH="$(CURDIR)/$(BIN):$$PATH" BERT_FAST_SANITIZE=1 BERT_FAST_EXT=1 \
		$(BIN)/python setup.py -q build --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	LD_PRELOAD="$$(for name in asan ubsan stdc++; do $(COMPILER) -print-file-name=lib$$name.so; done | xargs)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
		PYTHONPATH=$(CURDIR)/$(SANITIZED) BERT_FAST_EXT=1 $(BIN)/pytest $(SANITIZED_TESTS)

clean:  ## remove what was built; .venv stays, for that: rm -rf .venv
	rm -rf build dist *.egg-info bert_fast/_C.*.so $(EXTENSION)
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks
	find bert_fast kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# The sizes are those of the pinned wheels for Linux on x86-64 with Python 3.11.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
		sys.exit(None if v >= (3, 10) else "want Python 3.10 or newer, got %d.%d" % v)'
	@echo 'Setting up .venv. On Linux x86-64 pip downloads, unless it has them already:'
	@echo '  2.5 GB   torch from PyPI with its CUDA libraries (the CPU build: 0.2 GB)'
	@echo '  0.2 GB   triton'
	@echo '  0.1 GB   everything else'
	@echo 'Without a GPU the CPU build is enough: choose it with TORCH, whose value goes to pip,'
	@echo "  make test TORCH='$(TORCH)+cpu --extra-index-url <the index of CPU builds, see pytorch.org>'"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -c $(CONSTRAINTS) --upgrade pip setuptools wheel ninja pybind11
	$(PIP) install -c $(CONSTRAINTS) $(TORCH)
	BERT_FAST_EXT=0 $(PIP) install -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	@touch $@

$(EXTENSION): $(INSTALLED) setup.py $(wildcard csrc/*.* csrc/*/*)
	@rm -f bert_fast/_C.*.so
	@if [ "$(BERT_FAST_EXT)" = 0 ]; then \
		echo 'Without the compiled extension: BERT_FAST_EXT=0, or $(COMPILER) cannot compile for Python'; \
	else \
		PATH="$(CURDIR)/$(BIN):$$PATH" BERT_FAST_EXT=$(BERT_FAST_EXT) \
			$(BIN)/python setup.py -q build_ext --inplace; \
	fi
	@touch $@
