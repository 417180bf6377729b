# RegionSpot. `make` lists the targets. VENV= names another place for the environment.

VENV     ?= .venv
PYTHON   ?= python3
DATASET  ?= o365
SPLIT    ?= train
PRESET   ?= bl
BOXES    ?= gt
DATA     ?= data/$(DATASET)
CACHE    ?= features/$(DATASET)_$(SPLIT)_$(PRESET).zarr
OUT      ?= runs/$(PRESET)
CHECKPOINT ?= $(OUT)/head.safetensors
WEIGHTS  ?=
ARGS     ?=
DEMO_OUT ?= build/demo
QUICK    ?=

# A matched pair: torchvision's operators exist only beside the torch it was built for.
TORCH ?= torch==2.15.0 torchvision==0.29.2

READY := $(VENV)/.ready
# Apart from the other one: a peer pins an older numpy and brings a hundred packages that nothing else needs.
BENCH_VENV  := build/bench-env
BENCH_READY := $(BENCH_VENV)/.ready
export PATH := $(abspath $(VENV))/bin:$(PATH)
# Evaluation runs from images unless a cache is named for it.
CACHE_ARG := $(if $(filter command line environment,$(origin CACHE)),--cache "$(CACHE)")
WEIGHTS_ARG := $(if $(WEIGHTS),--weights "$(WEIGHTS)")

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint typecheck extract train eval-lvis toy-backbones bench-cache bench-extract bench-encodings bench-scaling stress clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  DATASET= SPLIT= DATA= CACHE= PRESET=bb|bl|bl336 BOXES=gt|<proposals.json> WEIGHTS= OUT= ARGS="

setup: $(READY) ## make the environment and install everything, torch and torchvision pinned

# SAM 2 without its CUDA kernel, which fills holes in masks: compiling it takes nvcc and minutes.
# uv keeps one copy of torch's 5 GB for any number of clones; it is installed into the environment where it is missing.
$(READY): pyproject.toml
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@command -v uv >/dev/null || $(VENV)/bin/python -m pip install --quiet uv
	SAM2_BUILD_CUDA=0 uv pip install --quiet --compile-bytecode --python $(VENV)/bin/python $(TORCH) -e ".[dev]"
	@touch $@

$(BENCH_READY): pyproject.toml | $(READY)
	uv venv --quiet --clear --python $(VENV)/bin/python $(BENCH_VENV)
	uv pip install --quiet --python $(BENCH_VENV)/bin/python $(TORCH) -e ".[dev,bench]"
	@touch $@

demo: $(READY) ## the main job, small and real: a toy world, extract, train, evaluate; tables and images in build/demo
	regionspot demo $(DEMO_OUT) $(ARGS)

extract: $(READY) ## backbones over DATASET= once, into CACHE=; run again, it resumes
	regionspot extract $(DATASET) --split $(SPLIT) --data "$(DATA)" --cache "$(CACHE)" --preset $(PRESET) --boxes "$(BOXES)" $(WEIGHTS_ARG) $(ARGS)

train: $(READY) ## train the head from CACHE= into OUT=
	regionspot train --cache "$(CACHE)" --preset $(PRESET) --out "$(OUT)" --resume $(WEIGHTS_ARG) $(ARGS)

eval-lvis: $(READY) ## LVIS AP of the head in OUT= (or CHECKPOINT=), end to end from the images in DATA=, or from CACHE=
	regionspot eval-lvis --checkpoint "$(CHECKPOINT)" --data "$(DATA)" --preset $(PRESET) --boxes "$(BOXES)" --out "$(OUT)/eval" $(CACHE_ARG) $(WEIGHTS_ARG) $(ARGS)

toy-backbones: $(READY) ## train the toy world's SAM and CLIP again (under an hour on 2 cores)
	python -m regionspot.pipeline.toy.training $(ARGS)

bench-cache: $(BENCH_READY) ## the cache against its peers: table, chart and goals into benchmarks/results (QUICK=1: a minute, build/bench)
	$(BENCH_VENV)/bin/python -m benchmarks.bench_cache $(if $(QUICK),--quick) $(ARGS)

bench-extract: $(READY) ## extraction against the authors' path; on a GPU its rates as well (15 minutes; QUICK=1: a minute, build/bench)
	python -m benchmarks.bench_extract $(if $(QUICK),--quick) $(ARGS)

bench-encodings: $(READY) ## what each encoding costs: bytes, features, AP (20 minutes on 2 cores)
	python -m benchmarks.encodings $(ARGS)

bench-scaling: $(READY) ## 1 to 64 workers with a simulated GPU, and what a part costs to give out (QUICK=1: a minute, build/bench)
	python -m benchmarks.bench_scaling $(if $(QUICK),--quick) $(ARGS)

stress: $(READY) ## damage, kill and starve caches in full (20 minutes on 2 cores); what was counted into benchmarks/results (QUICK=1: build/bench)
	python -m benchmarks.stress $(if $(QUICK),--quick) $(ARGS)

# As on a CPU without instructions for half precision: make test REGIONSPOT_CPU_DTYPES=float32; with: ...=float32,bfloat16
test: $(READY) ## the tests, in parallel
	python -m pytest -n auto --dist worksteal $(ARGS)

lint: $(READY) ## ruff: style and format
	ruff check .
	ruff format --check .

# Type checkers read folders, not installs: they see the packages under their installed name through links.
typecheck: $(READY) ## mypy, strict
	@mkdir -p build/typing/regionspot
	@for name in __init__.py cli.py commands pipeline cache fusion evaluation; do ln -sfn ../../../$$name build/typing/regionspot/$$name; done
	mypy

check: lint typecheck test ## everything that must be green before a commit

clean: ## remove what the targets above made, but not the environment
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
