# `make demo` and `make test` need Python >= 3.11 and a package index, nothing else: they make .venv themselves.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TESTS ?= tests
# one process for each core; the tests of a file stay together and share what they made
PYTEST = $(BIN)/python -m pytest -q -n auto --dist loadfile

.PHONY: demo test test-slow parity campaign lint clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test,small]'
	touch $@

# PyTorch is wanted by the parity tests alone; the pin keeps a CPU build where one is offered
$(VENV)/parity: $(VENV)/installed
	$(BIN)/python -m pip install --quiet 'torch==2.13.0'
	touch $@

demo: $(VENV)/installed
	$(BIN)/fmda demo

test: $(VENV)/installed
	$(PYTEST) -m 'not slow and not parity' $(TESTS)

parity: $(VENV)/parity
	$(PYTEST) -m 'parity'

# the accelerator runs of benchmarks/campaign.py on very small networks, without those whose programs the tests run
campaign: $(VENV)/parity
	$(BIN)/python benchmarks/campaign.py speed --tiny --only daformer-step attention clip-dense-b16 world-speed \
		--out build/campaign
	$(BIN)/python benchmarks/campaign.py assets --tiny --only street-clip --out build/campaign

# in the order of conftest.py, the longest first
test-slow: $(VENV)/installed
	$(PYTEST) --no-loadscope-reorder -m 'slow and not parity'

lint: $(VENV)/installed
	$(BIN)/ruff check fmda tests benchmarks
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .cache *.egg-info
