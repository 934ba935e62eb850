# Nothing needs running first: every target sets up .venv if it is missing or out of date.
# `make setup EXTRAS=dev,cuda` on a GPU machine; `make setup PYTHON=/path/to/python3.12` to choose.

EXTRAS ?= dev
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(EXTRAS)
# Tests compile kernels for GPUs that are not here. JAX's CUDA plugin has a folder of its own, which
# only those compilations see: without a GPU it would print a traceback at every start of JAX.
AOT := $(if $(filter Linux,$(shell uname -s)),$(if $(findstring cuda,$(EXTRAS)),,$(VENV)/aot/.installed))

.PHONY: setup aot demo test test-all lint bench bench-cpu bench-all bars clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@ok() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }; \
	if ! ok $(BIN)/python; then \
	  for python in $(PYTHON) python3 python3.12 python3.13 \
	      "$$(uv python find '>=3.12' 2>/dev/null)" none; do \
	    if ok "$$python"; then break; fi; \
	  done; \
	  if [ "$$python" = none ]; then \
	    echo "jaxinfer needs Python 3.12 or later. python3 here is $$(python3 --version 2>&1)." >&2; \
	    echo "Install one (pyenv install 3.12, or uv python install 3.12), or name it:" >&2; \
	    echo "  make setup PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	  fi; \
	  "$$python" -m venv --clear $(VENV); \
	fi
	@# Byte code is made of what is imported, then: of everything it takes half a minute.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

aot: setup $(AOT)

$(VENV)/aot/.installed: constraints.txt | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --upgrade \
	  --target $(VENV)/aot -c constraints.txt \
	  jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm
	@touch $@

demo: setup
	$(BIN)/jaxinfer generate "def read_config(" --max-tokens 96 --temperature 0.7 --seed 2

# A file's tests share engines: one worker takes them all.
test: aot
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: aot
	$(BIN)/python -m pytest -n 2 --dist loadfile --slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Beside PyTorch engines, on one GPU; BENCH_TORCH_PYTHON names the interpreter that has torch.
MODEL ?= llama-3.2-1b
MINUTES ?= 7
bench: setup
	$(BIN)/python -m bench.compare --short --model $(MODEL) --minutes $(MINUTES) --readme

# The same harness on the demo model, in tiny sizes: whether it works, and no figure of note.
bench-cpu: setup
	$(BIN)/python -m bench.compare --smoke --out build/bench

# The engine's own figures: decode, start, parity, invariance.
bench-all: setup
	$(BIN)/python -m bench.all

bars: setup
	$(BIN)/python -m bench.bars

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
