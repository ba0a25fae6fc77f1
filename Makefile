# make demo         install, then the whole path on the packaged galaxies; results in demo/
# make test         install, then every check
# make docs         the documentation site in _docs/, and README.md
# make bench        the measured figures of the documentation, but accuracy and rates
# make accuracy     three seeds of the networks on 7,000 galaxies (hours on two cores)
# make experiments  all networks with three seeds, and four studies, for nbs/results/ (a night on two cores)
# make full-size    all networks at full size, one seed, for nbs/results/ (less than an hour of a GPU)
# make rates        how many images a second all trainings take on a GPU (minutes)
# make lab          JupyterLab on the notebooks

PYTHON ?= $(shell command -v python3.11 || command -v python3)
ENV := .venv
BIN := $(ENV)/bin
SHELL := bash
.SHELLFLAGS := -o pipefail -c

.PHONY: demo test docs readme bench accuracy experiments full-size rates lab env clean
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
	$(BIN)/python -m pytest -q

# nbdev prepares the notebooks for a renderer in _proc/: hidden cells gone, signatures documented
PREPARE = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -c \
  'if __name__ == "__main__": from nbdev.serve import proc_nbs; proc_nbs(force=True)'

docs: env
	@if command -v quarto >/dev/null; then PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_docs; else \
	  echo "Quarto is not installed: smalldocs renders the site instead."; \
	  $(PREPARE) && $(BIN)/smalldocs render _proc --quiet && rm -rf _docs && mv _proc/_docs _docs; \
	fi
	@echo "The site is in _docs/: open _docs/index.html"

readme: env
	@$(BIN)/jupyter nbconvert --log-level WARN --to markdown --output-dir . --output README nbs/index.ipynb
	@sed -i -e '1i <!-- Written from nbs/index.ipynb by `make readme`: edit the notebook. -->\n' \
	  -e '/^#| /d' -e 's#](\(images/\|results/\|tutorials/\|[0-9][0-9]_\)#](nbs/\1#g' README.md

bench: env
	@$(BIN)/astromae bench bench

accuracy: env
	@$(BIN)/astromae bench bench --accuracy 3

rates: env
	@$(BIN)/astromae bench bench --rates

# every part is resumable: a second call goes on where the first one stopped
EXPERIMENT := $(BIN)/astromae experiment
STAMPS := --data bench/stamps --in-memory
SMALL := $(STAMPS) --preset two-cores

# the report, its figures, metrics, predictions and losses go into the documentation; weights do not
define publish
	@for run in $(1); do \
	  $(BIN)/astromae report bench/$$run && rm -rf nbs/results/$$run && mkdir -p nbs/results/$$run && \
	  (cd bench/$$run && find . -type f \( -name history.csv -o ! -path './*/*/*' \) \
	    ! -name report.html ! -name split.fits) | \
	  tar -cf - -C bench/$$run -T - | tar -xf - -C nbs/results/$$run || exit; \
	done
endef

bench/stamps: | env
	@$(BIN)/astromae simulate $@

experiments: bench/stamps
	@$(EXPERIMENT) demo $(SMALL) --out bench/fourteen-networks --seed 42 --seed 43 --seed 44
	@$(EXPERIMENT) mask-ratio $(SMALL) --out bench/mask-ratio --parts demo
	@$(EXPERIMENT) pretraining-epochs $(SMALL) --out bench/pretraining-epochs --parts demo
	@$(EXPERIMENT) encoder $(SMALL) --out bench/encoder --parts demo
	@$(EXPERIMENT) label-efficiency $(SMALL) --out bench/label-efficiency --parts demo
	$(call publish,fourteen-networks mask-ratio pretraining-epochs encoder label-efficiency)

full-size: bench/stamps
	@$(EXPERIMENT) demo $(STAMPS) --preset gpu-hour --out bench/full-size
	$(call publish,full-size)

lab: env
	@$(BIN)/jupyter lab nbs

clean:
	rm -rf $(ENV) _docs _proc demo bench
