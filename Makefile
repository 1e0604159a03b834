# Each target sets up .venv when it is missing. PYTHON=python3.12 picks another Python (3.11 or newer).
# PIP_ARGS reaches pip, for example PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'
# for the small CPU build of PyTorch on Linux.
PYTHON ?= python3
BIN := .venv/bin

.DELETE_ON_ERROR:
.PHONY: help demo test book export lab docs bench ablations references model student slides clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## / \t/'

.venv/made: 
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tinylm needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/run: .venv/made settings.ini setup.py constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

.venv/dev: .venv/made settings.ini setup.py constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@ .venv/run

demo: .venv/run  ## from nothing, the packages included, to a told story in about three minutes
	$(BIN)/tinylm train --preset fast

test book: export OMP_NUM_THREADS := 1  # two workers, a core each
test: .venv/dev  ## run every notebook and every test
	$(BIN)/python -m pytest -n 2 --dist worksteal

book: .venv/dev  ## open three chapters in JupyterLab, and see that the book's own checks find planted faults
	$(BIN)/python -m pytest -m book

export: .venv/dev  ## write the package from the notebooks
	$(BIN)/python nbs/_export.py

lab: .venv/dev  ## open the chapters in JupyterLab
	$(BIN)/jupyter lab nbs

docs: .venv/dev  ## build the site into _docs (Quarto if it is on PATH, else a stand-in)
	$(BIN)/python tests/build_site.py

bench: .venv/dev  ## measure tinylm beside other tools
	for f in benchmarks/*.py; do $(BIN)/python $$f || exit 1; done

SAMPLE := data/tinystories-head.txt.gz
SAMPLE_V2 := data/tinystories-v2.txt.gz
SAMPLE_VALID := data/tinystories-head-valid.txt.gz
FIRST = awk -v n=$(1) '{ print } /^<[|]endoftext[|]>/ && !--n { exit }'
$(SAMPLE) $(SAMPLE_V2) $(SAMPLE_VALID): | .venv/run
	$(BIN)/tinylm data --corpus tinystories
	$(call FIRST,19136) data/tinystories/TinyStoriesV2-GPT4-train.txt | gzip > $(SAMPLE)
	$(call FIRST,10947) data/tinystories/TinyStoriesV2-GPT4-train.txt | gzip > $(SAMPLE_V2)
	$(call FIRST,3000) data/tinystories/TinyStoriesV2-GPT4-valid.txt | gzip > $(SAMPLE_VALID)

# where records are made anew; what has a record there is not run again
FRESH := runs/fresh
ablations: .venv/run $(SAMPLE) $(SAMPLE_V2) $(SAMPLE_VALID)  ## run the plans of chapter 06 anew, TinyStories on your own download (hours)
	$(BIN)/tinylm ablate --plan data/results/ablations/plan.json --out $(FRESH)/ablations/tinystories --corpus $(SAMPLE) --val_corpus $(SAMPLE_VALID)
	$(BIN)/tinylm ablate --plan data/results/ablations/plan-v2.json --out $(FRESH)/ablations/v2 --corpus $(SAMPLE_V2) --val_corpus $(SAMPLE_VALID)
	$(BIN)/tinylm ablate --plan data/results/ablations/plan-fables.json --out $(FRESH)/ablations/fables

references: .venv/run  ## train anew the runs that tinylm compare knows (half an hour)
	$(BIN)/tinylm search --preset debug --lrs 0.02 --seeds 0,1,2,3,4 --out $(FRESH)/bands
	$(BIN)/tinylm search --preset laptop --lrs 0.01 --seeds 0,1,2,3,4 --out $(FRESH)/bands
	$(BIN)/tinylm search --preset fast --lrs 0.01 --seeds 0,1,2,3,4 --out $(FRESH)/bands
	$(BIN)/python -c "from tinylm.ablations import _references as r; import json; print(json.dumps(r('$(FRESH)/bands'), separators=(',', ':')), end='')" > $(FRESH)/bands.json

model: .venv/run  ## train anew the small model that comes with the package (about ten minutes)
	$(BIN)/tinylm train --preset fast --no_qk_norm --cosine_cycle_iters 4000 --run_dir runs/model
	$(BIN)/python -c "from tinylm.train import SHIPPED, save_int8 as s; s('runs/model', SHIPPED)"

student: .venv/made  ## write the chapters without their answers into student/ (NBGRADER=1: for nbgrader, into source/)
	$(BIN)/python nbs/_student.py $(if $(NBGRADER),--nbgrader)

slides: .venv/made  ## write slides.html, the pictures of the chapters as a deck (needs Quarto)
	$(BIN)/python nbs/_slides.py

clean:  ## remove everything that was built, .venv included
	rm -rf .venv _docs _proc .quarto build dist *.egg-info runs student source slides.html
