# Two commands do everything, set-up included:  make demo   make test
# Options:  PYTHON=python3.12                 the interpreter to build .venv with (3.11 to 3.13)
#           PIP_ARGS="--extra-index-url …"    given to pip, e.g. for PyTorch's small CPU-only wheels
#           ARGS="--text"                     given to the command that the target runs
#           JOBS=2                            processes that run tests; each that compiles has a compiling process beside it

VENV  := .venv
BIN   := $(VENV)/bin
JOBS  ?= 2
STAMP := $(VENV)/.installed
RUN   := env PATH="$(CURDIR)/$(BIN):$$PATH"

.DEFAULT_GOAL := help
.PHONY: help demo test fast lint types kernels nightly bench clean

help:
	@echo "make demo      grow a small network inside torch.compile, print what happened, draw it (ARGS=--text for the other one)"
	@echo "make test      the tests: fast, processes, property, compile and kernels lanes"
	@echo "make fast      only the tests that compile nothing"
	@echo "make lint      ruff: rules and format"
	@echo "make types     mypy --strict on the installed package"
	@echo "make kernels   compile all Triton kernels for four kinds of GPU, none of which need be here"
	@echo "make nightly   the long versions of the tests"
	@echo "make bench     the benchmarks (BENCH=swap for one of them)"
	@echo "make clean     remove .venv, caches and outputs"
	@echo "Each builds $(VENV) from pyproject.toml and constraints.txt when it is missing or older than they are."

# A virtual environment does not survive being moved: its scripts and the editable install hold absolute paths.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

# The first interpreter that really starts and is new enough: version managers leave shims behind that do neither.
$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	if [ -e $@ ] && [ "$$(cat $@)" != "$(CURDIR)" ]; then \
		echo "==> $(VENV) was built in another folder"; rm -rf $(VENV); \
	fi; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		found=; \
		for candidate in $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11 python); do \
			if $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then \
				found=$$candidate; break; \
			fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "make: no Python 3.11, 3.12 or 3.13 found$(if $(PYTHON), (asked for PYTHON=$(PYTHON)),). Install one, or name it: make PYTHON=/path/to/python3.12 …" >&2; \
			exit 1; \
		fi; \
		echo "==> Creating $(VENV) with $$($$found --version)"; \
		$$found -m venv --clear $(VENV) || { \
			echo "make: $$found cannot create a virtual environment (on Debian and Ubuntu: sudo apt install python3-venv python3-dev)." >&2; \
			rm -rf $(VENV); exit 1; \
		}; \
	fi; \
	echo "==> Installing esper_fx and its tools into $(VENV) (the first time this downloads PyTorch)"; \
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev]"; \
	echo "$(CURDIR)" > $@
	@echo "==> $(VENV) is ready"

demo: $(STAMP)
	@echo "==> esper-fx demo $(ARGS)"
	@$(RUN) esper-fx demo $(ARGS)

test: $(STAMP)
	@echo "==> Tests: fast, processes, property, compile and kernels lanes"
	@$(RUN) python -m pytest -n $(JOBS) --dist worksteal -m "not gpu and not nightly" $(ARGS)

fast: $(STAMP)
	@echo "==> Tests: fast lane"
	@$(RUN) python -m pytest tests/fast -n $(JOBS) --dist worksteal -m "not nightly" $(ARGS)

lint: $(STAMP)
	@echo "==> ruff check, ruff format --check"
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .

types: $(STAMP)
	@echo "==> mypy --strict"
	@rm -rf $(VENV)/types && $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(VENV)/types .
	@cd $(VENV)/types && MYPYPATH=. ../bin/mypy --config-file ../../pyproject.toml -p esper_fx

kernels: $(STAMP)
	@echo "==> esper-fx kernels build"
	@$(RUN) esper-fx kernels build --cache-dir build/kernels $(ARGS)

nightly: $(STAMP)
	@echo "==> Tests: everything, long versions"
	@$(RUN) python -m pytest -n $(JOBS) --dist worksteal -m "fast or property or compile or kernels or gpu or nightly" --hypothesis-profile=nightly $(ARGS)

bench: $(STAMP)
	@echo "==> python -m benchmarks $(if $(BENCH),$(BENCH),all) $(ARGS)"
	@$(RUN) python -m benchmarks $(if $(BENCH),$(BENCH),all) $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-output benchmarks/out
