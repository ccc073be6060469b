# Every target works on a fresh clone with python3 and its venv module: `.venv` is made when it is missing or outdated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export TOKENIZERS_PARALLELISM := false
# Every process of a test would compile all that it imports: ten seconds each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test slow quality style docs clean

demo: $(STAMP)
	$(BIN)/python recipes/quickstart.py

# Small models gain little from a second thread and lose much where another program wants the core.
demo test slow: export OMP_NUM_THREADS ?= 1
# The suite must never wait for a network.
test slow: export HF_HUB_OFFLINE := 1

# One file of tests a process: those that start processes of their own stay together.
test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow --timeout 1800

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documents as a web site in `site/`; a broken link is an error. The site builder is installed only for this target.
docs: $(STAMP)
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e ".[docs]"
	$(BIN)/mkdocs build --strict

# torch, torchvision and timm are resolved in one step, so that their versions fit each other.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) outputs build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
