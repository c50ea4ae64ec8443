# `make tour` and `make test` set up everything they need in .venv on a fresh machine with Python 3.11 or later.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: tour test coverage matrix update evaluate bench lint docs clean

tour: $(READY)
	$(BIN)/hf-iclr tour --out out/tour

# A file's tests share a worker, and with it what its fixtures made.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The same, and which lines of the library ran; fails below 90 %.
coverage: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov

# The contract tests under the oldest and the newest releases that are supported; TORCH=1 adds torch's, 15 GB.
matrix: $(READY)
	$(BIN)/python tests/matrix.py $(if $(TORCH),--torch)

# The newest and the oldest releases that pyproject.toml allows, then what they do.
update:
	$(PYTHON) requirements/renew.py
	$(MAKE) matrix

evaluate: $(READY)
	$(BIN)/python -m pytest -m slow
	$(MAKE) bench

# All of benchmarks/index.toml, one after the other, also after one that fails. `make bench BENCH_FLAGS=` runs them in full.
BENCH_FLAGS ?= --quick
bench: $(READY)
	@failed=; told=; for name in $$(sed -n 's/^\[\([a-z0-9_]*\)\]$$/\1/p' benchmarks/index.toml); do \
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

# The site, in out/site; warnings are errors.
docs: .cache/docs/.ready
	NO_MKDOCS_2_WARNING=1 .cache/docs/bin/mkdocs build

.cache/docs/.ready: requirements/docs.txt
	$(PYTHON) -m venv .cache/docs
	.cache/docs/bin/python -m pip install --quiet --require-hashes -r requirements/docs.txt
	touch $@

clean:
	rm -rf $(VENV) .cache/docs build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(READY): pyproject.toml requirements/lock.txt requirements/torch.txt
	$(PYTHON) requirements/set_up.py $(VENV)
	touch $@
