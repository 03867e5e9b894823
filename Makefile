# Needs Python >= 3.10 and make; everything else goes into a virtual environment in this folder.
#   make test PYTHON=python3.12      another interpreter
#   make test VENV=                  no virtual environment: the packages that PYTHON already has
#   make test JOBS=8                 more test processes
#   make test-slow SHARE=4         of each slow test every fourth set of parameters
#   make steady RUNS=5             five runs of `make test` in place of twenty
#   make mutants MUTANTS="--sample 100 --seed 7"   some of them

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
SHARE ?= 1
RUNS ?= 20
SANITIZER ?= compute-sanitizer

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

PIP = -m pip install --quiet --disable-pip-version-check
TORCH = "$$(grep '^torch==' constraints.txt)"
PYTEST = -m pytest -q -n $(JOBS)
# Every access of every thread is followed: a few small calls of each kernel.
SANITIZED = \
	tests/test_forward.py::test_rows_without_keys_return_zero_and_minus_infinity \
	tests/test_forward.py::test_groups_of_query_heads_share_a_key_head \
	tests/test_backward.py::test_rows_without_keys_and_keys_without_rows_have_zero_gradients \
	tests/test_backward.py::test_a_key_head_gathers_the_gradients_of_its_group \
	tests/test_hopper_forward.py::test_rows_without_keys_return_zero_and_minus_infinity \
	tests/test_hopper_forward.py::test_groups_of_query_heads_share_a_key_head \
	tests/test_hopper_backward.py::test_rows_without_keys_have_no_gradient \
	tests/test_hopper_backward.py::test_a_key_head_gathers_the_gradients_of_its_group
# What tests the launchers, not interpreted.
HOSTS = $(wildcard tests/test_dispatch*.py tests/test_hopper_*.py tests/test_launch.py tests/test_plans.py tests/test_replays.py)
OLDER_NUMPY = 3.6.0 # Triton's interpreter there fails with NumPy 2.4
COMPAT = 3.6.0 3.9.0
HOPPER_COMPAT = 3.6.0 # what the Gluon kernels are compiled with besides the pinned Triton

.PHONY: help setup test test-slow test-integrations test-all test-gpu test-installs steady sanitize compat mutants coverage lint bench sweep build \
	release clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## the virtual environment alone

test: $(READY) ## the tests: kernels interpreted, then kernels compiled (about 10 minutes on two cores)
	TRITON_INTERPRET=1 $(PY) $(PYTEST) -m "not aot and not gpu and not slow and not integrations"
	$(PY) $(PYTEST) -m "aot and not slow"

test-slow: $(READY) ## what `make test` leaves out
	TRITON_INTERPRET=1 $(PY) $(PYTEST) --share $(SHARE) --ignore tests/test_installs.py -m "slow and not aot and not gpu"
	$(PY) $(PYTEST) --share $(SHARE) -m "slow and aot"

test-integrations: .venv-integrations/.ready ## other people's models: installs transformers, neuralforecast, ... (some 1 GB) beside
	.venv-integrations/bin/python $(PYTEST) -m integrations

test-installs: $(READY) ## wheel and sdist in clean environments of each Python there is, and without Triton
	$(PY) -m pytest -q tests/test_installs.py

test-all: test test-slow test-integrations test-installs ## all four

test-gpu: $(READY) ## the same tests on the GPU of this machine
	$(PY) -m pytest -q -m gpu

steady: $(READY) ## `make test` RUNS times in a row, each in another order; what became of them goes into tests/steady.json
	$(PY) -m tests.steady --runs $(RUNS) --jobs $(JOBS)

sanitize: $(READY) ## a few of them under NVIDIA's compute-sanitizer: stray accesses, races in shared memory
	@command -v $(SANITIZER) > /dev/null || { echo "no $(SANITIZER) here: it comes with CUDA; make sanitize SANITIZER=path"; exit 1; }
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool --error-exitcode 1 --target-processes all \
			$(PY) -m pytest -q -m gpu $(SANITIZED) || exit 1; \
	done

