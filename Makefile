# `make train` learns Atari Pong, `make test` runs all checks and tests, `make docs` builds the
# documentation as a site. Each makes the virtual environment it needs the first time.

PYTHON ?= python3
VENV ?= .venv
LOGDIR ?= runs/pong
INSTALLED = $(VENV)/.installed
SOURCES = setup.py pyproject.toml $(wildcard */cc/* */*/cc/* */*/*/cc/*)

.PHONY: train test docs install clean

train: $(INSTALLED)
	$(VENV)/bin/python experiment.py --flagfile=configs/pong_fast.flags --logdir=$(LOGDIR)

test: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
# Three processes, a file at a time: many tests wait for processes to start or to end.
	$(VENV)/bin/python -m pytest -n 3 --dist loadfile

docs: $(INSTALLED)
	$(VENV)/bin/mkdocs build --quiet --strict
	@echo 'The documentation is in site/index.html'

install: $(INSTALLED)

$(INSTALLED): $(SOURCES)
	@command -v g++ >/dev/null || { echo 'A C++ compiler is needed to build the TensorFlow ops and' \
	  'g++ was not found; install it (Debian, Ubuntu: apt-get install g++).' >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { echo \
	  'Python 3.10 to 3.13 is needed; name one, for instance: make PYTHON=python3.12 train.' >&2; \
	  exit 2; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV) || { echo 'Python cannot make a' \
	  'virtual environment; install its venv module (Debian, Ubuntu: apt-get install python3-venv).' \
	  >&2; rm -rf $(VENV); exit 2; }
	$(VENV)/bin/pip install --quiet --disable-pip-version-check 'setuptools>=77' wheel \
	  'tensorflow==2.21.*'
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-build-isolation \
	  -e '.[dev,vizdoom,minigrid,mujoco,video]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info dynamic_batching/*.so impala/*/*.so impala/*/*/*.so
