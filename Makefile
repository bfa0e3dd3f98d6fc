# make quickstart   train one small GPT under six recipes and compare them (10 minutes, 2 cores)
# make test         lint, type-check and test, as continuous integration does
# make lint         ruff and mypy only
# make clean        remove the virtual environment, caches and build products; runs/ is kept
#
# Everything is installed into $(VENV), with Python 3.11 or newer (PYTHON=python3.12, say). TORCH is
# installed first; pip gets it as it is, so it can name any build, for instance TORCH="torch==2.11.0".
# On Linux the default may be a CUDA build of several GB: TORCH="torch==2.13.0+cpu" takes a CPU-only
# one if pip is configured with an index that has it. Leave TORCH empty to keep the torch that $(VENV)
# already has. Further options of the comparison go into ARGS, for instance ARGS="--train.steps 100".

PYTHON  ?= python3
VENV    ?= .venv
TORCH   ?= torch==2.13.0
RECIPES ?= bf16,mxfp4,mxfp4-rtn,fp4,dqt8,bitnet
OUT     ?= runs/quickstart
JOBS    ?= 2
ARGS    ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The stamp's name holds a checksum of TORCH, so that another build is installed when asked for.
TORCH_STAMP := $(VENV)/.torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test lint clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$$($(PYTHON) --version) is too old: megafp4 needs 3.11 or newer; run make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(TORCH_STAMP): $(VENV)/.python
	@rm -f $(VENV)/.torch-*
	$(if $(strip $(TORCH)),$(PIP) install $(TORCH) numpy)
	@touch $@

$(VENV)/.report $(VENV)/.dev: $(VENV)/.%: $(TORCH_STAMP) pyproject.toml
	$(PIP) install --quiet --editable '.[$*]'
	@touch $@

quickstart: $(VENV)/.report
	$(BIN)/megafp4 compare gpt-tiny --recipes $(RECIPES) --jobs $(JOBS) --out $(OUT) \
	  --train.eval-interval 50 --train.stats-interval 100 --train.checkpoint-interval 100 $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread per worker: the tests are many and small.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
