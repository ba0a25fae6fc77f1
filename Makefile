# make demo    install, then the whole path on the packaged galaxies; results in demo/
# make test    install, then every check
# make docs    the documentation site in _docs/, and README.md
# make bench   the table of measured figures of the documentation
# make lab     JupyterLab on the notebooks

PYTHON ?= $(shell command -v python3.11 || command -v python3)
ENV := .venv
BIN := $(ENV)/bin

.PHONY: demo test docs readme bench lab env clean
.DEFAULT_GOAL := demo

env: $(ENV)/installed

$(ENV)/installed: constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "astromae needs Python 3.11 or later; name one with: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(ENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: env
	@$(BIN)/astromae demo demo

test: env
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	$(BIN)/python -m pytest -q tests

docs: env
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python docs.py site

readme: env
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python docs.py readme

bench: env
	@$(BIN)/astromae bench bench

lab: env
	@$(BIN)/jupyter lab nbs

clean:
	rm -rf $(ENV) _docs _proc demo bench
