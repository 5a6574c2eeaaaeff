# Three commands, each of which sets up all that it needs: `make quickstart` trains a text model, `make sight` one that
# sees, `make test` tests.

PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/quickstart
SIGHT ?= runs/sight
BIN := $(VENV)/bin
TRAIN_SIGHT = $(BIN)/python -m train.pretrain --config=configs/sight_quickstart.py

.PHONY: quickstart sight test clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m train.pretrain --config=configs/quickstart.py --workdir=$(WORKDIR)
	$(BIN)/python -m train.evaluate --checkpoint=$(WORKDIR)
	$(BIN)/python -m serve.generate --checkpoint=$(WORKDIR) --samples=3 --max_tokens=120 --seed=1
	@echo
	@echo "To write on from words of your own:"
	@echo "  $(BIN)/python -m serve.generate --checkpoint=$(WORKDIR) --prompt='The with statement'"
	@echo "To train on for as long again:"
	@echo "  $(BIN)/python -m train.pretrain --config=configs/quickstart.py --workdir=$(WORKDIR) --config.run.steps=900"

sight: $(VENV)/.installed
	$(TRAIN_SIGHT):text --workdir=$(SIGHT)/text
	$(TRAIN_SIGHT):align --workdir=$(SIGHT)/align --config.run.start=$(SIGHT)/text
	$(TRAIN_SIGHT):captions --workdir=$(SIGHT)/captions --config.run.start=$(SIGHT)/align
	$(TRAIN_SIGHT):questions --workdir=$(SIGHT)/questions --config.run.start=$(SIGHT)/captions
	$(BIN)/python -m train.evaluate --checkpoint=$(SIGHT)/questions --page=$(SIGHT)/answers.html --json=$(SIGHT)/answers.json

test: $(VENV)/.installed-test
	$(BIN)/python -m ruff check --no-cache .
	$(BIN)/python -m ruff format --no-cache --check .
	$(BIN)/python -m pytest -n 2 --dist=loadfile

$(VENV)/.installed: setup.py
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
