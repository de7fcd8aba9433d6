# `make demo` and `make test` do all their own set-up, in .venv. `make help` lists the rest.
# Every path is relative, so that a checkout may lie in a folder with spaces in its name.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo test lint style types layers format unit test-uvloop test-python test-long bench quota limits wire providers wall storm soak coverage check-wheel requirements clean setup

# Which interpreter makes .venv: `make PYTHON=python3.13 test` insists on one.
PYTHON ?=
# Which one `make test-python` adds.
VERSION ?= 3.13
BIN := .venv/bin
# The folder of the vendors' specifications, openai.yml and anthropic.yaml, which are not part of the project.
SPECS ?=
# How many processes share the tests, file by file, beginning with those that mostly wait (tests/conftest.py).
WORKERS ?= 2
SPREAD := -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0
# Only what is there: examples and benches are checked as soon as they exist.
CODE := $(wildcard src tests examples bench fuzz docs/*.py)
TYPED := $(wildcard src/llm tests examples bench fuzz docs/*.py)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:  ## say what there is to make
	@awk -F ':[^#]*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

demo: setup  ## the tour: every feature, against a simulator if no API key is in the environment
	@$(BIN)/python examples/llm_usage.py

# Everything is run and everything is told, also after a failure. Types are checked while the first tests wait, and told
# of at the end.
test: setup  ## all that must hold: style, types, layers, tests
	@types=$$(mktemp); trap 'rm -f "$$types"' EXIT; trap 'exit 130' INT; failed=0; \
	$(MAKE) --no-print-directory types >"$$types" 2>&1 & checking=$$!; \
	$(MAKE) --no-print-directory --keep-going style layers unit || failed=1; \
	wait $$checking || failed=1; \
	cat "$$types"; exit $$failed

lint: style types layers  ## all but the tests

style: setup
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: setup
	$(BIN)/mypy --strict $(TYPED)

layers: setup
	PYTHONPATH=src $(BIN)/lint-imports --no-logo --no-cache

unit: setup  ## the tests alone
	$(BIN)/python -m pytest $(SPREAD)

# uvloop sleeps where no signal wakes Python, hence the other way of ending what hangs. In one process, because a worker
# that is ended like that cannot tell the stacks.
test-uvloop: setup  ## the tests on uvloop in place of the standard event loop
	$(BIN)/python -m pytest --again --loop uvloop --timeout-method thread

# Beside the usual .venv. A version manager's shim runs only when it is told its version.
test-python:  ## the tests on another interpreter, in a .venv of its own: make test-python VERSION=3.13 (LOOP=uvloop)
	@set -e; \
	python=python$(VERSION); \
	if ! "$$python" -c '' >/dev/null 2>&1; then \
	  PYENV_VERSION=$$(pyenv latest "$(VERSION)" 2>/dev/null) || { echo "There is no Python $(VERSION) here."; exit 3; }; \
	  export PYENV_VERSION; \
	fi; \
	other=.venv-$(VERSION); \
	if ! [ $$other/.ready -nt requirements/dev.txt ]; then \
	  echo "Making $$other ..."; \
	  "$$python" -m venv --clear $$other; \
	  $$other/bin/python -m pip install --quiet --require-hashes --requirement requirements/dev.txt; \
	  $$other/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .; \
	  touch $$other/.ready; \
	fi; \
	$$other/bin/python -m pytest --again -p no:cacheprovider $(if $(LOOP),--loop $(LOOP) --timeout-method thread)

test-long: setup  ## the tests that take minutes of wall clock
	$(BIN)/python -m pytest -m long --timeout 600; status=$$?; [ $$status -eq 5 ] && exit 0; exit $$status

format: setup  ## put the code into the house style
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

coverage: setup  ## what each folder's own tests leave out, lines and branches
	$(BIN)/python tests/own_coverage.py

bench: setup  ## what a call costs
	$(BIN)/python bench/run.py

quota: setup  ## how much of the quota is used and how often a vendor says no, in virtual time
	$(BIN)/python bench/quota.py

limits: setup  ## what keeping the limits costs: the ledger, the layer, the wait answer, memory, those who wait
	$(BIN)/python bench/limits.py

wire: setup  ## whether what is sent and read is what the vendors specify: make wire SPECS=folder (needs npm)
	$(BIN)/python bench/wire.py "$(SPECS)"

providers: setup  ## write docs/providers.md from the table of models and from what the dialects do
	$(BIN)/python docs/providers.py

wall: setup  ## thirty faults over real sockets, with and without what protects from them
	PYTHONPATH=.:src $(BIN)/python -m tests.wall.run

storm: setup  ## a thousand callers whose primary fails for a minute: refusing, then silent (4 minutes)
	$(BIN)/python bench/storm.py refuse
	$(BIN)/python bench/storm.py silent

soak: setup  ## ten minutes of everything at once, and nothing may be left of it
	$(BIN)/python bench/soak.py

check-wheel: setup  ## build, install in a clean environment outside the checkout, run the demo from there
	@PYTHON="$(BIN)/python" sh requirements/check-wheel.sh

requirements:  ## pin requirements/dev.in anew, with hashes
	@set -e; $(FIND_PYTHON); \
	"$$python" -m venv .tools; \
	.tools/bin/python -m pip install --quiet pip-tools; \
	cd requirements; \
	../.tools/bin/pip-compile --quiet --upgrade --generate-hashes --strip-extras \
	  --no-header --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options \
	  --output-file dev.txt dev.in

clean:  ## remove .venv and all that was made
	rm -rf .venv .venv-* .tools build dist htmlcov .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find src tests examples bench fuzz -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# ---------------------------------------------------------------- set-up

# A name on the path may be an empty promise (a version manager's shim), so each candidate is asked to run.
define FIND_PYTHON
python=; \
for candidate in $(if $(PYTHON),"$(PYTHON)",python3 python3.14 python3.13 python3.12 python3.11); do \
  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python=$$candidate; break; fi; \
done; \
if [ -z "$$python" ]; then \
  echo "No Python 3.11 or later found (tried: $(if $(PYTHON),$(PYTHON),python3 python3.14 python3.13 python3.12 python3.11))." >&2; \
  echo "Install one, or name it: make PYTHON=/path/to/python3.11 test" >&2; \
  exit 1; \
fi
endef

setup: .venv/.ready

# A .venv that was moved or has lost its interpreter is made anew; any other is only brought up to date.
.venv/.ready: pyproject.toml requirements/dev.txt
	@set -e; \
	if ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	  $(FIND_PYTHON); \
	  echo "Making .venv with $$python ..."; \
	  "$$python" -m venv --clear .venv; \
	fi; \
	echo "Installing what requirements/dev.txt pins ..."; \
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements/dev.txt; \
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .; \
	touch $@
