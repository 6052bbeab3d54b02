# make demo    the embedded data set, pre-training and zero-shot retrieval on this machine
# make demo-all   the whole chain: pre-training and every downstream task
# make app     a web page that asks the demo's model (make app CHECKPOINT="a.pth b.pth": your own)
# make test    the tests; those of the web page need a Chromium, which `make browser` finds or installs
# make fault-test   kills a training run 30 times, half of them while it saves, and resumes it
# make bench   every benchmark at the size for a CPU, results in benchmarks/RESULTS.md
# make lint    ruff
# How long each takes: docs/results.md.
# Each makes .venv first; `make demo PYTHON=python3 VENV=` uses the current interpreter's packages instead.
# A smaller download for machines without a GPU: make demo INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
INDEX ?=
CHECKPOINT ?= output/demo/checkpoint_04.pth

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY =
else
PY := $(VENV)/bin/python
READY = $(VENV)/.installed-$(1)
endif

# uv installs several times faster; where it cannot (a mirror that only pip is set up for), pip does.
PIP = $(VENV)/bin/python -m pip install --quiet
ifeq ($(strip $(INDEX)),)
INSTALL = $(PIP) uv && $(VENV)/bin/python -m uv pip install --quiet --python $(VENV)/bin/python -r $< || $(PIP)
else
INSTALL = $(PIP) --extra-index-url $(INDEX)
endif

.PHONY: demo demo-all app test browser fault-test bench lint format clean

demo: $(call READY,demo)
	$(PY) demo.py

demo-all: $(call READY,demo)
	$(PY) demo_all.py

app: $(call READY,app)
	$(PY) app.py --checkpoint $(CHECKPOINT)

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

format: $(call READY,test)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

$(VENV)/.installed-%: requirements-%.txt requirements.txt
	@echo "== installing $< into $(VENV) (PyTorch is a large download; a second call takes seconds)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=python3.12"; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(INSTALL) -r $<
	@touch $@

clean:
	rm -rf $(VENV) output data/demo
