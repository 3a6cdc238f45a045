# dlpipe_nb: `make` alone lists what it can do. It needs Python 3.10 or newer, and make.
# What it installs goes into .venv/ (the course) and .nbdev/ (the tool that turns notebooks into the package), nothing elsewhere.

PYTHON =
DATA = drawn
OUT = runs/course
ARGS =
# Processes that run the tests side by side, each with one thread for torch; 0 runs them one after the other in one process.
JOBS = 2
NBS = my_course
UPGRADE =
# Bytes that one message to a kernel may have: pictures are uploaded in these. Jupyter's own limit is 10 MB.
UPLOAD = 209715200

# Threads that wait for each other go to sleep, at once or (GNU's library, which torch brings on Linux) after a short spin. By
# default they spin for long, and where other programs use the cores too, that made training on two threads up to forty times
# slower; without any spin it is an eighth slower where the machine is quiet.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 2000

BIN = .venv/bin
TOOLS = .nbdev/bin
VENV = .venv/.installed
NBDEV = .nbdev/.installed
PIP = -m pip --disable-pip-version-check --no-input install

# The first Python that is new enough and can make environments; with PYTHON=… that one and no other.
# 3.10 to 3.13 are looked for before anything newer: constraints.txt was resolved for these.
PYTHONS = $(if $(PYTHON),newer "$(PYTHON)",python3 python3.12 python3.11 python3.13 python3.10 newer python3 python3.14 python3.15 python)
define FIND_PYTHON
top=13; python=; \
for p in $(PYTHONS); do \
    if [ "$$p" = newer ]; then top=99; continue; fi; \
    if "$$p" -c "import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, $$top))" > /dev/null 2>&1; \
    then python=$$p; break; fi; \
done; \
if [ -z "$$python" ]; then \
    echo "Expected Python 3.10 or newer, with its venv module; found none$(if $(PYTHON), in PYTHON=$(PYTHON))." >&2; \
    echo "Next: install one (Debian and Ubuntu: sudo apt install python3 python3-venv; macOS: brew install python@3.12;" >&2; \
    echo "anywhere: https://www.python.org/downloads), or name the one you have: make PYTHON=/path/to/python3 …" >&2; \
    exit 1; \
fi
endef

# pip's own log, cut down to what is being downloaded and how large it is. Errors come through whole.
define INSTALL
{ PYTHONWARNINGS=ignore $(1); echo $$? > $(2)/.status; } | sed -n -e 's/^ *Downloading \(.*\.whl.* [MG]B)\).*/    \1/p'; \
if [ "$$(cat $(2)/.status)" != 0 ]; then \
    echo "Not everything could be installed: see above. Next: look at the network and the free disk, then try again." >&2; \
    exit 1; \
fi
endef

.PHONY: help setup course lab test check notebooks pytest outputs export clean-notebooks wheel pins clean clean-env

help: ## this list
	@echo "make …"
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1|/p' Makefile | while IFS='|' read -r t d; do printf '  %-16s %s\n' "$$t" "$$d"; done

# ---- the course

course: setup ## set up, then take the drawn pets through the whole pipeline (DATA=drawn|pets|FOLDER, OUT=runs/course)
	@$(BIN)/dlpipe run --data "$(DATA)" --out "$(OUT)" $(ARGS)

lab: $(VENV) ## open the course: your own copies, without solutions, in my_course/ (NBS=nbs opens the source)
	@if [ "$(NBS)" != nbs ]; then $(BIN)/python tests/notebooks.py --copies "$(NBS)"; fi
	@page=$$(cd "$(NBS)" && ls 00_*.ipynb index.ipynb 2> /dev/null | sort | tail -n 1); \
	$(BIN)/python -m jupyterlab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url="/lab/tree/$(NBS)/$$page" \
	    --ServerApp.tornado_settings='{"websocket_max_message_size": $(UPLOAD)}' $(ARGS)

setup: $(VENV) $(NBDEV) ## make .venv and .nbdev, or bring them up to date, and switch on git's help with notebooks
	@if [ -e .git ] && command -v git > /dev/null && ! git config --local --get-all include.path | grep -qx '\.\./\.gitconfig'; \
	then git config --local --add include.path ../.gitconfig; fi

# ---- working on it

test: setup ## set up, then everything: check, notebooks, pytest; stops at the first that fails
	@$(MAKE) --no-print-directory check ARGS= || { echo "make test stopped at: check" >&2; exit 1; }
	@$(MAKE) --no-print-directory notebooks ARGS= || { echo "make test stopped at: notebooks" >&2; exit 1; }
	@$(MAKE) --no-print-directory pytest

