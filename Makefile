# Two commands do all set-up: `make demo` runs the main job, `make test` passes the tests. See README.md.
#
#   make build    build/test, warnings as errors, native files placed in python/topk_attn
#   make lint     clang-format, ruff          make format   let them rewrite
#   make bench    benchmarks on this machine  make bench-gpu  all that needs a GPU: checks, tests, benchmarks
#   make clean    remove builds (not .venv)
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory

VENV := $(CURDIR)/.venv/bin
PY := $(VENV)/python
CMAKE := $(VENV)/cmake
JOBS = $(shell python3 cmake/backend/topk_build_env.py jobs)
CONFIGURE = $(CMAKE) -G Ninja -DCMAKE_MAKE_PROGRAM=$(VENV)/ninja -DPython_EXECUTABLE=$(PY)
export PYTHONPATH := $(CURDIR)/python
CXX_FILES = $(shell find csrc python trainer tests benchmarks \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) | sort)
# The demo builds CUDA kernels only where a GPU will run them.
GPU = $(shell nvidia-smi -L 2>/dev/null)
DEMO_ARGS ?=
PYTEST_ARGS ?=

.PHONY: help demo test build build-demo lint format bench bench-gpu clean ctest pytest

help:
	@sed -n '1,6s/^# \{0,1\}//p' Makefile

demo: build-demo
	$(PY) -m topk_attn.demo $(DEMO_ARGS)

# The order is cheap before dear: a formatting slip shows in seconds.
test:
	scripts/setup_env.sh test
	$(MAKE) lint
	$(MAKE) build
	$(MAKE) ctest
	$(PY) -m topk_attn.demo.download
	$(MAKE) pytest
	@echo "make test: all passed"

build:
	scripts/setup_env.sh test
	$(CONFIGURE) --preset test
	$(CMAKE) --build build/test --parallel $(JOBS) --target all inplace

build-demo:
	scripts/setup_env.sh demo
	$(CONFIGURE) --preset release $(if $(GPU),,-DTOPK_CUDA=OFF)
	$(CMAKE) --build build/release --parallel $(JOBS) --target inplace

ctest:
	$(VENV)/ctest --test-dir build/test --output-on-failure --no-tests=error

pytest:
	TOPK_BUILD_DIR=$(CURDIR)/build/test $(PY) -m pytest $(PYTEST_ARGS)

lint:
	@echo "clang-format --dry-run -Werror: $(words $(CXX_FILES)) files"
	@$(VENV)/clang-format --dry-run -Werror $(CXX_FILES)
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

format:
	scripts/setup_env.sh test
	@$(VENV)/clang-format -i $(CXX_FILES)
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .

bench: build-demo
	$(PY) benchmarks/cpu_attention.py

bench-gpu:
	scripts/gpu_check.sh

clean:
	rm -rf build dist python/*.egg-info python/topk_attn/lib python/topk_attn/bin python/topk_attn/include
	rm -f python/topk_attn/_C*.so python/topk_attn/_build_info.py
