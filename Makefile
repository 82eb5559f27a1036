PYTHON ?= python3
VENV ?= .venv
CXX ?= g++
PYTEST_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
# Sources of the compiled kernels and of the emulators that test them.
CXX_SOURCES := find csrc tests benchmarks -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \)
BUILD_INPUTS := pyproject.toml constraints.txt setup.py CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

# The environment is its own: nothing from the caller's Python path or user site.
unexport PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE := 1

.PHONY: help setup demo test lint style bench wheel docs clean

help:
	@echo "make setup   virtual environment ($(VENV)) with pinned dependencies and the compiled kernels"
	@echo "make demo    the main job on the shipped model: pictures, table and numbers in demo/"
	@echo "make test    style checks and tests        (PYTEST_ARGS='-k linear' narrows them)"
	@echo "make style   fix what the formatters can fix"
	@echo "make bench   time of one UNet call on this machine (BENCH_ARGS=--record keeps the rows)"
	@echo "make wheel   source distribution and manylinux wheel in dist/, with the CUDA kernels where nvcc is"
	@echo "make docs    the documentation as a web site in build/site"
	@echo "make clean   remove the environment, the build, the wheel and the demo output"

setup: $(STAMP)

$(STAMP): $(BUILD_INPUTS)
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) was not found; install Python 3.10 or newer, or give one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than Python 3.10; give a newer one: make PYTHON=/path/to/python3"; exit 1; }
	@command -v $(CXX) >/dev/null || { echo "error: the C++ compiler '$(CXX)' was not found; install one (Debian, Ubuntu: apt install g++), or give one: make CXX=/path/to/c++"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs the package python3-venv"; exit 1; }
	@echo "setup: installing the pinned dependencies and building the kernels in $(VENV); this takes minutes the first time"
	$(BIN)/python -m pip install --quiet -c constraints.txt "setuptools>=70.1,<82" cmake ninja torch
	CXX=$(CXX) MODIFF_SKIP_BUILD=0 $(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

demo: setup
	$(BIN)/modiff compare --out demo
	@echo "demo: open demo/compare.html in a browser; its parts are compare.md, compare_grid.png and compare.json beside it"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(CXX_SOURCES) -exec $(BIN)/clang-format --dry-run -Werror {} +

test: lint wheel docs
	$(BIN)/python tools/check_wheel.py
	$(BIN)/python -m pytest $(PYTEST_ARGS)

style: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(CXX_SOURCES) -exec $(BIN)/clang-format -i {} +

bench: setup
	$(BIN)/python -m benchmarks steps $(BENCH_ARGS)

# torch brings its libraries: they are no part of the wheel. cibuildwheel would do the same in a container of an older Linux.
wheel: setup
	@rm -rf dist build/lib* build/bdist* build/wheel && mkdir -p build
	@CXX=$(CXX) MODIFF_SKIP_BUILD=0 sh -e -c ' \
	  $(BIN)/python -m build --no-isolation --sdist --outdir dist .; \
	  $(BIN)/python -m build --no-isolation --wheel --outdir build/wheel .; \
	  PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude "libtorch*" --exclude "libc10*" -w dist build/wheel/*.whl \
	' >build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }
	$(BIN)/twine check --strict dist/*

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/site

clean:
	rm -rf $(VENV) build dist demo modiff_kernels/_lib
