# make demo    an accelerated FasterNet on a photograph: same answers, a latency table and a chart
# make test    the C++ and the Python tests, without the long ones
# make bench   the speed of FasterNet T0 to L here and in other runtimes; 20 minutes on an idle machine of 2 cores
# All create .venv, install what is missing, and build. They need Python 3.10+, a C++17 compiler and make.
#
# make test-all   with the long tests          make test-cpp   csrc/ and its tests alone, without Python
# make test-sanitize  the tests of csrc/ under the address and undefined-behaviour sanitizers; minutes to compile
# make test-arm   csrc/ and its tests for AArch64 on an emulator (Debian packages g++-aarch64-linux-gnu, qemu-user)
# make count-arm  the instructions of one FasterNet-T0 forward on AArch64, appended to bench/results/arm/
# make cuda       csrc/cuda with nvcc, for what Triton cannot say; the rest works without
# make gpu        all there is to do on a machine with a CUDA GPU: tests, tuning, benchmarks; nothing is downloaded
# make docs       the website, in build/site   make lint       style checks
# make format     style fixes                  make clean
#
# Variables: PYTHON (interpreter that creates .venv), ARGS (options of `fasternet-kernels demo`, pytest or `python -m bench`), and TORCH:
# what pip installs where .venv has no torch of 2.10 or newer. pip's default may be a build for CUDA of several GB. For
# another build, add the index that PyTorch's installation page names for it, or give a wheel:
#     make demo TORCH='torch==2.13.0 --index-url INDEX_OF_CPU_BUILDS'
#     make demo TORCH=path/to/torch.whl

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
export PATH := $(CURDIR)/$(BIN):$(PATH)

# --no-deps where a package would otherwise choose a torch of its own.
BUILD_PACKAGES := 'setuptools>=77' 'pybind11>=2.13'
DEMO_PACKAGES := matplotlib pillow safetensors scikit-learn tqdm
# Triton's interpreter, which runs the GPU kernels in the tests, does not know numpy 2.4 yet.
TEST_PACKAGES := $(DEMO_PACKAGES) 'pytest>=8' pytest-xdist huggingface_hub pyyaml 'numpy<2.4'
TRITON := triton==3.6.0
TEST_PACKAGES_NO_DEPS := timm==1.0.30 torchvision==0.28.0
BENCH_PACKAGES := matplotlib MNN onnx onnxruntime openvino tqdm huggingface_hub pyyaml safetensors
DOCS_PACKAGES := 'mkdocs-material>=9.6' 'mkdocstrings[python]>=1.0'
WORKERS = -n $(JOBS) --dist worksteal
LINT_PACKAGES := ruff==0.17.6 clang-format==23.1.5

CPP_BUILD := build/cpp
SANITIZE_BUILD := build/sanitize
JOBS := $(shell getconf _NPROCESSORS_ONLN)

# The cross-compiler, the emulator, and where the emulated programs find their C library.
ARM_BUILD := build/arm
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_EMULATOR ?= qemu-aarch64
ARM_SYSROOT ?= /usr/aarch64-linux-gnu
# Code for each: compute capability 8.x runs sm_80's.
CUDA_LIBRARY ?= fasternet_kernels/_cuda.so
CUDA_TARGETS := -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a
NVCC ?= nvcc
NVCC_FLAGS := -std=c++17 -O3 -Werror all-warnings -Xptxas -v,-warn-spills \
  -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror -cudart static

