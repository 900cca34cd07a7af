# Every command a developer or CI runs. Needs bash, make and a python3 (3.11 or newer) with venv; the rest is installed
# into virtual environments of the repository:
#   .venv             the project and, once a target needs them, the developer's tools
#   .venv-proto       code generation, kept apart (docs/adr/0004-generated-code-is-committed.md)
#   .venv-frameworks  sees what is in .venv, and adds the frameworks that `make frameworks` tests
#   .venv-peers       sees it too, and adds the peers of `make bench-peers`
# What is in them is written once, in pyproject.toml. Stamp files remember what has been installed, so that `make demo`
# on a fresh clone fetches only what the demo runs on and `make test` adds the rest.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
# Further arguments for pytest: make test ARGS='-m "not slow" tests/proto'
ARGS ?=
# Processes that run tests side by side, each with a server of its own.
JOBS ?= 2
IMAGE ?= optwire
# What the server's image computes on: cpu, cuda12 or cuda13.
VARIANT ?= cpu
# A stand-in for the official base image, such as an internal mirror's: make image BASE_IMAGE=...
BASE_IMAGE ?=
# What `make proto-breaking` compares the schema with.
AGAINST ?= origin/main

PY := .venv/bin/python
PIP := $(PY) -m pip -qq --disable-pip-version-check
# Prints one dependency group of pyproject.toml as a requirements file (pip itself reads groups from 25.1 on).
GROUP := import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"][sys.argv[1]], sep="\n")