check: $(NBDEV) ## are the notebooks clean, and is the package what they export? (changes nothing)
	@echo "== check: notebooks clean, package exported"
	@$(TOOLS)/python tests/gate.py

notebooks: $(VENV) ## run every notebook in a kernel of its own, in a copy (ARGS=05_training for one)
	@echo "== notebooks: each in a kernel of its own"
	@$(BIN)/python tests/notebooks.py $(ARGS)

pytest: $(VENV) ## only the tests (ARGS="-k core" for some)
	@echo "== pytest"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

outputs: $(VENV) $(NBDEV) ## run every notebook and store its outputs in nbs/ (ARGS=05_training for one)
	@$(BIN)/python tests/notebooks.py --store $(ARGS)
	@$(MAKE) --no-print-directory clean-notebooks

export: $(NBDEV) ## write dlpipe_nb/ from nbs/
	@$(TOOLS)/nbdev_export

clean-notebooks: $(NBDEV) ## strip execution counts and stray metadata from nbs/; outputs and code stay
	@HOME="$(CURDIR)/.nbdev" $(TOOLS)/nbdev_clean

wheel: $(NBDEV) ## build dist/dlpipe_nb-….whl
	@rm -rf build dist
	@$(TOOLS)/python -m build --no-isolation --wheel > .nbdev/wheel.log 2>&1 || { cat .nbdev/wheel.log >&2; exit 1; }
	@ls dist/*.whl

pins: $(NBDEV) ## resolve constraints.txt again from settings.ini (UPGRADE=--upgrade for the newest versions)
	@$(TOOLS)/python $(PIP) -q uv
	@sed -n '/^#/p' constraints.txt > .nbdev/pins
	@$(TOOLS)/uv pip compile setup.py --extra course --extra dev --universal --python-version 3.10 --no-build-isolation \
	    --python $(TOOLS)/python --no-annotate --no-header -q $(UPGRADE) -o constraints.txt > /dev/null
	@sed '/^#/d' constraints.txt >> .nbdev/pins && mv .nbdev/pins constraints.txt

clean: ## remove what the tools leave behind: build/, dist/, caches; never runs, my_course, data or the environments
	@rm -rf build dist _docs _proc .pytest_cache .hypothesis *.egg-info
	@find . \( -name .git -o -name .venv -o -name .nbdev -o -path ./runs -o -path ./my_course -o -path ./data -o -path ./registry \) -prune \
	    -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

clean-env: ## remove .venv and .nbdev; `make course` downloads and makes them again
	@rm -rf .venv .nbdev

# ---- the two environments. A stamp holds the folder and a checksum of what was
# installed. It is looked at each time (`always` never exists); while both are the same, nothing is installed.
always:

.venv/bin/python:
	@$(FIND_PYTHON); echo "Making .venv with $$("$$python" --version)"; "$$python" -m venv --clear .venv

.nbdev/bin/python:
	@$(FIND_PYTHON); echo "Making .nbdev with $$("$$python" --version)"; "$$python" -m venv --clear .nbdev

$(VENV): .venv/bin/python always
	@sum="$(CURDIR) $$(cat settings.ini constraints.txt setup.py pyproject.toml | cksum)"; \
	if [ "$$(cat $@ 2> /dev/null)" = "$$sum" ]; then exit 0; fi; rm -f $@; \
	echo "Installing the course's libraries into .venv (the first time: about 3 GB to download)"; \
	$(call INSTALL,$(BIN)/python $(PIP) --progress-bar off -c constraints.txt -e '.[course$(comma)dev]',.venv); \
	echo "$$sum" > $@; echo "    .venv is ready"

$(NBDEV): .nbdev/bin/python always
	@sum="$(CURDIR) $$(echo '$(NBDEV_PINS)' | cksum)"; \
	if [ "$$(cat $@ 2> /dev/null)" = "$$sum" ]; then exit 0; fi; rm -f $@; \
	echo "Installing the build tool into .nbdev"; \
	$(call INSTALL,$(TOOLS)/python $(PIP) --progress-bar off $(NBDEV_PINS),.nbdev); \
	echo "$$sum" > $@; echo "    .nbdev is ready"

# nbdev 2 wants an older fastcore than fastai does: hence an environment of its own.
NBDEV_PINS = "nbdev==2.4.14" "fastcore<2" "execnb<0.2" "setuptools>=77" build wheel
comma = ,