CPP_SOURCES = $(shell find csrc python -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES := $(shell find csrc python -type f) CMakeLists.txt setup.py pyproject.toml

.NOTPARALLEL:  # with -j, several pips would write to .venv at once; what builds and tests is parallel by itself
.PHONY: demo test test-all test-cpp test-sanitize test-arm count-arm arm-tools bench cuda gpu docs lint format clean

demo: $(VENV)/stamp-build $(VENV)/stamp-demo
	$(BIN)/fasternet-kernels demo $(ARGS)

# The C++ tests are then built in setup.py's folder, where the kernels are compiled already.
test test-all: CPP_BUILD = $(shell $(BIN)/python -c 'import sys, sysconfig; \
  print(f"build/{sysconfig.get_platform()}-{sys.implementation.cache_tag}")')

test: $(VENV)/stamp-build test-cpp $(VENV)/stamp-test
	$(BIN)/python -m pytest $(WORKERS) -m 'not slow' $(ARGS)

test-all: $(VENV)/stamp-build test-cpp $(VENV)/stamp-test
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

test-cpp: $(VENV)/stamp-cmake
	cmake -S . -B $(CPP_BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release -DFASTERNET_BUILD_TESTS=ON
	cmake --build $(CPP_BUILD)
	ctest --test-dir $(CPP_BUILD) --output-on-failure --no-tests=error --parallel $(JOBS)

test-sanitize: $(VENV)/stamp-cmake
	cmake -S . -B $(SANITIZE_BUILD) -G Ninja -DFASTERNET_BUILD_TESTS=ON -DFASTERNET_SANITIZE=address,undefined
	cmake --build $(SANITIZE_BUILD)
	ctest --test-dir $(SANITIZE_BUILD) --output-on-failure --no-tests=error --parallel $(JOBS)

bench: $(VENV)/stamp-build $(VENV)/stamp-bench
	$(BIN)/python -m bench $(ARGS)

# With torch as it is installed, wherever python3 finds it: no environment is made and no package looked for.
gpu:
	$(PYTHON) -m bench.gpu $(ARGS)

cuda:
	$(NVCC) $(NVCC_FLAGS) $(CUDA_TARGETS) -shared csrc/cuda/pconv3x3_inplace.cu -o $(CUDA_LIBRARY)

# Reads sources and docstrings only: needs neither torch nor a build.
docs: $(VENV)/stamp-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The same tests as test-cpp, run on an emulator.
test-arm: arm-tools $(ARM_BUILD)/CMakeCache.txt
	cmake --build $(ARM_BUILD)
	ctest --test-dir $(ARM_BUILD) --output-on-failure --no-tests=error --parallel $(JOBS)

# The plugin that counts runs inside the emulator, so the host's compiler builds it.
count-arm: arm-tools $(ARM_BUILD)/CMakeCache.txt
	cmake --build $(ARM_BUILD) --target count_instructions
	$(CC) -O2 -shared -fPIC -o $(ARM_BUILD)/qemu_count.so csrc/tests/qemu_count.c
	$(PYTHON) csrc/tests/count_instructions.py $(ARM_BUILD) $(ARM_BUILD)/qemu_count.so \
	  bench/results/arm/instructions.csv $(ARM_EMULATOR) -L $(ARM_SYSROOT)

arm-tools:
	@for tool in $(ARM_CXX) $(ARM_EMULATOR); do \
	  command -v $$tool > /dev/null || { \
	    echo "$$tool is missing. On Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }; \
	done

$(ARM_BUILD)/CMakeCache.txt: $(VENV)/stamp-cmake CMakeLists.txt Makefile
	cmake -S . -B $(ARM_BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release -DFASTERNET_BUILD_TESTS=ON \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(ARM_CXX) \
	  "-DCMAKE_CROSSCOMPILING_EMULATOR=$(ARM_EMULATOR);-L;$(ARM_SYSROOT)"

lint: $(VENV)/stamp-lint
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CPP_SOURCES)

format: $(VENV)/stamp-lint
	ruff check --fix .
	ruff format .
	clang-format -i $(CPP_SOURCES)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache demo_output $(VENV)/stamp-build
	rm -f fasternet_kernels/_C.so fasternet_kernels/_cuda.so fasternet_runtime*.so

# ---- The environment: one stamp per step, so that a second call does nothing ------------------------------------------

$(VENV)/stamp-python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fasternet_kernels needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# CMake 3.20 for `ctest --test-dir`; a system CMake or Ninja is used where there is one.
$(VENV)/stamp-cmake: $(VENV)/stamp-python Makefile
	printf 'cmake_minimum_required(VERSION 3.20)\n' > $(VENV)/cmake-version.cmake
	cmake -P $(VENV)/cmake-version.cmake 2> /dev/null || $(PIP) 'cmake>=3.20'
	command -v ninja > /dev/null || $(PIP) ninja
	touch $@

$(VENV)/stamp-torch: $(VENV)/stamp-python Makefile
	$(BIN)/python -c 'import numpy' 2> /dev/null || $(PIP) numpy
	$(BIN)/python -c 'import torch; v = torch.__version__.split("."); exit((int(v[0]), int(v[1])) < (2, 10))' \
	  2> /dev/null || $(PIP) --upgrade $(TORCH)
	touch $@

$(VENV)/stamp-build: $(VENV)/stamp-cmake $(VENV)/stamp-torch $(SOURCES)
	$(PIP) $(BUILD_PACKAGES)
	$(PIP) --no-build-isolation --no-deps --editable .
	@$(BIN)/python -c 'from importlib.util import find_spec; exit(not find_spec("fasternet_runtime"))' || \
	  echo 'Warning: fasternet_runtime was not built; it needs the headers of Python (Python.h).' >&2
	touch $@

$(VENV)/stamp-demo: $(VENV)/stamp-torch
	$(PIP) $(DEMO_PACKAGES)
	touch $@

$(VENV)/stamp-test: $(VENV)/stamp-torch Makefile
	$(PIP) $(TEST_PACKAGES)
	$(PIP) --no-deps $(TEST_PACKAGES_NO_DEPS)
	$(BIN)/python -c 'import triton' 2> /dev/null || $(PIP) $(TRITON)  # a torch for CUDA brings its own
	touch $@

$(VENV)/stamp-bench: $(VENV)/stamp-torch
	$(PIP) $(BENCH_PACKAGES)
	$(PIP) --no-deps $(TEST_PACKAGES_NO_DEPS)
	touch $@

$(VENV)/stamp-docs: $(VENV)/stamp-python Makefile
	$(PIP) $(DOCS_PACKAGES)
	touch $@

$(VENV)/stamp-lint: $(VENV)/stamp-python Makefile
	$(PIP) $(LINT_PACKAGES)
	touch $@
