# Needs Python 3.11 or 3.12, pip and make; everything else is installed into .venv.
#
#   make quickstart   trains and shows configs/quickstart.py; ARGS="--config.train.num_steps=100"
#   make test         runs the tests; ARGS="tests/test_checkpoint.py -k damage", WORKERS=4
#   make test-all     runs the slow ones as well
#   make test-gpus    those that compile for described GPUs, which others skip (600 MB more)
#   make test-faults  kills, damages and hangs runs on purpose (part of test-all)
#   make check        style, types, directions of imports and the quick tests, in two minutes
#   make docs         builds docs/ into docs/_build/html; a warning is an error
#   make clean        removes .venv and build leftovers, never runs/
#
# PYTHON=/path/to/python chooses the interpreter, VENV=… another place for the environment.

VENV ?= .venv
WORKDIR ?= runs/quickstart
WORKERS ?= 2

SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
# The first that runs: a name on the PATH may be a version manager's shim that does not.
PYTHON ?= $(firstword $(foreach p,python3.12 python3.11 python3 python,$(if \
    $(shell $(p) -c '$(SUITABLE)' 2>/dev/null && echo yes),$(p))))

# A container's PYTHONDONTWRITEBYTECODE has every process compile TensorFlow's and JAX's sources anew:
# 13 s instead of 5 before anything is done, and the tests start dozens of processes.
unexport PYTHONDONTWRITEBYTECODE

# PyPI's torch for Linux brings 3 GB of CUDA libraries; the tests compare numbers on the CPU.
TORCH_INDEX := https://download.pytorch.org/whl/cpu

# For XLA on the CPU, set before Python starts: huge pages for its arena (3.25 -> 2.70 s a step
# of T5.1.1-small), matrix products left to the library one by one (3.2 -> 2.86 s). The flag is
# of this jaxlib: XLA aborts on one that it does not know, so look again when the pin moves.
MALLOC := glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0
MALLOC := $(MALLOC):glibc.malloc.trim_threshold=17179869184:glibc.malloc.arena_max=1
CPU_ENVIRONMENT := GLIBC_TUNABLES=$(MALLOC) XLA_FLAGS="$$XLA_FLAGS \
    --xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"

VENV_PYTHON := $(VENV)/bin/python
INSTALL := $(VENV_PYTHON) -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt

# Tests of seconds, of every floor: directions of imports, configs, the docs' commands, tables.
QUICK := tests/test_imports.py tests/test_config.py tests/test_tree.py tests/cost/test_tables.py \
    tests/cost/test_roofline.py tests/formats/test_mapping.py tests/formats/test_safetensors.py \
    tests/layers/test_masks.py tests/parallel/test_sharding.py tests/training/test_schedules.py \
    tests/training/test_metrics.py tests/test_docs.py

.PHONY: quickstart test test-all test-gpus test-faults check docs clean

quickstart: $(VENV)/cpu.stamp
	@$(CPU_ENVIRONMENT) $(VENV_PYTHON) -m t5x_lite.train \
	    --config=configs/quickstart.py --workdir=$(WORKDIR) $(ARGS)

test: $(VENV)/test.stamp
	@$(VENV_PYTHON) -m pytest -q -n $(WORKERS) --dist=loadfile $(ARGS)

test-all: $(VENV)/test.stamp
	@$(VENV_PYTHON) -m pytest -q -n $(WORKERS) --dist=loadfile -m '' $(ARGS)

test-gpus: $(VENV)/gpus.stamp
	@$(VENV_PYTHON) -m pytest -q -rs -n $(WORKERS) --dist=load -m '' tests/planning/test_gpus.py $(ARGS)

test-faults: $(VENV)/test.stamp
	@$(VENV_PYTHON) -m pytest -q -rP -n $(WORKERS) --dist=load -m '' tests/faults $(ARGS)

# Without TensorFlow, torch or a compilation: what a commit is checked by.
check: $(VENV)/check.stamp
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m mypy
	@$(VENV_PYTHON) -m pytest -q -n $(WORKERS) --dist=loadfile $(QUICK) $(ARGS)

docs: $(VENV)/docs.stamp
	@$(VENV_PYTHON) -m sphinx -q -W --keep-going -b html docs docs/_build/html $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache docs/_build

$(VENV)/cpu.stamp: setup.py constraints.txt | $(VENV_PYTHON)
	@echo "Installing t5x_lite[cpu] with its tested versions into $(VENV) (1 to 3 minutes)"
	@$(INSTALL) -e '.[cpu]'
	@touch $@

$(VENV)/test.stamp: setup.py constraints.txt | $(VENV_PYTHON)
	@echo "Installing t5x_lite and what its tests need into $(VENV) (2 to 5 minutes)"
	@$(INSTALL) $$($(VENV_PYTHON) -c "import urllib.request as r; \
	    r.urlopen('$(TORCH_INDEX)/torch/', timeout=5); \
	    print('--extra-index-url $(TORCH_INDEX)')" 2>/dev/null) -e '.[cpu,test,plan,audit,report]'
	@touch $@ $(VENV)/cpu.stamp

$(VENV)/gpus.stamp: $(VENV)/test.stamp
	@echo "Installing what compiles for GPUs that are described into $(VENV) (1 to 3 minutes)"
	@$(INSTALL) -e '.[cpu,test,plan_gpu]'
	@touch $@

$(VENV)/check.stamp: setup.py constraints.txt | $(VENV_PYTHON)
	@echo "Installing t5x_lite and what its checks need into $(VENV) (1 to 3 minutes)"
	@$(INSTALL) -e '.[cpu,check]'
	@touch $@ $(VENV)/cpu.stamp

$(VENV)/docs.stamp: setup.py constraints.txt | $(VENV_PYTHON)
	@echo "Installing t5x_lite and what its documentation needs into $(VENV) (1 to 3 minutes)"
	@$(INSTALL) -e '.[cpu,docs]'
	@touch $@ $(VENV)/cpu.stamp

# Some systems' Python has pip but not what `venv` copies it from: pip itself then fills the
# environment.
$(VENV_PYTHON):
	@if [ -z "$(PYTHON)" ]; then \
	    echo "make: found no Python 3.11 or 3.12 that runs; install one, or say" \
	         "make PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@if ! "$(PYTHON)" -c '$(SUITABLE)' 2>/dev/null; then \
	    echo "make: $(PYTHON) is $$("$(PYTHON)" --version 2>&1); t5x_lite needs Python 3.11 or" \
	         "3.12: make PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@"$(PYTHON)" -m venv $(VENV) >/dev/null 2>&1 \
	 || { "$(PYTHON)" -m venv --clear --without-pip $(VENV) \
	      && "$(PYTHON)" -m pip --python $(VENV_PYTHON) install -qq pip setuptools; } \
	 || { rm -rf $(VENV); echo "make: $(PYTHON) cannot make a virtual environment; install its" \
	      "venv module or pip" >&2; exit 1; }
