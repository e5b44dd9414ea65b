# Every target sets up what it needs: on a bare machine `make demo` or `make test` is the only command.
#
#   make demo    fine-tune a small model through four tasks, with AdamW and with EPI (pictures in out/)
#   make test    the tests
#   make lint    ruff, clang-format, mypy
#   make format  let ruff and clang-format rewrite the files
#   make clean   remove everything that make made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.h csrc/*/* tests/*.cpp)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

# one torch thread for each of the worker processes
# and one process group more for Triton's interpreter, which is on or off for all of a process
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses auto

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
