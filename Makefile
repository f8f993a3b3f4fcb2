# Everything a person or CI runs. Each target installs what it misses into .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help

MODEL ?=
PORT ?=
STATE_DIR ?=
PARTS ?=
ARGS ?=
up_options = $(if $(MODEL),--model '$(MODEL)') $(if $(PORT),--port $(PORT)) $(if $(STATE_DIR),--state-dir '$(STATE_DIR)') $(ARGS)

.PHONY: help
help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.PHONY: setup
setup: ## Install what Kiln runs on into .venv (part of up and demo)
	@scripts/install.sh

.PHONY: setup-dev
setup-dev:
	@scripts/install.sh dev

.PHONY: up
up: setup ## Run everything; MODEL=<folder or hub id> PORT=8420 STATE_DIR=… choose
	@exec .venv/bin/kiln up $(up_options)

.PHONY: demo
demo: setup ## Run the whole loop once by itself: serve, score, train, hot-swap
	@exec .venv/bin/kiln demo $(ARGS)

# The tests start some hundreds of processes. Where the environment forbids bytecode each would compile all of
# torch anew, two seconds of a processor; here the first one's is kept, and nothing beside the sources.
test test-options test-gpu: export PYTHONDONTWRITEBYTECODE :=
test test-options test-gpu: export PYTHONPYCACHEPREFIX := $(CURDIR)/.venv/bytecode

.PHONY: test
test: setup-dev check ## Check the code and run all tests that need no GPU
	scripts/install_browser.sh
	.venv/bin/python -m pytest -n 2 --dist loadfile --ignore tests/e2e --ignore tests/chaos $(ARGS)
	.venv/bin/python -m pytest -n 2 --dist loadfile tests/e2e $(ARGS)
	.venv/bin/python -m pytest tests/chaos $(ARGS)

.PHONY: test-options
test-options: setup-dev ## Run the tests of decoding with speculation and on quantised weights
	scripts/test_options.sh $(ARGS)

.PHONY: test-gpu
test-gpu: setup-dev ## Run the tests that need a CUDA device
	.venv/bin/python -m pytest -m gpu $(ARGS)

.PHONY: bench
bench: setup-dev ## Measure everything on a GPU host; PARTS="decode waves" chooses
	.venv/bin/python -m benchmarks $(PARTS) $(ARGS)

.PHONY: check
check: setup-dev ## Lint, types, import contracts, generated code, compose file and Dockerfiles
	@scripts/check.sh

.PHONY: format
format: setup-dev ## Format the code
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.PHONY: protos
protos: setup-dev ## Regenerate the protobuf code
	scripts/generate_protos.sh

.PHONY: dashboard
dashboard: ## Build the dashboard into the gateway's package (needs node)
	scripts/build_dashboard.sh

.PHONY: docs
docs: setup-dev ## Regenerate the pages of docs/ that come from code, and the blocking client
	.venv/bin/python scripts/generate_sync_client.py
	.venv/bin/python scripts/generate_docs.py
	KILN_WRITE_DOCS=1 .venv/bin/python -m pytest -q tests/conformance/test_openai_fields.py

.PHONY: lock
lock: setup-dev ## Pin the newest versions that fit together
	scripts/lock_requirements.sh

.PHONY: clean
clean: ## Remove what the targets above made
	rm -rf services/gateway/dashboard/node_modules .venv .venv-protos .venv-torch-free .venv-clients .pytest_cache .mypy_cache .ruff_cache .hypothesis
