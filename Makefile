# Every target is one call of scripts/fap.py, or of pytest or a benchmark. `scripts/fap.py --help` explains the commands.
# Variables: VERSION (upstream release), BACKEND (auto, cpu, cuda), SOURCE (submodule, sdist, path), FA_SRC_DIR, FAMILY,
#            HEAD_DIMS, DTYPES, PASSES, ARCHS, NO_SOFTMAX_ONLY, MAX_JOBS (CUDA builds: csrc/flash_attn/kernel_build.py in the overlay),
#            FRACTION, COUNT, SEED, FULL (upstream-test; FULL also sass-identity, compile-check), FORCE (clean), WIDEN (rebase), PYTHON (the interpreter to make .venv from; remembered).
PYTHON ?= $(or $(wildcard .venv/bin/python),python3)
PY     := .venv/bin/python
FAP    := $(PY) scripts/fap.py
JOBS   ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count() or 2)')
PYTEST  = $(PY) -m pytest -n $(JOBS) --dist worksteal
export HEAD_DIMS DTYPES PASSES ARCHS NO_SOFTMAX_ONLY
export VERSION BACKEND SOURCE FA_SRC_DIR FAMILY FRACTION COUNT SEED FULL FORCE RERUN WIDEN UPGRADE LOCK

.PHONY: help env lock-tools fetch apply status refresh rebase rebase-continue rebase-abort bundle lint toolchain wheel smoke sass-identity compile-check \
        test test-fast test-unit test-patches test-attention upstream-test test-transformers sanitize bench bench-gpu bench-fa4 bench-hstu bench-host bench-linear bench-decay bench-peers bench-train-step bench-context-parallel clean distclean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  \1|\2/' | column -t -s '|'

env:  ## make .venv, the project's own Python environment
	@$(PYTHON) scripts/fap.py env

lock-tools: env  ## renew requirements.lock, the versions and hashes of .venv's packages (UPGRADE=1 takes the newest)
	@$(FAP) lock-tools

fetch: env  ## bring upstream's source into .cache, verified
	@$(FAP) fetch

apply: env  ## make the patched tree in build/src
	@$(FAP) apply

status: env  ## say whether the patched tree is up to date, and if not, why
	@$(FAP) status

refresh: env  ## export the commits of the patched tree back to patches/ and overlay/
	@$(FAP) refresh

rebase: env  ## carry the series to VERSION=..., or to the checkout FA_SRC_DIR=, named VERSION=... (WIDEN=1 widens Applies-To)
	@$(FAP) rebase

rebase-continue: env  ## go on after a conflict
	@$(FAP) rebase --continue

rebase-abort: env  ## drop the rebase and return to the tree before it
	@$(FAP) rebase --abort

bundle: env  ## write one patch for plain `git apply` into dist/
	@$(FAP) bundle

toolchain: env  ## install the kernels' compiler from the Python package index into .venv
	@$(FAP) toolchain

wheel: env  ## build the wheel into dist/, install it into .venv and smoke-test it
	@$(FAP) wheel

smoke: env  ## run one forward and backward without softmax and check them against fp64
	@$(FAP) smoke

sass-identity: env  ## compare the machine code of upstream's kernels, pristine against patched (HEAD_DIMS=, DTYPES=, PASSES=, ARCHS=, FULL=1)
	@$(FAP) sass-identity

compile-check: env  ## compile flash-attn-4's kernels for Hopper without a GPU and check their machine code (FULL=1)
	@FAMILY=flash-attn-4 $(FAP) compile-check

lint: env  ## check patches, headers, lock and code style
	@$(FAP) lint
	@$(PY) -m ruff check --quiet scripts tests overlay benchmarks examples
	@$(PY) -m ruff format --quiet --check scripts tests overlay benchmarks examples

test: wheel lint  ## run every check that this machine can run
	$(PYTEST)

# No `wheel` here: it tests the installed wheel.
test-fast: env  ## run the tests that are not marked slow, after `make wheel` (three minutes on two cores)
	$(PYTEST) -q -m "not slow" tests/unit tests/attention tests/fa4

test-unit: env
	$(PYTEST) tests/unit

test-patches: env
	$(PYTEST) tests/patches

test-attention: wheel
	$(PYTEST) tests/attention

upstream-test: wheel  ## run a sample of upstream's own tests (FRACTION=, COUNT=, SEED=, FULL=1)
	@$(FAP) upstream-test

test-transformers: wheel  ## run models of transformers without softmax, in environments of their own (LOCK=1 renews their locks)
	@$(FAP) test-transformers

sanitize: wheel  ## run every CUDA kernel family under compute-sanitizer (needs a GPU)
	@$(FAP) sanitize --json docs/results/sanitizers.json

bench: wheel  ## time the CPU backend against torch's own attention
	$(PY) benchmarks/cpu_vs_sdpa.py --max-ratio 1.5 --json docs/results/cpu_vs_sdpa.json
	$(PY) benchmarks/plot_cpu.py

bench-gpu: wheel  ## measure speed and memory of the CUDA kernels without softmax against those with it (needs a GPU)
	$(PY) benchmarks/gpu_vs_softmax.py --json docs/results/gpu_vs_softmax.json
	$(PY) benchmarks/gpu_tables.py

bench-fa4:  ## measure TFLOP/s of flash-attn-4's kernels without softmax (needs a Hopper GPU and both wheels)
	$(PY) benchmarks/fa4_tflops.py --compile $(JOBS)
	$(PY) benchmarks/fa4_tflops.py --json docs/results/fa4_tflops.json
	$(PY) benchmarks/fa4_tables.py

bench-hstu:  ## measure TFLOP/s of HSTU's masks on jagged batches (needs a Hopper GPU and both wheels); goes on where it stopped
	$(PY) benchmarks/hstu.py --compile $(JOBS)
	$(PY) benchmarks/hstu.py --json docs/results/hstu_tflops.json

bench-host: wheel  ## measure what a small call costs the host, for each available backend
	$(PY) benchmarks/host.py --json docs/results/host.json

bench-linear:  ## time linear time against the quadratic kernels and others, on the GPU if there is one
	$(PY) benchmarks/linear_vs_quadratic.py --json docs/results/linear_vs_quadratic.json
	$(PY) benchmarks/linear_tables.py --json docs/results/linear_vs_quadratic.json

bench-decay:  ## time a decay in linear time, and a step of decoding, beside fla's (needs a GPU)
	$(PY) benchmarks/linear_decay.py --json docs/results/linear_decay.json

bench-peers:  ## time relu and sigmoid beside FlexAttention and triton-sigmoid, on a GPU (pip install triton-sigmoid first)
	$(PY) benchmarks/peers.py --json docs/results/peers.json

bench-train-step:  ## time training steps with softmax and without it (needs a Hopper GPU); goes on where it stopped
	$(PY) benchmarks/train_step.py --json docs/results/train_step.json

bench-context-parallel:  ## time a sequence over several GPUs against one (RANKS=2; needs both wheels or the extension)
	$(PY) -m torch.distributed.run --standalone --nproc-per-node $(or $(RANKS),2) benchmarks/context_parallel.py --json docs/results/context_parallel.json

clean: env  ## delete build/
	@$(FAP) clean

distclean:  ## delete everything that git ignores
	@$(PYTHON) scripts/fap.py distclean
