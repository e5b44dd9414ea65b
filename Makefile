# Every target sets up what it needs: on a bare machine `make demo` or `make test` is the only command.
#
#   make demo    fine-tune a small model through four tasks, with AdamW and with EPI (pictures in out/)
#   make test    the tests
#   make gpu     on a machine with a CUDA GPU: build, the tests that need one, then the benchmarks whatever the tests
#                did; results go to bench/results, or to RESULTS=<folder>. Parts: gpu-test, gpu-bench, gpu-sanitize
#   make deepspeed  install DeepSpeed into .venv, and the tests that need it
#   make lint    ruff, clang-format, mypy
#   make format  let ruff and clang-format rewrite the files
#   make clean   remove everything that make made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.h csrc/*/* tests/*.cpp)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test gpu gpu-build gpu-test gpu-bench gpu-sanitize deepspeed lint format clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

# one torch thread for each of the worker processes
# and one process group more for Triton's interpreter, which is on or off for all of a process
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses auto

# with the torch and triton that are there, in no environment of its own: a GPU machine may have no network
GPU_PYTHON ?= python3
RESULTS ?= bench/results
# a failed test takes no time on a GPU from the benchmarks: they run, and the exit status says both
gpu:
	@$(MAKE) --no-print-directory --keep-going --jobs=1 gpu-test gpu-bench

gpu-build:
	@$(GPU_PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu needs a CUDA GPU; torch sees none')"
	$(GPU_PYTHON) setup.py --quiet build_ext --inplace
	@mkdir -p "$(RESULTS)"

# the exit status of a pipe is that of pytest, not of tee
gpu-test gpu-sanitize: SHELL := bash
gpu-test gpu-sanitize: .SHELLFLAGS := -o pipefail -c
gpu-test: gpu-build
	$(GPU_PYTHON) -m pytest tests/test_gpu.py 2>&1 | tee "$(RESULTS)/gpu-test.log"

gpu-bench: gpu-build
	PYTHONPATH=. $(GPU_PYTHON) bench/gpu.py --json "$(RESULTS)"

gpu-sanitize: gpu-build
	$(GPU_PYTHON) -m pytest tests/test_gpu_sanitizer.py 2>&1 | tee "$(RESULTS)/gpu-sanitize.log"

# with the torch that is there: its own build environment would fetch another
deepspeed: $(VENV)/.test
	$(PIP) --quiet setuptools wheel
	DS_BUILD_OPS=0 $(PIP) --quiet --no-build-isolation deepspeed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_deepspeed.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# one stamp for each set of optional dependencies of pyproject.toml
$(VENV)/.demo: EXTRAS := demo
$(VENV)/.test: EXTRAS := demo,test
$(VENV)/.dev: EXTRAS := demo,test,dev
$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: Makefile constraints.txt pyproject.toml setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch and the tools into $(VENV) (once) ..."
	$(PIP) --quiet --editable '.[$(EXTRAS)]'
	@touch $@
