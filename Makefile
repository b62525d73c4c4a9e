# make demo: train the quickstart.   make test: the whole suite.   make check: format, lint, types, import direction.
# make slurm: the Debian packages that tests/test_slurm.py needs (as root).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL_SLURM := apt-get install -qq --yes --no-install-recommends slurm-wlm munge > /dev/null

.PHONY: demo test check format slurm

demo: $(VENV)/runtime.installed
	$(RUN) launch.py --config=configs/quickstart.py

test: $(VENV)/dev.installed
	$(RUN) -m pytest

check: $(VENV)/dev.installed
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(RUN) -m pytest -q tests/test_imports.py

format: $(VENV)/dev.installed
	$(VENV)/bin/ruff format
	$(VENV)/bin/ruff check --fix

slurm: export DEBIAN_FRONTEND = noninteractive
slurm:
	@PATH=$$PATH:/usr/sbin; command -v slurmctld > /dev/null || $(INSTALL_SLURM) || { apt-get update -qq && $(INSTALL_SLURM); }

$(VENV)/runtime.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info[:2] == (3, 11) or sys.exit("Python 3.11 is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/dev.installed: $(VENV)/runtime.installed requirements-dev.txt
	$(RUN) -m pip install --quiet --requirement requirements-dev.txt
	touch $@
