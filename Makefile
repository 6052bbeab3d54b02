# make demo        the embedded data set, pre-training and zero-shot retrieval on this machine
# make demo-all    the whole chain: pre-training and every downstream task
# make mine        a small model of your photos and captions, and a page to search them with
#                  (make mine PHOTOS=photos CSV=captions.csv [OUT=output/mine]; docs/mine.md)
# make ablation    what each loss helps: trainings without some, three seeds (some hours; docs/evidence.md)
# make app         a web page that asks the demo's model (make app CHECKPOINT="a.pth b.pth": your own)
# make test        the tests; those of the web page need a Chromium, which `make browser` finds or installs
# make fault-test  kills a training run 30 times, half of them while it saves, and resumes it
# make bench       every benchmark at the size for a CPU, results in benchmarks/RESULTS.md
# make lint        ruff, and pyright: no import is unresolved;  make format: mends what ruff can
# make lock        requirements.lock anew, with the newest versions that requirements*.txt allow
# make clean       removes the environment and what the demo made
# How long each takes: docs/results.md.
#
# Each first installs the versions of requirements.lock into .venv. Other choices:
#   make test LOCK=                   the newest that requirements*.txt allow, into .venv-newest
#   make demo PYTHON=python3.12       another Python; with VENV= its own packages, nothing is installed
#   make demo INDEX=https://download.pytorch.org/whl/cpu       a smaller download for machines without a GPU

PYTHON ?= python3
LOCK = requirements.lock
VENV ?= $(if $(LOCK),.venv,.venv-newest)
INDEX ?=
CHECKPOINT ?= output/demo/checkpoint_04.pth
OUT ?= output/mine

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY =
else
PY := $(VENV)/bin/python
READY = $(VENV)/.installed-$(1)
endif

# uv installs several times faster; where it cannot (a mirror that only pip is set up for), pip does.
# Both compile what they install: where Python may not write bytecode, every start would compile it anew.
PIP = $(PY) -m pip install -qq --disable-pip-version-check
UV = $(PIP) uv && $(PY) -m uv pip install --quiet --compile-bytecode --python $(PY)
WHAT = -r $< $(if $(LOCK),-c $(LOCK))
INSTALL = $(if $(INDEX),$(PIP) --extra-index-url $(INDEX) $(WHAT),$(UV) $(WHAT) || $(PIP) $(WHAT))

.PHONY: help demo demo-all ablation mine app test browser fault-test bench lint format lock clean

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

demo: $(call READY,demo)
	$(PY) -m simla.demo.pretrain

demo-all: $(call READY,demo)
	$(PY) -m simla.demo.all_tasks

ablation: $(call READY,demo)
	$(PY) -m simla.demo.ablation

mine: $(call READY,app)
	$(PY) -m simla.demo.mine --photos "$(PHOTOS)" --csv "$(CSV)" --output_dir "$(OUT)"
	$(PY) -m simla.web --checkpoint "$(OUT)/retrieval/checkpoint_best.pth" --images "$(PHOTOS)" \
		--index "$(OUT)/index" --demo_data "$(OUT)/data"

app: $(call READY,app)
	$(PY) -m simla.web --checkpoint $(CHECKPOINT)

browser: $(call READY,test)
	$(PY) tests/browser.py

test: $(call READY,test)
	-$(PY) tests/browser.py
	$(PY) -m pytest -n 2 --dist loadfile

fault-test: $(call READY,test)
	$(PY) tests/fault_test.py

bench: $(call READY,test)
	$(PY) benchmarks/run.py

lint: $(call READY,test)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m basedpyright --pythonpath $(PY)

format: $(call READY,test)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

lock: $(call READY,test)
	$(PIP) uv
	$(PY) -m uv pip compile --quiet --upgrade --universal --python-version 3.10 --no-annotate \
		--custom-compile-command "make lock" requirements-test.txt -o requirements.lock

$(VENV)/.installed-%: requirements-%.txt requirements.txt $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=python3.12"; exit 1; }
	@echo "== installing $< into $(VENV): downloads 3.2 GB on Linux (3.0 of them PyTorch and CUDA), 0.3 on a Mac; for tests 0.3 more"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(INSTALL)
	@touch $@

clean:
	rm -rf $(VENV) output data/demo
