# `make engine` and `make test` do everything on a fresh machine; `make lint` is what CI runs before them.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
BUNDLE := build/bundle
CHUNK_BUNDLE := build/chunk
comma := ,

# What a build needs, and what tests, checks and measurements need beside. TensorRT-RTX wheels exist for Linux on x86-64
# alone, and CUDA is of use where there is a GPU; elsewhere the bundle is built without these engines.
BUILD_EXTRAS := export
TEST_EXTRAS := evidence,dev
ifeq ($(shell uname -sm),Linux x86_64)
BUILD_EXTRAS := $(BUILD_EXTRAS),tensorrt-rtx$(if $(wildcard /dev/nvidiactl),$(comma)gpu)
TEST_EXTRAS := gpu,$(TEST_EXTRAS)
endif

# Modules and the assertions of tests are compiled once, not by every process that tests start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: engine test quick mutants lint package benchmark time-c clean

engine: $(VENV)/built-with
	@echo "== building the embedded checkpoint into $(BUNDLE)"
	@$(RUN) export/build_engine.py --output $(BUNDLE) --overwrite
	@echo "== fitting chunk tokens to the embedded demonstrations, and building them into $(CHUNK_BUNDLE)"
	@$(RUN) export/build_engine.py --kind chunk --output $(CHUNK_BUNDLE) --overwrite

test: $(VENV)/installed
	@echo "== running all tests"
	@$(RUN) -m pytest -n auto --dist worksteal $(TEST_FLAGS)

# For work in between: what a few seconds can tell. `make test` decides.
quick: $(VENV)/installed
	@echo "== running the quick tests"
	@$(RUN) -m pytest -n auto --dist worksteal -m "not slow" $(TEST_FLAGS)

# What would the tests miss? All modules take an hour; MODULES=runtime/bundle/golden.py or SAMPLE=50 is for in between.
mutants: $(VENV)/installed
	@echo "== putting faults into the modules that safety rests on"
	@$(RUN) -m tests.mutants $(MODULES) $(if $(SAMPLE),--sample $(SAMPLE))

lint: $(VENV)/installed
	@echo "== checking format, style, types and arrows"
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy
	@PYTHONPATH=. $(VENV)/bin/lint-imports --no-cache

# What is installed elsewhere: with numpy alone, from any folder, beside a module of the user's that is called runtime.
BARE := build/bare
package: $(VENV)/installed
	@test -d $(BUNDLE) || { echo "there is no $(BUNDLE): build it with make engine" >&2; exit 2; }
	@echo "== building sdist and wheel, and decoding with the wheel in a bare environment"
	@rm -rf build/dist $(BARE)
	@$(RUN) -m build --outdir build/dist . >build/package.log || { tail -20 build/package.log >&2; exit 1; }
	@$(PYTHON) -m venv $(BARE)
	@$(BARE)/bin/pip install --quiet --disable-pip-version-check numpy
	@$(BARE)/bin/pip install --quiet --disable-pip-version-check --no-deps build/dist/*.whl
	@echo "raise ImportError('this is not rfsq')" >$(BARE)/runtime.py
	@cd $(BARE) && bin/rfsq selftest $(abspath $(BUNDLE)) --backend c
	@cp -rL $(BUNDLE) $(BARE)/bundle && cd $(BARE) && bin/rfsq build --from-bundle bundle

benchmark: engine
	@echo "== measuring $(BUNDLE)"
	@$(RUN) runtime/bench.py $(BUNDLE) --output build/bench --overwrite

# The generated C of a bundle, timed from C with the flags of its compiled engines, for the best level of this processor.
C_FLAGS := -std=c11 -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math
ifeq ($(shell uname -m),x86_64)
TIME_FLAGS ?= $(if $(shell grep -m1 avx512vl /proc/cpuinfo),-march=x86-64-v4,-march=x86-64-v3)
endif
TIME_PROGRAM ?= build/time_tokenizer

time-c:
	@test -f $(BUNDLE)/engines/c/rfsq_tokenizer.c || { echo "$(BUNDLE) has no engines/c: build it with make engine" >&2; exit 2; }
	@mkdir -p $(dir $(TIME_PROGRAM))
	@echo "== timing $(BUNDLE) with $(CC) $(C_FLAGS) $(TIME_FLAGS)"
	@$(CC) $(C_FLAGS) $(TIME_FLAGS) -Wall -Wextra -Wpedantic -I $(BUNDLE)/engines/c \
		examples/time_tokenizer.c $(BUNDLE)/engines/c/rfsq_tokenizer.c -o $(TIME_PROGRAM)
	@$(TIME_PROGRAM) $(STEPS)

$(VENV)/built-with: EXTRAS := $(BUILD_EXTRAS)
$(VENV)/installed: EXTRAS := $(BUILD_EXTRAS),$(TEST_EXTRAS)
# What is installed for the tests has what a build needs.
$(VENV)/built-with $(VENV)/installed: pyproject.toml constraints.txt
	@echo "== installing [$(EXTRAS)] into $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $(VENV)/built-with $@

clean:
	rm -rf $(VENV) build
