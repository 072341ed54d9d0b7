# make course: the notebooks, start to end.  make help: the rest.
PYTHON   ?= python3
RECIPE   ?= quick
ARGS     ?=
PIP_ARGS ?=
VENV     := .venv
RUN      := $(VENV)/bin/python
READY    := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help course lab app test lint record ship benchmarks badges report clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## */  make \1@/p' Makefile | awk -F@ '{ printf "%-17s %s\n", $$1, $$2 }'
	@echo 'Variables: RECIPE=quick  ARGS="-p SEED=1"  PYTHON=python3.12  PIP_ARGS="..." (for pip install)'

course: $(READY)  ## run the notebooks; RECIPE=quick, ARGS for more options
	$(RUN) -m cifar_ft course --recipe $(RECIPE) $(ARGS)

lab: $(READY)  ## open the notebooks in JupyterLab
	$(RUN) -m jupyterlab notebooks --ServerApp.tornado_settings='{"websocket_max_message_size": 67108864}' $(ARGS)

app: $(READY)  ## the prediction widget as a page of its own, in your browser
	$(RUN) -m cifar_ft app $(ARGS)

test: lint  ## lint, then every test; ARGS='-m "not notebook and not browser and not slow"' for the quick ones
	$(RUN) -m pytest -n 2 $(ARGS)

lint: $(READY)  ## ruff, on modules and notebooks
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

record: $(READY)  ## run the course on an idle machine; keep notebooks 01 to 04, run and report
	$(RUN) -m tools.record quick

ship: $(READY)  ## train the model that is shipped, on an idle machine; keep it, its figures, notebooks 05 to 07
	$(RUN) -m tools.record ship

benchmarks: $(READY)  ## speed against what else there is, on an idle machine; takes long
	$(RUN) -m pip install $(PIP_ARGS) -r benchmarks/requirements.txt
	$(RUN) -m benchmarks all

badges: $(READY)  ## write the address of the remote origin, or ARGS=https://..., into badges and set-up cells
	$(RUN) -m tools.badges $(ARGS)

report: $(READY)  ## result tables and images, from results/
	$(RUN) -m tools.report

clean:  ## remove what the other targets made, except recorded runs
	rm -rf $(VENV) build course-output .pytest_cache .ruff_cache .hypothesis cifar_ft.egg-info

# The stamp goes first and comes back last: an interrupted installation is taken up again the next time.
$(READY): requirements.txt pyproject.toml
	@rm -f $@
	@command -v "$(PYTHON)" >/dev/null || { echo '$(PYTHON) not found; try: make PYTHON=/path/to/python3 ...' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("needs Python 3.10 or newer, $(PYTHON) is %d.%d; try: make PYTHON=python3.12 ..." % v[:2])'
	@$(RUN) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	$(RUN) -m pip install $(PIP_ARGS) -r requirements.txt
	@touch $@
