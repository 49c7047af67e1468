# The README's two commands are `make demo` and `make test`; each creates .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled as they are imported: most never are, and compiling all takes a minute.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
INPUTS := pyproject.toml constraints.txt
# onnxruntime's wheels report usage to their maker otherwise.
export ORT_DISABLE_TELEMETRY := 1

.PHONY: demo test lint scale gpu-check gpu-driver clean

demo: $(VENV)/.demo
	mkdir -p build
	$(BIN)/neo-export -o build/demo-bundle --force
	$(BIN)/neo-generate build/demo-bundle "Once upon a time" --echo --max-new-tokens 120

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The checks on the published 1.3B shape: tens of minutes, 25 GB of disk. Writes build/scale-report.md.
scale: $(VENV)/.test
	mkdir -p build
	$(BIN)/python -m tests.scale --report build/scale-report.md

# On a machine with an NVIDIA GPU: the tests that need one, then neo-bench beside PyTorch on it.
# MODEL is the checkpoint to measure. Without a GPU it says so and fails.
GPU_VENV := .venv-gpu
gpu-check: gpu-driver $(GPU_VENV)/.ready
	$(GPU_VENV)/bin/python -m neo_tools.gpu_check $(MODEL) --output build/gpu

# Before gigabytes are installed for nothing.
gpu-driver:
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null || { \
	  echo "gpu-check: this machine has no NVIDIA driver (libcuda.so.1), so nothing was run;" \
	  "run it on a machine with a GPU (in a container: --gpus all)" >&2; exit 2; }

$(GPU_VENV)/.ready: $(INPUTS) | gpu-driver
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt --editable '.[gpu-check]'
	touch $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(INPUTS) | $(BIN)/python
	$(PIP) --editable '.[cpu,export]'
	touch $@

# torch first and alone, pinned: a looser requirement could bring another build, of gigabytes more.
$(VENV)/.test: $(INPUTS) | $(BIN)/python
	$(PIP) torch
	$(PIP) --editable '.[test]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) $(GPU_VENV) build .pytest_cache .mypy_cache .ruff_cache
