# One command each; `make` lists them. Everything is installed into .venv, at the versions of constraints.txt.

PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/ready
# the tests of a file stay together, as they share what was expensive to make; most of them wait for other processes
PARALLEL := -n 2 --dist loadfile
SAMPLES := $(basename $(notdir $(wildcard sample_runs/*.py)))

.DEFAULT_GOAL := help
.PHONY: help run test check bench docs sample-runs clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	@echo "Installing into .venv (about 2 minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e . --group dev
	@# without what they ask for: a torchvision built for another torch, which then breaks transformers
	@$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps curvlinops-for-pytorch backpack-for-pytorch hessian-eigenthings
	@touch $@

run: $(READY) ## Train two models that go wrong, recorded, and inspect both (30 s)
	@for name in modular_addition_collapse digits_input_jump; do \
		echo; echo "Training sample_runs/$$name.py …"; \
		$(BIN)/python sample_runs/$$name.py runs/$$name && $(BIN)/monitor inspect || exit; \
	done
	@echo; echo "The same in the browser:  $(BIN)/monitor dashboard runs"

test: $(READY) ## Run the tests (slow ones too: make test ARGS='-m ""')
	@$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

check: $(READY) ## What CI runs: format, lint, types, generated docs, tests
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright --warnings
	@$(BIN)/python -m monitor_cli.docs --check
	@$(BIN)/python -m pytest $(PARALLEL)

bench: $(READY) ## Measure the overhead on this machine
	@for file in tests/benchmarks/bench_*.py; do $(BIN)/python $$file || exit; done

docs: $(READY) ## Write METRICS.md, RULES.md and cli/README.md from the code
	@$(BIN)/python -m monitor_cli.docs

sample-runs: $(READY) ## Record the sample runs anew
	@for name in $(SAMPLES); do \
		rm -rf sample_runs/$$name && $(BIN)/python sample_runs/$$name.py sample_runs/$$name || exit; \
	done

clean: ## Remove .venv and caches; runs/ stays
	@rm -rf .venv .pytest_cache .ruff_cache .hypothesis dist build
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