compat: $(COMPAT:%=compat-%) ## the interpreted kernel tests on other Tritons (Python >= 3.11)

compat-%: .venv-triton-%/.ready
	TRITON_INTERPRET=1 .venv-triton-$*/bin/python $(PYTEST) --share $(SHARE) -m "interpret and not gpu and not slow"
	$(if $(filter $*,$(HOPPER_COMPAT)),.venv-triton-$*/bin/python $(PYTEST) --share $(SHARE) -m "aot and not slow" tests/test_hopper_*.py)
	.venv-triton-$*/bin/python $(PYTEST) -m "aot and not slow" tests/test_compat.py

mutants: $(READY) ## the tests are tested: small changes to the kernels, each of which they must notice
	$(PY) -m tests.mutation.run --jobs $(JOBS) $(MUTANTS)

coverage: $(READY) ## every line of every kernel is reached by the interpreted tests
	rm -f .coverage .coverage.*
	TRITON_INTERPRET=1 $(PY) -m coverage run $(PYTEST) -m "interpret and not gpu and not slow"
	TRITON_INTERPRET=1 $(PY) -m coverage run $(PYTEST) -m "not interpret and not aot and not gpu and not slow" $(HOSTS)
	$(PY) -m coverage run $(PYTEST) -m "aot and not slow" $(HOSTS)
	$(PY) -m coverage combine --quiet
	$(PY) -m coverage report --include="kernels/*" --show-missing --fail-under=100 > tests/coverage.txt || { cat tests/coverage.txt; exit 1; }
	@cat tests/coverage.txt

lint: $(READY) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(READY) ## memory and throughput against sequence length, as a table and pictures
	$(PY) -m bench.run

sweep: $(READY) ## time the tile sizes on the GPU of this machine
	$(PY) -m flash.autotune.sweep

build: $(READY) ## an sdist, and a wheel made from it, in dist/
	rm -rf dist
	$(PY) -m build --quiet
	@ls dist

release: $(READY) ## what a release lacks, or how to tag and upload it; RELEASE=--checked leaves out .ci/run
	$(PY) -m tests.release $(RELEASE)

clean: ## remove the virtual environments, builds and caches
	rm -rf .venv .venv-integrations .venv-triton-* build dist .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: see constraints.txt.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	@echo "installing into $(VENV) (once)"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) $(PIP) $(TORCH)
	@$(PY) $(PIP) -c constraints.txt -e ".[bench,dev,test]"
	@touch $@

.venv-integrations/.ready: pyproject.toml constraints.txt constraints-integrations.txt
	@echo "installing into .venv-integrations (once)"
	@$(PYTHON) -m venv .venv-integrations
	@.venv-integrations/bin/python $(PIP) $(TORCH)
	@.venv-integrations/bin/python $(PIP) -c constraints.txt -c constraints-integrations.txt -e ".[bench,integrations,test]"
	@touch $@

# flash-triton itself is not installed here: torch's own pin of Triton would forbid the other one.
.venv-triton-%/.ready: constraints.txt
	@echo "installing Triton $* into .venv-triton-$* (once)"
	@$(PYTHON) -m venv .venv-triton-$*
	@sed -e '/^triton==/d' $(if $(filter $*,$(OLDER_NUMPY)),-e '/^numpy==/d') constraints.txt > .venv-triton-$*/constraints.txt
	@.venv-triton-$*/bin/python $(PIP) $(TORCH)
	@.venv-triton-$*/bin/python $(PIP) -c .venv-triton-$*/constraints.txt triton==$* "numpy$(if $(filter $*,$(OLDER_NUMPY)),<2.4)" \
		hypothesis pytest pytest-xdist
	@touch $@

.PRECIOUS: .venv-triton-%/.ready
