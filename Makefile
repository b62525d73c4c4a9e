# make demo: train the quickstart.   make test: the whole suite.   make check: format, lint, types, import direction.
# make bench: all benchmarks, and the table in the README of them.
# make slurm, make chromium: the Debian packages that tests/test_slurm.py and tests/test_page.py need (as root).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := apt-get install -qq --yes --no-install-recommends
INSTALL_SLURM := $(INSTALL) slurm-wlm munge > /dev/null
INSTALL_CHROMIUM := $(INSTALL) chromium chromium-driver > /dev/null

.PHONY: demo test check format bench slurm chromium

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

bench: $(VENV)/bench.installed
	$(RUN) benchmarks/table.py

slurm chromium: export DEBIAN_FRONTEND = noninteractive
slurm:
	@PATH=$$PATH:/usr/sbin; command -v slurmctld > /dev/null || $(INSTALL_SLURM) || { apt-get update -qq && $(INSTALL_SLURM); }

chromium:
	@command -v chromedriver > /dev/null || $(INSTALL_CHROMIUM) || { apt-get update -qq && $(INSTALL_CHROMIUM); }

$(VENV)/runtime.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info[:2] == (3, 11) or sys.exit("Python 3.11 is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/dev.installed: $(VENV)/runtime.installed requirements-dev.txt
	$(RUN) -m pip install --quiet --requirement requirements-dev.txt
	touch $@

$(VENV)/bench.installed: $(VENV)/runtime.installed requirements-bench.txt
	$(RUN) -m pip install --quiet --requirement requirements-bench.txt
	touch $@
