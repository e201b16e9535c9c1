# The version of torch the project is developed on. `make test TORCH=2.11.0` tests another one, in its own environment.
TORCH_PIN := 2.13.0
TORCH ?= $(TORCH_PIN)
# The Python (>= 3.11) that makes the environments.
PYTHON ?= python3

VENV := .venv$(if $(filter-out $(TORCH_PIN),$(TORCH)),-$(TORCH))
BIN := $(VENV)/bin
# Names the version of torch, so that a new pin installs it.
STAMP := $(VENV)/.installed-torch-$(TORCH)

# The environment of the trainers of the field.
STACKS := .venv-stacks$(if $(filter-out $(TORCH_PIN),$(TORCH)),-$(TORCH))
STACKS_STAMP := $(STACKS)/.installed-torch-$(TORCH)

# About half of the cases that make test runs, by time.
FIRST := $(patsubst %,tests/test_%.py,accumulation capture capture_once changing_sizes collectives conditions cost \
  counters cpu_products docs evaluations examples floats front_door inductor interplay loop_verifier low_parameters \
  memory_budget monitor native_steps odeint one_pass passes phase_log policy properties random refusals saved scaling \
  semantics stacks torchdiffeq torchdiffeq_compiled torchdiffeq_events_compiled typed)

# Where the wheel is tested: an environment of its own, and the source distribution without the packages.
WHEEL := build/wheel-test$(if $(filter-out $(TORCH_PIN),$(TORCH)),-$(TORCH))
INSTALLED := tests/installed.py $(patsubst %,tests/test_%.py,docs examples golden passes report tableau)

.DEFAULT_GOAL := help
.PHONY: help venv lint format test test-first test-rest test-all test-fast test-stacks doctest docs dist wheel-test demo clean

help: ## list the targets
	@echo "make TARGET [TORCH=$(TORCH_PIN)] [PYTHON=python3]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' Makefile

venv: $(STAMP) ## make the environment (.venv, or .venv-VERSION with TORCH=VERSION)

$(STAMP): EXTRAS := dev,docs,examples
$(STACKS_STAMP): EXTRAS := dev,stacks
$(STAMP) $(STACKS_STAMP): pyproject.toml
	$(PYTHON) -m venv $(@D)
	rm -f $(@D)/.installed-torch-*
	$(@D)/bin/python -m pip install torch==$(TORCH)
	$(@D)/bin/python -m pip install -e ".[$(EXTRAS)]"
	touch $@

lint: $(STAMP) ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p rampde_fx

format: $(STAMP) ## let ruff mend and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What of the cases runs, and how: make test-all sets it.
CASES := -m "not long"

test: lint ## lint, tests but long cases (Inductor needs a C++ compiler), doctests, docs; on two cores, one thread each
	OMP_NUM_THREADS=1 $(MAKE) --jobs=2 --keep-going test-first test-rest
	$(MAKE) doctest docs

test-all: ## as test, with all cases; writes down which of them are long
	$(MAKE) test CASES=--record-long

test-first: $(STAMP)
	$(BIN)/python -m pytest --durations=8 $(CASES) $(FIRST)

test-rest: $(STAMP)
	$(BIN)/python -m pytest --durations=8 $(CASES) $(filter-out $(FIRST),$(sort $(wildcard tests/test_*.py)))

test-fast: $(STAMP) ## the tests marked neither inductor nor slow
	$(BIN)/python -m pytest -m "not inductor and not slow"

test-stacks: $(STACKS_STAMP) ## train by Lightning, accelerate and the Hugging Face trainer, in an environment of their own
	OMP_NUM_THREADS=1 $(STACKS)/bin/python -m pytest tests/trainers.py

# Status 5: there is no doctest.
doctest: $(STAMP) ## the examples in the docstrings
	$(BIN)/python -m pytest --doctest-modules rampde_fx || [ $$? -eq 5 ]

docs: $(STAMP) ## build the documentation in build/docs; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going --fresh-env docs build/docs

dist: ## build the source distribution and the wheel into dist/ (pip installs build and twine for it)
	rm -rf dist build/dist-tools
	$(PYTHON) -m venv build/dist-tools
	build/dist-tools/bin/python -m pip install --quiet build twine
	build/dist-tools/bin/python -m build
	build/dist-tools/bin/python -m twine check --strict dist/*

wheel-test: dist ## test the wheel, installed in an environment of its own, outside of the source tree
	rm -rf $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL)/venv/bin/python -m pip install --quiet torch==$(TORCH)
	$(WHEEL)/venv/bin/python -m pip install --quiet "$$(echo dist/*.whl)[dev,examples]"
	tar -xzf dist/*.tar.gz -C $(WHEEL)
	cd $(WHEEL)/rampde_fx-* && rm -rf rampde_fx passes rampde_fx.egg-info
	cd $(WHEEL)/rampde_fx-* && OMP_NUM_THREADS=1 ../venv/bin/python -m pytest -m "not inductor and not slow" $(INSTALLED)

demo: export MPLBACKEND := Agg
demo: $(STAMP) ## train a flow in float32 and in the low dtype of this machine; about two minutes, one page
	$(BIN)/python examples/demo.py

clean: ## remove the environments, caches and outputs
	rm -rf .venv .venv-* build dist *.egg-info examples/out
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find rampde_fx passes tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
