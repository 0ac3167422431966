# Every target works as the first command on a fresh clone: `setup` fills .venv when it must.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PY := .venv/bin/python
UV := $(shell command -v uv || echo .uv/bin/uv)
ARGS ?=

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.done ## Install everything into .venv (compiles llama.cpp once: about 5 minutes)

.venv/.done: pyproject.toml uv.lock
	@[ -x "$(UV)" ] || (python3 -m venv .uv && .uv/bin/pip install --quiet uv)
	@echo "Installing into .venv; the first time, llama.cpp is compiled: about 5 minutes on 2 cores."
	$(UV) sync --frozen --quiet --inexact --extra all
	@touch $@

run: setup ## Start everything with the demo model: http://127.0.0.1:8080 (ARGS="--port 9000 ...")
	@.venv/bin/caravan up $(ARGS)

chat: setup ## Talk to what `make run` started
	@.venv/bin/caravan chat $(ARGS)

test: setup ## Run all tests: unit, contract, simulation, end to end (ARGS="-k name")
	$(PY) -m pytest -m "not soak" $(ARGS)

soak: setup ## Run the long tests: deaths and restarts under load (about half an hour)
	$(PY) -m pytest -m soak $(ARGS)

check: setup ## Lint, types, protos, generated code, module boundaries, tidiness
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/buf lint
	.venv/bin/buf format --diff --exit-code
	@git rev-parse --quiet --verify main >/dev/null || { echo "no branch main to compare protos with"; exit 1; }
	.venv/bin/buf breaking --against '.git#branch=main'
	$(PY) protos/generate.py --check
	.venv/bin/lint-imports
	$(PY) -m pytest -q tests/unit/test_tidy.py

proto: setup ## Generate gen/ and Envoy's descriptors from protos/
	$(PY) protos/generate.py

model: setup ## Train the demo model again, export and evaluate it (hours)
	$(UV) sync --frozen --quiet --inexact --extra all --group train
	$(PY) -m models.train && $(PY) -m models.export && $(PY) -m models.evaluate

bench: setup ## Measure every figure of bench/RESULTS.md (about 20 minutes, quiet machine)
	$(UV) sync --frozen --quiet --inexact --extra all --group bench
	$(PY) -m bench $(ARGS)

clean: ## Remove what can be made again
	rm -rf .venv .uv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

.PHONY: help setup run chat test soak check proto model bench clean
