# make demo   train LeNet-5 on scikit-learn's digits, from a bare checkout
# make test   every test that needs no GPU, two at a time
# make lint   ruff and mypy
# make smoke36  interpreter and sm_90 tiers on Triton 3.6
# make soak   the long counts

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLD := .venv36
# Two processes of two threads each would wait for each other on two cores.
TWO := OMP_NUM_THREADS=1
# What is imported is compiled then; all of torch takes 14 s.
PIP := -m pip install -q --no-compile --disable-pip-version-check

.PHONY: demo test lint smoke36 soak clean

$(VENV)/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) torch==2.13.0
	$(BIN)/python $(PIP) -c constraints.txt -e ".[dev]"
	touch $@

$(OLD)/.stamp: pyproject.toml constraints-triton36.txt
	$(PYTHON) -m venv $(OLD)
	$(OLD)/bin/python $(PIP) torch==2.13.0
	$(OLD)/bin/python $(PIP) -c constraints-triton36.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.stamp
	$(BIN)/graphnet train lenet5 --data digits --augment digits --epochs 30 --batch 32 --lr 0.05 \
	    --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/.stamp
	$(TWO) $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

lint: $(VENV)/.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

smoke36: $(OLD)/.stamp
	$(TWO) $(OLD)/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow" $(addprefix tests/interp/test_,cases.py lowering.py \
	    build.py loading.py build_alexnet.py build_chunks.py build_wgrad_rows.py conv_rows.py linear.py)

soak: $(VENV)/.stamp
	$(BIN)/python -m pytest -q -m slow

clean:
	rm -rf $(VENV) $(OLD) build dist *.egg-info
