# make demo    run the whole method on the reference model and the embedded corpus
# make test    lint, types and tests
# Both set up .venv by themselves; they need python3 (3.11 to 3.13) and make. PYTHON=... chooses another interpreter.

PYTHON ?= python3
VENV ?= .venv
# Files in their own order: started in the order of how many tests they have, the few and long ones would come last.
PYTEST_FLAGS ?= -q -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not slow"

BIN := $(VENV)/bin
BASE := $(VENV)/.installed-base
TEST := $(VENV)/.installed-test
CODE := varjax models analysis profiling tuning experiments benchmarks examples tests

# Where the interpreter does not run (another machine's .venv, a Python gone), what was installed is void.
$(shell $(BIN)/python -c '' 2>/dev/null || rm -f $(BIN)/python $(BASE) $(TEST))

.DEFAULT_GOAL := help
.PHONY: help demo test slow lint format types docs notebooks reference gpu-check clean

help:
	@sed -n '1,2s/^# //p' Makefile
	@echo "make slow    the documented commands that take long, on small inputs (make test runs the others)"
	@echo "make lint    only ruff"
	@echo "make types   only mypy"
	@echo "make format  format and fix the code with ruff"
	@echo "make docs    build the documentation as HTML in build/site"
	@echo "make notebooks  run the notebooks of the documentation again"
	@echo "make reference  make the statistics, answers and policy of the reference model again (20 minutes)"
	@echo "make gpu-check  compile the decoder for an H100, without one, and check memory, copies and kernels"
	@echo "make clean   remove .venv and all caches"

demo: $(BASE)
	$(BIN)/python -m experiments.demo

test: lint types
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

slow: $(TEST)
	$(BIN)/python -m pytest -q -m slow

lint: $(TEST)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: $(TEST)
	$(BIN)/mypy

format: $(TEST)
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

docs: $(BASE)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/mkdocs build --strict --site-dir build/site

notebooks: $(BASE)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace docs/notebooks/*.ipynb

# Few keys and answers, so that the files stay small: documents of the build split, a policy chosen on the tune split.
reference: $(BASE)
	$(BIN)/python experiments/01_routing_analysis.py --num_samples 1500 --orders 1 2 --min_count 20 --max_keys 1500 \
	  --answer_min_count 20 --answer_gib 0.004 --trace_tokens 0 --output build/reference
	$(BIN)/python experiments/02_evaluate_var.py --mode var --routing_stats build/reference/routing_stats.parquet \
	  --search_policy --tune_samples 80 --num_samples 150 --no_throughput --output build/reference/policy.json
	cp build/reference/routing_stats.parquet build/reference/routing_stats.answers.safetensors models/reference
	$(BIN)/python -c 'from varjax.config import VARConfig; from varjax.tablefiles import TableFiles; \
	  VARConfig.load("build/reference/policy.var_config.json").save("models/reference/policy.var_config.json", \
	  TableFiles("routing_stats.parquet", "routing_stats.answers.safetensors"))'

# Of the CUDA packages only the compiler is needed, a tenth of what jax[cuda12] installs.
gpu-check:
	test -x build/gpu/bin/python || $(PYTHON) -m venv build/gpu
	build/gpu/bin/python -m pip install --quiet --editable '.[gpu-check]'
	build/gpu/bin/python -m benchmarks.cuda

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp older than pyproject.toml: the requirements may have changed; install again.
$(BASE): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[tuning]'
	@touch $@

$(TEST): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@ $(BASE)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "varjax needs Python 3.11, 3.12 or 3.13; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
