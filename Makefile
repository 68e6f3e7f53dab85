# Everything a user or contributor runs. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash

.DEFAULT_GOAL := help
.PHONY: help install dev ci lint format test ci coverage generate docs FORCE wheel quickstart text-to-sql-demo images sbom test-images test-cluster package bench lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { gsub(/[$$][$$]/, "$$", $$2); printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## virtual environment with the locked dependencies

dev: $(VENV)/.dev ## the same with what tests and linters need

# uv installs in half a minute what takes pip three; pip is the way where uv cannot reach the index.
define install_from
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r $(1) \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(1)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable . \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
endef

$(VENV)/.installed: requirements.txt requirements-uv.txt pyproject.toml
	$(call install_from,requirements.txt)
	touch $@

$(VENV)/.dev: requirements-dev.txt requirements-uv.txt pyproject.toml
	$(call install_from,requirements-dev.txt)
	touch $@ $(VENV)/.installed

lint: dev ## ruff, formatting, types, Dockerfiles, shell, YAML
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/*/Dockerfile stages/*/Dockerfile
	$(BIN)/shellcheck .ci/run bench/*.sh docker/dependencies/*.sh
	$(BIN)/yamllint --strict .

format: dev ## rewrite the sources as ruff formats them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# They compare this process with others to the last bit, or measure its memory: each in a process that ran no other test.
FRESH := tests/stages/test_faults.py tests/common/training/test_batch_search.py
test: dev ## all tests that need no cluster and no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --durations=15 $(FRESH:%=--ignore=%)
	set -e; for file in $(FRESH); do OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $$file; done

coverage: dev ## the tests, and the share of lines that they run, by file
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --cov --cov-report=term:skip-covered

ci: ## all that decides whether a change lands
	.ci/run

quickstart: install models/whisper-tiny.en/config.json data/demo/index.jsonl ## corpus, weights and all five stages on this machine
	$(BIN)/moe-asr run --mode demo

models/whisper-tiny.en/config.json: | install
	$(BIN)/moe-asr model import-ct2 tiny.en models/whisper-tiny.en

data/demo/index.jsonl: | install
	$(BIN)/moe-asr corpus synth data/demo

text-to-sql-demo: install data/flights/flights.db ## text to SQL: a small T5 from scratch, trained and tested in minutes
	$(BIN)/python -m recipes.text_to_sql train --data data/flights --from-scratch --experiment_name demo --batch_size 32 \
	  --learning_rate 2e-3 --num_warmup_epochs 1 --max_n_epochs 8 --eval_every_n_epochs 4 --async_eval
	$(BIN)/python -m recipes.text_to_sql evaluate --data data/flights --experiment_name demo --split test

data/flights/flights.db: | install
	$(BIN)/python -m recipes.text_to_sql demo data/flights

ENGINE ?= docker
PREFIX ?= moe-asr
BASE_IMAGE ?= python:3.11-slim-bookworm
STAGES := extract cluster gating experts asr
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
COMMIT = $(shell git describe --always --exclude='*' --abbrev=12 --dirty 2>/dev/null || echo unknown)
# The heavy layers are built again when the base image's name, the lock or the installer changes.
LOCKED = $(shell (echo $(BASE_IMAGE); cat docker/requirements.txt requirements-uv.txt docker/dependencies/{Dockerfile,*.*}) | sha256sum | head -c 16)
# Settings of this machine's package index and its certificates reach a build as secrets that leave no trace in the image.
INDEX := PIP_INDEX_URL|PIP_EXTRA_INDEX_URL|UV_DEFAULT_INDEX|UV_INDEX|UV_INDEX_URL
build_image = DOCKER_BUILDKIT=1 $(ENGINE) build --secret=id=index,src=$(CURDIR)/build/index \
  $${SSL_CERT_FILE:+--secret=id=ca,src=$$SSL_CERT_FILE} $(FLAGS) --file $(1)/Dockerfile
image_tags = --tag $(PREFIX)/$(1):$(VERSION) --tag $(PREFIX)/$(1):$(COMMIT)
images: build/index ## base and five stage images: ENGINE=docker|podman|buildah PREFIX=registry/folder BASE_IMAGE=… FLAGS=…
	$(ENGINE) inspect --type image $(PREFIX)/dependencies:$(LOCKED) >/dev/null 2>&1 || $(call build_image,docker/dependencies) \
	  --tag $(PREFIX)/dependencies:$(LOCKED) --build-arg BASE_IMAGE=$(BASE_IMAGE) .
	$(call build_image,docker/base) $(call image_tags,base) --build-arg DEPENDENCIES=$(PREFIX)/dependencies:$(LOCKED) \
	  --build-arg VERSION=$(VERSION) --build-arg COMMIT=$(COMMIT) .
	for stage in $(STAGES); do \
	  $(call build_image,stages/$$stage) $(call image_tags,$$stage) --build-arg BASE=$(PREFIX)/base:$(VERSION) . || exit; done

.INTERMEDIATE: build/index # removed when make ends
build/index: FORCE
	mkdir -p build
	umask 077; env | sed -nE "s/^($(INDEX))=(.*)/\1='\2'/p" >$@

sbom: dev ## bill of materials (CycloneDX) of the Python packages in all images
	mkdir -p dist
	$(BIN)/cyclonedx-py requirements docker/requirements.txt --pyproject pyproject.toml --output-file dist/moe-asr.cdx.json

test-images: dev ## build all images without a daemon and run them confined (root on Debian; minutes and 20 GB)
	$(BIN)/python -m pytest -q -rs tests/images

KUBELAB ?= ../shared/kubelab/kubelab
# With as many threads as pods have: their number changes the last bits of sums, and results are compared by digest.
test-cluster: dev ## the workflow and the chart on a real Kubernetes: that of $$KUBECONFIG, or one that $$KUBELAB brings up
	KUBELAB=$(abspath $(KUBELAB)) $(BIN)/python -m pytest -q --durations=20 -o timeout=1800 \
	  -o timeout_func_only=true tests/cluster

HELM ?= helm
package: generate ## the Helm chart as a file in dist/
	$(HELM) package helm/moe-asr --destination dist

generate: dev ## write every generated file: reference pages, tables; the chart's workflow, schema, dashboards and rules
	$(BIN)/python -m reference

docs: dev ## the documentation as a site in site/, strictly, links checked, nothing fetched
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: dev ## source distribution and wheel in dist/
	$(BIN)/python -m build --no-isolation --outdir dist

bench: dev ## measurements against peers, side by side
	$(BIN)/python -m bench.run

lock: ## resolve pyproject.toml into the requirements files, with hashes
	$(BIN)/uv pip compile -q pyproject.toml --extra demo --extra argo --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header -o requirements.txt
	$(BIN)/uv pip compile -q pyproject.toml --extra dev -c requirements.txt --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header -o requirements-dev.txt
	$(BIN)/uv pip compile -q pyproject.toml --extra argo -c requirements.txt --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header --no-annotate -o docker/requirements.txt
	grep -A100 -E '^uv==' requirements-dev.txt | awk 'NR>1 && /^[a-z]/ {exit} {print}' | grep -v '^ *#' > requirements-uv.txt

clean: ## remove what the targets made, except the virtual environment
	rm -rf runs data models plots build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