PROTOS = $(sort $(wildcard proto/optwire_proto/v1/*.proto))
PROTOC = PATH="$(CURDIR)/.venv-proto/bin:$$PATH" .venv-proto/bin/python -m grpc_tools.protoc -Iproto
# mypy-protobuf types messages and stubs, so that its importers pass mypy --strict.
GENERATE = $(PROTOC) --python_out=$(1) --mypy_out=quiet:$(1) --grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) $(PROTOS)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# -- environments ----------------------------------------------------------------------------------------------------

.venv/bin/python .venv-proto/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"optwire needs Python 3.11 or newer; \
	{sys.executable} is {v[0]}.{v[1]}. Try: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv $(@D:/bin=) || { rm -rf $(@D:/bin=); exit 1; }

.venv/.demo: pyproject.toml | .venv/bin/python
	@echo "installing optwire with its server into .venv"
	@$(PIP) install -e '.[server,demo]'
	@touch $@

.venv/.dev: pyproject.toml .venv/.demo
	@echo "installing the developer's tools into .venv"
	@$(PY) -c '$(GROUP)' dev > .venv/dev.txt
	@$(PIP) install -r .venv/dev.txt
	@touch $@

.venv-proto/.ready: pyproject.toml | .venv-proto/bin/python
	@echo "installing the code generator into .venv-proto"
	@.venv-proto/bin/python -c '$(GROUP)' proto > .venv-proto/proto.txt
	@.venv-proto/bin/python -m pip -qq --disable-pip-version-check install -r .venv-proto/proto.txt
	@touch $@

.PHONY: setup
setup: .venv/.dev .venv-proto/.ready ## install all a developer needs, and the pre-commit hook
	@if [ -z "$${CI:-}" ] && git rev-parse --git-dir >/dev/null 2>&1; then .venv/bin/pre-commit install; fi

# torch.optim is an oracle of some tests and a client of an example; they skip themselves where it is not installed.
TORCH ?= torch>=2.6
.PHONY: torch
torch: .venv/.demo ## install PyTorch for the tests and examples that use it (TORCH=torch==2.13.0 picks a build)
	@$(PY) -c 'import torch' 2>/dev/null || $(PIP) install '$(TORCH)'

# The site-packages of .venv, optwire among them, are put behind its own.
.venv-frameworks/.ready: pyproject.toml .venv/.dev | torch
	@echo "installing the frameworks into .venv-frameworks"
	@$(PY) -m venv $(@D) || { rm -rf $(@D); exit 1; }
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	echo "import site; site.addsitedir('$$($(PY) -c "$$site")')" > "$$($(@D)/bin/python -c "$$site")/beside.pth"
	@$(PY) -c '$(GROUP)' frameworks > $(@D)/frameworks.txt
	@$(@D)/bin/python -m pip -qq --disable-pip-version-check install -r $(@D)/frameworks.txt
	@touch $@

# Whatever of the peers cannot be installed is left out of the benchmark, which says so.
.venv-peers/.ready: pyproject.toml .venv/.demo
	@echo "installing the peers into .venv-peers"
	@$(PY) -m venv $(@D) || { rm -rf $(@D); exit 1; }
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	echo "import site; site.addsitedir('$$($(PY) -c "$$site")')" > "$$($(@D)/bin/python -c "$$site")/beside.pth"
	@$(PY) -c '$(GROUP)' peers > $(@D)/peers.txt
	@while read -r peer; do \
	    $(@D)/bin/python -m pip -qq --disable-pip-version-check install "$$peer" || echo "left out: $$peer cannot be installed"; \
	done < $(@D)/peers.txt
	@touch $@

# -- run -------------------------------------------------------------------------------------------------------------

.PHONY: demo
demo: .venv/.demo ## train a small model against a server on this machine
	@$(PY) examples/demo.py

.PHONY: demo-torch
demo-torch: torch ## train a small transformer in PyTorch, with its optimizer on a server
	@$(PY) examples/demo_torch.py

.PHONY: examples
examples: .venv/.demo ## run every numbered example
	@for example in examples/[0-9]*.py; do \
	    [ -e "$$example" ] || { echo "no examples yet"; break; }; \
	    echo "-- $$example"; $(PY) "$$example"; \
	done

.PHONY: frameworks
frameworks: .venv-frameworks/.ready ## train with the frameworks of docs/frameworks.md, as examples/frameworks does
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-frameworks/bin/python -m pytest tests/frameworks $(ARGS)

# Arguments of `optwire bench step` that say what else than the usual is to be measured, and kept nowhere:
# make bench BENCH='--params 25M --rounds 21'
BENCH ?=
# Sizes that `make bench-again` measures: make bench-again SIZES=1k,100M
SIZES ?= 25M
comma := ,
CODECS = f32,bf16,f16,int8,top_k(0.01),sign
RESULT = $(if $(BENCH),$(BENCH),--json benchmarks/results/$(1).json)
.PHONY: bench
bench: .venv/.demo $(if $(BENCH),,torch) ## write benchmarks/results anew but for the peers; takes an hour (BENCH=--quick)
	@.venv/bin/optwire bench step $(call RESULT,step) $(if $(BENCH),,--plot docs/performance.png)
	@$(if $(BENCH),,.venv/bin/optwire bench step --params 1M --grads-codec '$(CODECS)' $(call RESULT,bytes))
	@$(if $(BENCH),,for kind in limits fairness cold; do echo; .venv/bin/optwire bench $$kind $(call RESULT,$$kind); done)
	@$(if $(BENCH),,$(PY) benchmarks/codecs.py $(call RESULT,codecs))
	@$(if $(BENCH),,$(PY) benchmarks/overlap.py --parameters 2000000 --rounds 15 $(call RESULT,overlap))

.PHONY: bench-again
bench-again: .venv/.demo ## measure the steps of some SIZES anew and keep the figures of the others
	@.venv/bin/optwire bench step --params '$(SIZES)' --update $(call RESULT,step) --plot docs/performance.png

PEER = .venv-peers/bin/python benchmarks/peers
.PHONY: bench-peers
bench-peers: .venv/.demo .venv-peers/.ready ## the same beside Ray, torch.distributed.rpc and Flower
	@.venv/bin/optwire bench step $(if $(BENCH),,--params 1M$(comma)25M) --against local $(call RESULT,peers) \
	--beside 'Ray actor=$(PEER)/ray_actor.py' --beside 'Flower=$(PEER)/flower.py' \
	--beside 'torch rpc=$(PEER)/torch_rpc.py' --beside 'torch rpc TCP=$(PEER)/torch_rpc.py tcp'

.PHONY: bench-workers
bench-workers: .venv/.demo .venv-peers/.ready ## several workers beside one and beside peers, and beside slow ones
	@.venv/bin/optwire bench workers $(call RESULT,workers) $(if $(BENCH),,--plot docs/workers.png) \
	--beside 'torch rpc=$(PEER)/torch_rpc.py' --beside 'torch rpc TCP=$(PEER)/torch_rpc.py tcp' \
	--beside 'Ray actor=$(PEER)/ray_actor.py'

.PHONY: image
image: ## build the container images $(IMAGE) and $(IMAGE)-client (VARIANT=cuda12 or cuda13: for NVIDIA's GPUs)
	@$(BUILD) --target client -t $(call CLIENT_OF,$(IMAGE)) .
	@$(BUILD) --target server --build-arg VARIANT=$(VARIANT) -t $(IMAGE) .
	@docker image ls --filter reference=$(IMAGE) --filter reference=$(call CLIENT_OF,$(IMAGE))

# optwire:1.2 becomes optwire-client:1.2; a colon before a slash is a registry's port.
CLIENT_OF = $(shell sed -E 's|(:[^:/]*)?$$|-client\1|' <<<'$(1)')
BUILD = docker build $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) \
	--build-arg VERSION=$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) \
	--build-arg REVISION=$(shell git rev-parse --verify --quiet HEAD 2>/dev/null)

.venv/.container: pyproject.toml .venv/.dev
	@$(PY) -c '$(GROUP)' container > .venv/container.txt
	@$(PIP) install -r .venv/container.txt
	@touch $@

.PHONY: test-image
test-image: .venv/.container ## build the images and test them in a container engine; .ci/engine starts one
	@$(PY) -m pytest tests/container $(ARGS)

# -- check -----------------------------------------------------------------------------------------------------------

.PHONY: check
check: static test ## the gate: everything a change must pass

.PHONY: test
test: .venv/.dev ## run the tests (ARGS='-m "not slow"' leaves the slow ones out)
	@$(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

.PHONY: static
static: lint types imports proto-check catalogue-check ## the gate without the tests

.PHONY: lint
lint: .venv/.dev ## formatting, lint rules, spelling
	@.venv/bin/ruff format --check --diff --quiet
	@.venv/bin/ruff check --quiet
	@.venv/bin/codespell

.PHONY: types
types: .venv/.dev ## mypy, strict
	@.venv/bin/mypy

.PHONY: imports
imports: .venv/.dev ## the architecture's import contracts
	@.venv/bin/lint-imports

.PHONY: fmt
fmt: .venv/.dev ## format the code and fix what a tool can fix
	@.venv/bin/ruff check --fix --quiet || true
	@.venv/bin/ruff format --quiet

# -- protocol --------------------------------------------------------------------------------------------------------

.PHONY: proto
proto: .venv-proto/.ready ## regenerate the code of proto/optwire_proto/v1
	@.venv-proto/bin/buf format -w proto
	@$(call GENERATE,proto)

.PHONY: proto-check
proto-check: .venv-proto/.ready ## is the schema sound, and the committed code what it generates?
	@.venv-proto/bin/buf lint proto
	@.venv-proto/bin/buf format -d --exit-code proto
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && $(call GENERATE,"$$fresh") && \
	diff -ru -x '*.proto' -x __init__.py -x __pycache__ proto/optwire_proto/v1 "$$fresh/optwire_proto/v1" || \
	{ echo "the committed code is stale: run 'make proto'" >&2; exit 1; }

.PHONY: catalogue
catalogue: .venv/.dev ## read optax's signatures anew, into the copy that clients use
	@$(PY) -W ignore -m optwire_server.engine.signatures > .venv/optax_entries.py
	@mv .venv/optax_entries.py proto/optwire_proto/optax_entries.py

.PHONY: catalogue-docs
catalogue-docs: .venv/.dev ## measure every entry of the catalogue and write docs/catalogue.md; takes minutes
	@$(PY) -m tests.e2e.catalogue_table

.PHONY: catalogue-check
catalogue-check: .venv/.dev ## does that copy say what the installed optax says?
	@here=$$($(PY) -c 'import optax; print(optax.__version__)') && \
	copy=$$($(PY) -c 'from optwire_proto import optax_entries; print(optax_entries.OPTAX_VERSION)') && \
	if [ "$$here" != "$$copy" ]; then echo "skipped: optax $$here is installed, the copy is of $$copy"; exit 0; fi && \
	$(PY) -W ignore -m optwire_server.engine.signatures | diff -u proto/optwire_proto/optax_entries.py - || \
	{ echo "the copy of optax's signatures is stale: run 'make catalogue'" >&2; exit 1; }

.PHONY: proto-breaking
proto-breaking: .venv-proto/.ready ## does the schema break clients of AGAINST (origin/main)?
	@.venv-proto/bin/buf breaking proto --against '.git#ref=$(AGAINST),subdir=proto'

.PHONY: clean
clean: ## remove the environments and every cache
	rm -rf .venv .venv-proto .venv-frameworks .venv-peers build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
