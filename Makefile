# RegionSpot. `make` lists the targets. VENV= moves the environment.

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

# A matched pair: torchvision works only with the torch that it was built for.
TORCH ?= torch==2.15.0 torchvision==0.29.2

READY := $(VENV)/.ready
# A separate environment: one of the peers pins an older numpy and installs a hundred packages.
BENCH_VENV  := build/bench-env
BENCH_READY := $(BENCH_VENV)/.ready
export PATH := $(abspath $(VENV))/bin:$(PATH)
# Evaluation reads images unless CACHE= is given.
CACHE_ARG := $(if $(filter command line environment,$(origin CACHE)),--cache "$(CACHE)")
WEIGHTS_ARG := $(if $(WEIGHTS),--weights "$(WEIGHTS)")

.DEFAULT_GOAL := help
.PHONY: help setup demo serve-demo test check lint typecheck docs extract train eval-lvis toy-backbones bench-cache bench-extract bench-train bench-eval bench-encodings bench-heads ablate bench-scaling stress clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  DATASET= SPLIT= DATA= CACHE= PRESET=bb|bl|bl336 BOXES=gt|<proposals.json> WEIGHTS= OUT= ARGS="

setup: $(READY) ## create the environment and install everything, with pinned torch and torchvision

# SAM 2 is built without its CUDA kernel, which needs nvcc and minutes and only fills holes in masks.
# uv shares one copy of torch (5 GB) between clones; it is installed into the environment if missing.
$(READY): pyproject.toml
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@command -v uv >/dev/null || $(VENV)/bin/python -m pip install --quiet uv
	SAM2_BUILD_CUDA=0 uv pip install --quiet --compile-bytecode --python $(VENV)/bin/python $(TORCH) -e ".[dev]"
	@touch $@

$(BENCH_READY): pyproject.toml | $(READY)
	uv venv --quiet --clear --python $(VENV)/bin/python $(BENCH_VENV)
	uv pip install --quiet --python $(BENCH_VENV)/bin/python $(TORCH) -e ".[dev,bench]"
	@touch $@

demo: $(READY) ## a toy world from images to AP: extract, train, evaluate; results in build/demo
	regionspot demo $(DEMO_OUT) $(ARGS)

# With the head of `make demo` if it is there; regions are named without a head otherwise.
SERVE := build/serve
serve-demo: $(READY) ## a web page to name regions and search, on a toy world; no download
	test -d $(SERVE)/world || regionspot toy-world $(SERVE)/world --pictures 300
	regionspot extract toy --split val --data $(SERVE)/world --cache $(SERVE)/val.zarr --preset toy --map dense
	regionspot index $(SERVE)/val.zarr
	regionspot serve $(if $(wildcard $(DEMO_OUT)/run/head.safetensors),--checkpoint $(DEMO_OUT)/run/head.safetensors,--preset toy) \
	  --cache $(SERVE)/val.zarr --data $(SERVE)/world --browser $(ARGS)

extract: $(READY) ## run the backbones over DATASET= into CACHE=; resumes
	regionspot extract $(DATASET) --split $(SPLIT) --data "$(DATA)" --cache "$(CACHE)" --preset $(PRESET) --boxes "$(BOXES)" $(WEIGHTS_ARG) $(ARGS)

train: $(READY) ## train the head from CACHE= into OUT=; resumes
	regionspot train --cache "$(CACHE)" --preset $(PRESET) --out "$(OUT)" --resume $(WEIGHTS_ARG) $(ARGS)

eval-lvis: $(READY) ## LVIS AP of the head in OUT= (or CHECKPOINT=), from the images in DATA= or from CACHE=
	regionspot eval-lvis --checkpoint "$(CHECKPOINT)" --data "$(DATA)" --preset $(PRESET) --boxes "$(BOXES)" --out "$(OUT)/eval" $(CACHE_ARG) $(WEIGHTS_ARG) $(ARGS)

toy-backbones: $(READY) ## train the toy SAM and CLIP (an hour on 2 cores); resumes
	python -m regionspot.pipeline.toy.training $(ARGS)

bench-cache: $(BENCH_READY) ## the cache and its peers: table, chart and goals in benchmarks/results (QUICK=1: one minute, build/bench)
	$(BENCH_VENV)/bin/python -m benchmarks.bench_cache $(if $(QUICK),--quick) $(ARGS)

bench-extract: $(READY) ## extraction and the authors' code; on a GPU images per second too (15 minutes; QUICK=1: one minute)
	python -m benchmarks.bench_extract $(if $(QUICK),--quick) $(ARGS)

bench-train: $(READY) ## training steps from the cache, start of a run; on a GPU images per second too (12 minutes; QUICK=1: one minute)
	python -m benchmarks.bench_train $(if $(QUICK),--quick) $(ARGS)

bench-eval: $(READY) ## LVIS AP by hotcoco and by lvis: time, memory, parity, intervals (15 minutes; QUICK=1: one minute)
	python -m benchmarks.bench_eval $(if $(QUICK),--quick) $(ARGS)

bench-encodings: $(READY) ## bytes, error and AP of each encoding (20 minutes on 2 cores)
	python -m benchmarks.encodings $(ARGS)

bench-heads: $(READY) ## AP, parameters and seconds to train of every head, toy world (half an hour on 2 cores; QUICK=1: one minute)
	python -m benchmarks.heads $(if $(QUICK),--quick) $(ARGS)

ablate: $(READY) ## AP of every option of the heads, toy world, 3 seeds: table and chart (40 minutes on 2 cores; QUICK=1: one minute)
	python -m benchmarks.ablate $(if $(QUICK),--quick) $(ARGS)

bench-scaling: $(READY) ## speedup of 1 to 64 workers with a simulated GPU, cost of a part (QUICK=1: one minute)
	python -m benchmarks.bench_scaling $(if $(QUICK),--quick) $(ARGS)

stress: $(READY) ## damage, kill and starve caches (25 minutes on 2 cores); counts in benchmarks/results (QUICK=1: build/bench)
	python -m benchmarks.stress $(if $(QUICK),--quick) $(ARGS)

# As on a CPU without bfloat16 instructions: make test REGIONSPOT_CPU_DTYPES=float32; with: ...=float32,bfloat16
# Containers often forbid bytecode; then every process that a test starts would compile all sources again.
test: export PYTHONDONTWRITEBYTECODE =
test: $(READY) ## the tests, in parallel
	python -m pytest -n auto --dist worksteal $(ARGS)

lint: $(READY) ## ruff: style and format
	ruff check .
	ruff format --check .

# mypy and the Python API's page read folders: links give the packages their installed name.
NAMED := build/typing/regionspot/.ready
$(NAMED):
	@mkdir -p $(@D)
	@for name in __init__.py cli.py commands pipeline cache fusion evaluation; do ln -sfn ../../../$$name $(@D)/$$name; done
	@touch $@

typecheck: $(READY) $(NAMED) ## mypy, strict
	mypy

docs: $(READY) $(NAMED) ## the documentation as a site in build/site; a broken link is an error
	zensical build --clean --strict

check: lint typecheck test ## ruff, mypy and the tests

clean: ## remove build products, but not the environment
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
