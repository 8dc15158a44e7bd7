# make quickstart   from a clean clone to a tuned model: needs Python 3.11 or newer and nothing else
# make test         run the test suite
# make faults       kill it everywhere, starve it, feed it rubbish; a table of what was lost (eleven minutes)
# make lint         check style
# make docs         write docs/api.md from the source
# make clean        remove .venv and caches; what was trained stays

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help quickstart test faults lint docs clean

help:
	@sed -n '/^# make/s/^# //p' Makefile

quickstart: $(VENV)/.run-ready
	@model="$$($(BIN)/python scripts/get_quickstart_model.py)" && \
	$(BIN)/tunesmith train recipes/quickstart.yaml --model_name_or_path "$$model" --overwrite_output_dir

# without the model the tests marked `real` are skipped
test: $(VENV)/.dev-ready
	@model="$$($(BIN)/python scripts/get_quickstart_model.py)" || echo "no base model: the tests marked 'real' are skipped"; \
	TUNESMITH_TEST_MODEL="$$model" $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

faults: $(VENV)/.dev-ready
	$(BIN)/python scripts/faults.py

lint: $(VENV)/.dev-ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

docs: $(VENV)/.dev-ready
	$(BIN)/python scripts/make_api_reference.py

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "tunesmith needs Python 3.11 or newer; '$(PYTHON)' is not. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# stamps: installed again only when the dependencies change
$(VENV)/.run-ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing tunesmith into $(VENV) (the first time some minutes, mostly torch) ..."
	$(PIP_INSTALL) -e '.[gguf]'
	@touch $@

$(VENV)/.dev-ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing tunesmith and its test tools into $(VENV) ..."
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.run-ready

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
