# Two commands: `make demo` and `make test`. Each sets up what it needs, in .venv, from this project's own files.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
TIMM := build/timm
# As many processes as cores, of one thread each; a file's tests stay together, for they share what they train.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses logical --dist loadfile

.PHONY: demo test slow test-timm lint types docs setup clean

demo: $(READY)
	$(VENV)/bin/python examples/demo.py --output demo

test: $(READY)
	$(PYTEST)

# Ray takes 240 MB, transformers 150, which torchmetrics then imports in every process: only the slow tests install them.
slow: $(READY)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[ray,transformers]'
	$(PYTEST) --slow -m slow --durations 25

# timm imports torchvision, beside which torchmetrics, and so training, cannot be imported where torch is for the CPU.
test-timm: $(TIMM)/.ready
	PYTHONPATH=tests $(TIMM)/bin/python -m pytest -p torchvision_operators --slow --durations 10 tests/test_pyramid.py \
		tests/test_timm.py 'tests/test_docs.py::test_python_blocks_run[timm.md]'

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(READY)
	$(VENV)/bin/mypy

# Strict: a warning is an error. The variable silences the theme's advertisement of its successor.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

setup: $(READY)

# torch first: what depends on it must find the pinned build, not choose one.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fitformer needs Python 3.11 or newer; set PYTHON=...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch numpy
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,gigapixel,features,compress,export,dev,docs]'
	touch $@

$(TIMM)/.ready: pyproject.toml constraints.txt
	test -x $(TIMM)/bin/python || $(PYTHON) -m venv $(TIMM)
	$(TIMM)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch numpy
	$(TIMM)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[timm]' segmentation_models_pytorch pytest
	touch $@

clean:
	rm -rf $(VENV) demo site build dist .pytest_cache .mypy_cache .ruff_cache
