# make demo: train the quickstart.      make test: the whole suite.      make test-fast: the suite without slow tests.
# make check: format, lint, types, import direction.      make wheel: build the package and test it on its own.
# make lock: update requirements*.txt from the ranges in pyproject.toml.      make bench: the table of docs/benchmarks.md.
# make audit-targets: compile a small network by the compilers of accelerators and compare its collectives and products
# with those in tests/golden; make golden-targets: renew these files.
# make chaos: kill runs, corrupt files and fill disks at random; SEEDS=0,1,2 names the random numbers.
# make gpu, make tpu: the first checks and measurements on an accelerator, in MINUTES=10; needs no network and makes no
# environment: PYTHON=python3 must have jax with the accelerator. OUTPUT=folder gets the results, PLATFORM=cpu rehearses.
# make slurm, make chromium: the Debian packages that tests/test_slurm.py and tests/test_page.py need (as root).
#
# PYTHON=/path/to/python names the interpreter of a new environment, VENV=folder another environment.
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
INSTALL := apt-get install -qq --yes --no-install-recommends
INSTALL_SLURM := $(INSTALL) slurm-wlm munge > /dev/null
INSTALL_CHROMIUM := $(INSTALL) chromium chromium-driver > /dev/null

# The first that starts is used: a name on the PATH may be a shim without an interpreter. Python 3.14 is not tested.
CANDIDATES := $(if $(PYTHON),"$(PYTHON)",python3.13 python3.12 python3.11 python3.14 python3)
USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
VERSION := import platform; print(platform.python_version())

ifneq ($(and $(PYTHON),$(wildcard $(RUN)),$(filter-out gpu tpu,$(or $(MAKECMDGOALS),demo))),)
  asked := $(shell "$(PYTHON)" -c '$(VERSION)' 2> /dev/null)
  there := $(shell $(RUN) -c '$(VERSION)' 2> /dev/null)
  ifneq ($(asked),$(there))
    $(error $(VENV) has Python $(there), and $(PYTHON) is $(or $(asked),no Python that starts): \
      remove $(VENV), or name another environment with VENV=.venv-other)
  endif
endif

.PHONY: demo test test-fast chaos check format lock wheel bench gpu tpu slurm chromium
.PHONY: compilers audit-targets golden-targets

demo: $(VENV)/runtime.installed
	$(RUN) launch.py --config=configs/quickstart.py

test: $(VENV)/dev.installed
	$(RUN) -m pytest

test-fast: $(VENV)/dev.installed
	$(RUN) -m pytest -m "not slow"

SEEDS := 0,1,2
chaos: $(VENV)/dev.installed
	$(RUN) tests/chaos.py --seeds=$(SEEDS)

check: $(VENV)/dev.installed
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(RUN) -m pytest -q tests/test_imports.py

format: $(VENV)/dev.installed
	$(VENV)/bin/ruff format
	$(VENV)/bin/ruff check --fix

# Each lock is for all supported Pythons and platforms. pip finds the CUDA libraries of PyTorch by itself.
LOCK = $(VENV)/bin/uv pip compile --quiet --universal --upgrade --no-annotate --no-emit-index-url \
	--no-emit-find-links --custom-compile-command='make lock' pyproject.toml
lock: $(VENV)/dev.installed
	$(LOCK) --output-file=requirements.txt
	$(LOCK) --output-file=requirements-dev.txt --constraint=requirements.txt --extra=dev
	$(LOCK) --output-file=requirements-export.txt --constraint=requirements-dev.txt --extra=export
	$(LOCK) --output-file=requirements-bench.txt --constraint=requirements-dev.txt --extra=bench
	grep -vE '^(nvidia|cuda|triton)[a-z0-9-]*==' requirements-bench.txt > $(VENV)/bench.lock
	mv $(VENV)/bench.lock requirements-bench.txt

wheel: $(VENV)/dev.installed
	rm -rf dist
	$(VENV)/bin/uv build --quiet
	sh tests/wheel.sh $(RUN) dist/*.whl

bench: $(VENV)/bench.installed
	$(RUN) benchmarks/table.py

# The compilers for the jax of the environment, 0.4 GB of downloads; none needs its hardware.
compilers: $(VENV)/compilers/installed

AUDIT = $(RUN) -m alexnet_jax audit --config=configs/quickstart.py --mesh=data:4,model:2 --images_per_device=8 \
	--compilers=$(VENV)/compilers --collectives
EACH_TARGET = for target in h100:8 v5e:2x4; do for precision in default float32; do \
	  golden=tests/golden/target_$$(echo $$target | tr : _)_$$precision.txt; \
	  $(AUDIT) --target=$$target --config.model.precision=$$precision > $(VENV)/target.txt || exit 1;
audit-targets: compilers
	@$(EACH_TARGET) \
	  diff -u $$golden $(VENV)/target.txt || \
	    { echo "$$target differs from $$golden; if that is intended: make golden-targets" >&2; exit 1; }; \
	done; done

golden-targets: compilers
	@$(EACH_TARGET) cp $(VENV)/target.txt $$golden; done; done

gpu tpu:
	"$(or $(PYTHON),python3)" benchmarks/accelerator.py --platform=$(or $(PLATFORM),$@) --minutes=$(or $(MINUTES),10) \
	  --output=$(or $(OUTPUT),.)

slurm chromium: export DEBIAN_FRONTEND = noninteractive
slurm:
	@PATH=$$PATH:/usr/sbin; command -v slurmctld > /dev/null || $(INSTALL_SLURM) || { apt-get update -qq && $(INSTALL_SLURM); }

chromium:
	@command -v chromedriver > /dev/null || $(INSTALL_CHROMIUM) || { apt-get update -qq && $(INSTALL_CHROMIUM); }

$(VENV)/created:
	@if [ -e $(VENV) ]; then \
	  echo "$(VENV) was not made by this Makefile: remove it, or name another environment with VENV=.venv-other" >&2; \
	  exit 1; \
	fi; \
	for python in $(CANDIDATES); do \
	  if "$$python" -c '$(USABLE)' 2> /dev/null; then \
	    echo "$(VENV): Python $$("$$python" -c '$(VERSION)')"; \
	    "$$python" -m venv $(VENV) && touch $@; exit; \
	  fi; \
	done; \
	echo No Python to use: none of $(CANDIDATES) "starts, is 3.11 or newer and can make virtual environments;" \
	  "install one (Debian: python3-venv), or make PYTHON=/path/to/python" >&2; exit 1

$(VENV)/runtime.installed: $(VENV)/created requirements.txt pyproject.toml
	$(PIP) --requirement requirements.txt
	$(PIP) --no-deps --editable .
	touch $@

$(VENV)/dev.installed: $(VENV)/runtime.installed requirements-dev.txt
	$(PIP) --requirement requirements-dev.txt
	touch $@

$(VENV)/bench.installed: $(VENV)/runtime.installed requirements-bench.txt
	$(PIP) --requirement requirements-bench.txt
	touch $@

$(VENV)/compilers/installed: $(VENV)/runtime.installed
	rm -rf $(VENV)/compilers
	$(PIP) --no-deps --target=$(VENV)/compilers $$($(RUN) -m alexnet_jax.audit.targets)
	touch $@
