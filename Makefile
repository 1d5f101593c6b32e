# Two cores, Python 3.10 or newer and a network are enough for every target.
PYTHON ?= python3
VENV ?= .venv
DATA ?= datasets/shapes
OUTPUT ?= output/quickstart
SHAPES ?=  # flags of tools/make_shapes.py
TRITON_INTERPRET ?= 1
OPTS ?=    # config overrides of quickstart and compare, KEY VALUE ...
COMPARE ?= output/compare
OBJECTS ?= --num-train 4000  # flags of make_shapes.py for what the classifiers learn
QUICK ?=   # --quick: one seed and a quarter of the steps
RUN = $(VENV)/bin/python

.PHONY: help install quickstart compare test test-all test-kernels lint

help:
	@echo "make quickstart  install, generate data, train, evaluate and draw (10 minutes)"
	@echo "make compare     GN against frozen BN and BN, three seeds (an hour; QUICK=--quick: 12 minutes)"
	@echo "make test        install, run the fast tests and those of the kernels"
	@echo "make test-all    install, run every test"
	@echo "make test-kernels  only those of the kernels; TRITON_INTERPRET=0 runs them on a GPU"
	@echo "make lint        ruff and the import-direction test"

install: $(VENV)/.installed

$(VENV)/.installed: setup.py tools/install.py
	@command -v $(PYTHON) >/dev/null || \
	  { echo "error: there is no $(PYTHON); install Python 3.10 or newer, or name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) tools/install.py $(VENV)
	@touch $@

quickstart: install
	@$(RUN) tools/make_shapes.py --output $(DATA) $(SHAPES)
	@if [ -e $(OUTPUT)/results.json ]; then \
	  echo "$(OUTPUT) holds a finished run; remove it to train anew, or name another: OUTPUT=..."; \
	else \
	  $(RUN) tools/train_net.py --config-file configs/small/quickstart.yaml --resume \
	    --train $(DATA)/train.json $(DATA)/images --val $(DATA)/val.json $(DATA)/images \
	    OUTPUT_DIR $(OUTPUT) $(OPTS); \
	fi
	@$(RUN) tools/report_run.py $(OUTPUT)

# Classifiers of generated objects, which the compared detectors start from.
datasets/classifiers/R-18-%/backbone.pth: | install
	@$(RUN) tools/make_shapes.py --output datasets/shapes_for_classifiers --seed 1 $(OBJECTS)
	@$(RUN) tools/train_classifier.py --output $(@D) --resume --network resnet18 --norm $* \
	  --data datasets/shapes_for_classifiers --epochs 1 --schedule cosine

compare: install $(foreach norm,BN GN,datasets/classifiers/R-18-$(norm)/backbone.pth)
	@$(RUN) tools/make_shapes.py --output $(DATA) $(SHAPES)
	@$(RUN) tools/compare.py $(QUICK) --jobs 2 --output $(COMPARE) \
	  --recipes $(addprefix configs/compare/,frozenbn.yaml bn.yaml frozenbn_gn_heads.yaml gn.yaml) \
	  --beside configs/compare/scratch_gn.yaml \
	  --train $(DATA)/train.json $(DATA)/images --val $(DATA)/val.json $(DATA)/images $(OPTS)

test: install test-kernels
	$(RUN) -m pytest -m "not slow"

test-all: install test-kernels
	$(RUN) -m pytest

# In a process of their own: triton reads TRITON_INTERPRET when it is imported.
test-kernels: install
	TRITON_INTERPRET=$(TRITON_INTERPRET) $(RUN) -m pytest tests/ops/kernels tests/studies/kernels

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest -q tests/test_imports.py
