# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed
OUT    ?= demo-report
# two processes of one thread each use a small machine better than one process of two threads
export OMP_NUM_THREADS ?= 1

# studies that `make results` runs again, or goes on with; empty: all of them; `opentrans study` lists them
STUDIES ?=
SEEDS   ?= 5

# tests of `make check`: those that take seconds
FAST ?= tests/test_style.py tests/test_help.py tests/test_architecture.py

.PHONY: help install hooks demo check style types test docs check-notebooks results gpu gpu-bundle gpu-check clean
help:
	@echo "make demo   photographs, and the paper at toy scale: one HTML report and one JSON in $(OUT)/"
	@echo "make check  two minutes: lines, types, export up to date, fast tests"
	@echo "make test   lines, export up to date, notebooks clean, all notebooks, all tests"
	@echo "make results  the studies of 'opentrans study' in docs/results/ (hours; STUDIES='losses ratio' for some; goes on where it was)"
	@echo "make docs   the pages as a site with search, in _docs/"
	@echo "make gpu    the heavy notebook cells, on a machine with a CUDA device"
	@echo "make gpu-bundle  wheels for a GPU machine that has torch, torchvision, timm and transformers, and no network"
	@echo "make gpu-check   what a GPU must show, in eight minutes (ARGS='--device cpu --tiny' without one)"

install: $(STAMP) hooks

# the hooks of .pre-commit-config.yaml, in a clone of git alone; they are programs of the environment, and need no network
hooks: $(STAMP)
	@! git -C '$(CURDIR)' rev-parse --git-dir >/dev/null 2>&1 || $(BIN)/pre-commit install >/dev/null \
	|| echo "the hooks of .pre-commit-config.yaml are not installed; run '$(BIN)/pre-commit install' to see why"

$(STAMP): settings.ini setup.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "opentrans needs Python 3.10 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade >/dev/null
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/opentrans demo --scheduler processes --out $(OUT) $(ARGS)

check: style types check-notebooks
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(FAST)

style: $(STAMP)
	$(BIN)/python tests/check_style.py

types: $(STAMP)
	$(BIN)/python tests/check_types.py

# many tests start a process, which is to find the package compiled, even where Python may not write what it compiles
test: style check-notebooks
	$(BIN)/python -m compileall -q opentrans
	IN_TEST=1 $(BIN)/nbdev_test --n_workers 2 --do_print
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests

check-notebooks: $(STAMP)
	$(BIN)/python tests/check_notebooks.py

docs: $(STAMP)
	$(BIN)/python docs/site.py

results: $(STAMP)
	for s in $(or $(STUDIES),--all); do $(BIN)/opentrans study $$s --seeds $(SEEDS) --scheduler processes --out docs/results || exit 1; done

gpu: $(STAMP)
	$(BIN)/nbdev_test --n_workers 1 --flags 'gpu slow' --do_print --timing

gpu-bundle: $(STAMP)
	$(BIN)/python benchmarks/gpu_bundle.py gpu-bundle

# without the virtual environment, where the machine has none: what it lacks comes from gpu-bundle/
gpu-check:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu_check.py $(ARGS)

clean:
	rm -rf build *.egg-info _docs _proc $(OUT)
