# What a person types. Each target sets up what it needs: an environment, torch, the compiled package.
PYTHON ?= python3
TORCH ?= 2.13.0
CUDA_TORCH ?= 2.11.0
LATEST_TORCH ?= 2.14.1
CUDA_ARCH ?= 9.0
OUT ?= build/gpu

VENV := .venv
CUDA_VENV := .venv-cuda
LATEST_VENV := .venv-latest
BIN := $(VENV)/bin
CUDA_BIN := $(CUDA_VENV)/bin
LATEST_BIN := $(LATEST_VENV)/bin
INSTALL := -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .

PACKAGE := setup.py pyproject.toml $(shell find batchnorm_ext csrc -name '*.py' -o -name '*.pyi' \
  -o -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

# What the kernels have a part in. Tests that compile, fork servers or watch the build have not.
EMULATED_TESTS := $(patsubst %,tests/test_%.py,activation batch_norm data_parallel derivatives distributed errors \
  fusion ghost mask memory mixed_precision modules numerics properties renorm running_statistics torch_samples torch_utilities)

.PHONY: help test demo bench lint format cpu-check portable emulate emulate-python cuda latest cuda-check gpu clean
help:
	@echo "make demo        train a network with nn.BatchNorm2d and with ours, side by side"
	@echo "make test        all tests, on the native module and on the pure-PyTorch path"
	@echo "make bench       benchmark against nn.BatchNorm2d"
	@echo "make lint        ruff, clang-format and mypy"
	@echo "make format      let ruff and clang-format rewrite the files"
	@echo "make cpu-check   run the CPU kernels without torch, on every instruction set"
	@echo "make portable    the same with Clang, and for 64-bit ARM in QEMU"
	@echo "make emulate     run the CUDA kernels on the CPU, under sanitizers"
	@echo "make emulate-python  run the Python tests on those kernels, as if they were the CPU's"
	@echo "make cuda        build for CUDA against torch $(CUDA_TORCH) and test what needs no GPU"
	@echo "make latest      test with torch $(LATEST_TORCH) and the libraries around it"
	@echo "make cuda-check  compile the CUDA kernels for all architectures and report spills"
	@echo "make gpu OUT=dir everything a machine with a GPU should run; results in dir"

# ---- environments -------------------------------------------------------------------------------

$(VENV)/requirements.stamp: requirements/dev.txt requirements/test.txt
	@echo "setting up $(VENV) with torch $(TORCH)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "python's venv module is missing; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet torch==$(TORCH) -r requirements/dev.txt
	@touch $@

$(VENV)/installed.stamp: $(VENV)/requirements.stamp $(PACKAGE)
	@echo "compiling and installing batchnorm_ext: minutes the first time, less when little changed"
	@$(BIN)/python $(INSTALL)
	@touch $@

$(CUDA_VENV)/requirements.stamp: requirements/test.txt
	@echo "setting up $(CUDA_VENV) with torch $(CUDA_TORCH)"
	@test -x $(CUDA_BIN)/python || $(PYTHON) -m venv $(CUDA_VENV)
	@$(CUDA_BIN)/python -m pip install --quiet torch==$(CUDA_TORCH) -r requirements/test.txt
	@touch $@

$(CUDA_VENV)/installed.stamp: $(CUDA_VENV)/requirements.stamp $(PACKAGE)
	@echo "compiling batchnorm_ext for CUDA, architecture $(CUDA_ARCH)"
	@FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$(CUDA_ARCH) $(CUDA_BIN)/python $(INSTALL)
	@touch $@

$(LATEST_VENV)/requirements.stamp: requirements/test.txt requirements/integrations.txt
	@echo "setting up $(LATEST_VENV) with torch $(LATEST_TORCH)"
	@test -x $(LATEST_BIN)/python || $(PYTHON) -m venv $(LATEST_VENV)
	@$(LATEST_BIN)/python -m pip install --quiet torch==$(LATEST_TORCH) \
	  -r requirements/test.txt -r requirements/integrations.txt
	@touch $@

$(LATEST_VENV)/installed.stamp: $(LATEST_VENV)/requirements.stamp $(PACKAGE)
	@echo "compiling batchnorm_ext for torch $(LATEST_TORCH) and CUDA, architecture $(CUDA_ARCH)"
	@FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$(CUDA_ARCH) $(LATEST_BIN)/python $(INSTALL)
	@touch $@

# ---- what they are for --------------------------------------------------------------------------

# pytest, not python -m pytest, which would put this folder before the installed package.
test: $(VENV)/installed.stamp
	BATCHNORM_EXT_BACKEND=prebuilt $(BIN)/pytest tests
	BATCHNORM_EXT_BACKEND=torch $(BIN)/pytest tests -m "not native"

demo: $(VENV)/installed.stamp
	$(BIN)/python -m benchmarks.demo

bench: $(VENV)/installed.stamp
	$(BIN)/python -m benchmarks

cpu-check portable emulate:
	$(MAKE) --no-print-directory -C tests/native $@

emulate-python: $(VENV)/requirements.stamp
	$(BIN)/python tests/native/cuda_module.py $(EMULATED_TESTS)

cuda: $(CUDA_VENV)/installed.stamp
	BATCHNORM_EXT_BACKEND=prebuilt $(CUDA_BIN)/pytest tests -m "not slow"

latest: $(LATEST_VENV)/installed.stamp
	BATCHNORM_EXT_BACKEND=prebuilt REQUIRE_LIBRARIES=1 $(LATEST_BIN)/pytest tests -m "not slow"

cuda-check:
	$(MAKE) --no-print-directory -C tests/native cuda-check PYTHON=$(PYTHON)

# For the interpreter at hand, which must have torch and pytest; no environment and no network.
gpu:
	$(PYTHON) -m benchmarks.gpu $(OUT) $(ARGS)

lint: $(VENV)/requirements.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/requirements.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf build dist batchnorm_ext.egg-info demo_output .pytest_cache .hypothesis .mypy_cache .ruff_cache
	rm -f $(VENV)/installed.stamp $(CUDA_VENV)/installed.stamp $(LATEST_VENV)/installed.stamp
