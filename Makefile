# One target a check; pre-commit and CI call the same ones. `make demo` and `make test` set up what they need.
#   make demo PYTHON=python3.12 VENV=/somewhere/venv

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
TEST_JOBS ?= 2
BENCH_ARGS ?=
BENCH_SITE := .bench_site
PEERS_STAMP := $(BENCH_SITE)/.installed
KERNELS_SITE := .triton_site
KERNELS_STAMP := $(KERNELS_SITE)/.installed
KERNEL_TESTS := tests/qwen_image/model/test_joint_layout.py tests/qwen_image/model/test_low_rank_layout.py \
  tests/qwen_image/kernels/test_written_arguments.py tests/qwen_image/float8/test_mlp.py
SLURM_TESTS := tests/slurm/test_private_slurm.py
GPU_TESTS := $(shell grep -rl --include='test_*.py' cuda tests | sort)
DEMO_OUTPUT ?= demo_output
DEMO_EDIT_OUTPUT ?= demo_edit_output

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-edit test test-gpu test-slurm test-kernels check lint types format bench-data bench-loader bench-step bench-command bench-scaling

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-14s %s\n", $$1, $$2}'

setup: $(STAMP)  ## virtual environment with everything (done by the others when needed)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.11 or newer is needed: make PYTHON=python3.12 …" >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

$(BIN)/python:
	$(MAKE) setup

demo: $(STAMP)  ## photos -> shards -> latents -> LoRA -> sample images, with a tiny model; minutes on two CPU cores
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python demo/run.py --output_path $(DEMO_OUTPUT)

demo-edit: $(STAMP)  ## drawn pairs -> shards -> latents -> LoRA -> images from source images, with a tiny edit model
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python demo/run_edits.py --output_path $(DEMO_EDIT_OUTPUT)

test: $(STAMP)  ## all tests but the slow ones
	$(BIN)/python -m pytest -n $(TEST_JOBS) $(PYTEST_ARGS)

test-gpu: $(STAMP)  ## what needs a GPU; adds a line with date, card, versions and outcome to bench/gpu_tests.log
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	  { echo "error: torch finds no GPU here" >&2; exit 2; }
	$(BIN)/python -m pytest -p tests.helpers.gpu_log $(GPU_TESTS) $(PYTEST_ARGS)

test-slurm: $(STAMP)  ## what a cluster does to a job, on a real Slurm on this host (root; apt-get install slurm-wlm munge)
	$(BIN)/python -m pytest -m slow -n $(TEST_JOBS) $(SLURM_TESTS) $(PYTEST_ARGS)

test-kernels: $(KERNELS_STAMP) $(STAMP)  ## the Triton kernels without a GPU, in Triton's interpreter; sets it up in .triton_site
	TRITON_INTERPRET=1 PYTHONPATH="$(abspath $(KERNELS_SITE))" $(BIN)/python -m pytest $(KERNEL_TESTS)

# PyTorch's CUDA builds bring Triton; its CPU build does not, and would not use it otherwise.
$(KERNELS_STAMP): | $(BIN)/python
	rm -rf $(KERNELS_SITE)
	$(BIN)/python -m pip install --quiet --no-deps --target $(KERNELS_SITE) triton==3.6.0
	@touch $@

bench-data: $(PEERS_STAMP)  ## packing speed and quality against Pillow, libvips and img2dataset; sets these up in .bench_site
	PYTHONPATH="$(abspath $(BENCH_SITE))" $(BIN)/python bench/packing.py $(BENCH_ARGS)

# Beside the environment, which is made where there is none and otherwise left as it is: img2dataset asks for old
# OpenCV, albumentations and webdataset.
$(PEERS_STAMP): bench/requirements-packing.txt | $(BIN)/python
	rm -rf $(BENCH_SITE)
	$(BIN)/python -m pip install --quiet --no-deps --target $(BENCH_SITE) --requirement bench/requirements-packing.txt
	@touch $@

bench-loader: $(STAMP)  ## loader throughput, seek and memory against webdataset
	$(BIN)/python bench/loader.py

bench-step: $(STAMP)  ## one training step on this machine's GPU, ours and the peers'
	$(BIN)/python bench/train_step.py --variants ours,ours-full,ours-engine --peers diffsynth,diffusers,diffusers_tuned

bench-command: $(STAMP)  ## what the real command gives on this machine's GPU: against the bare step, over mixed sizes
	$(BIN)/python bench/real_command.py $(BENCH_ARGS)

bench-scaling: $(STAMP)  ## the real command on 1, 2, 4, 8 GPUs of this machine, ZeRO-2 and stage 3: one table
	$(BIN)/python bench/scaling.py --folder /dev/shm/qwen_lora_scaling $(BENCH_ARGS)

check: lint types test  ## what CI runs

lint: $(STAMP)  ## ruff: rules and format; shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck slurm/*.sh .ci/run

types: $(STAMP)  ## mypy
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the files as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
