# Every target works alone, on a fresh clone with nothing else: the environment is made when it is missing or outdated.

SHELL := bash
PYTHON ?= python3# the interpreter that .venv is made with, 3.11 or later: `make test PYTHON=python3.12`
PREFIX ?= /opt/wangpd# where `make install` puts the daemon; the unit names it
SYSCONFDIR ?= /etc/wangpd
UNITDIR ?= /etc/systemd/system
PROCESSES ?= 2# in which the tests run; each takes one core and up to 4 GB of memory
MODELS_DIR ?= /var/lib/wangpd/models
LORAS_DIR ?= /var/lib/wangpd/loras

VENV := .venv
STAMP := $(VENV)/.installed
CLIENTS := tests/clients
NPM_STAMP := $(CLIENTS)/node_modules/.installed

PYTEST := $(VENV)/bin/python -m pytest --durations=10
PIP_INSTALL := pip install --disable-pip-version-check -c constraints.txt
# pip's errors, and of its news the downloads above 10 MB: torch is large, and silence for minutes looks like a hang.
PIP_NEWS := 2> >(sed '/^WARNING/d' >&2) | \
	awk '/ Downloading .*([0-9][0-9]\.[0-9] MB|GB)\)|^Installing/ {print "  " substr($$0, 1, 110); fflush()}'

.DEFAULT_GOAL := help
.PHONY: help demo run test test-models test-all crash soak attack fuzz check fix docs clean install

help:
	@echo 'make demo     set everything up, start wangpd, send it a prompt, show the progress, leave an MP4 in outputs/'
	@echo 'make run      run the daemon in the foreground: http://127.0.0.1:7860/api/docs (ARGS="--port 7861" …)'
	@echo 'make test     run the tests, two files at a time (PROCESSES=4, ARGS="-k queue" …)'
	@echo 'make test-all run those of every model of the catalogue too'
	@echo 'make crash    kill the daemon 120 times under load, and give it 10,000 tasks (CRASH_SEED=7 repeats a storm)'
	@echo 'make soak     10 minutes of clients, kills, full disks, clock jumps and freezes (SOAK_S=60 SOAK_SEED=7 SOAK_PHASES=save_full)'
	@echo 'make attack   attack a daemon behind nginx at full size, while honest clients measure (ATTACK_ONLY=slow_heads,ranges)'
	@echo 'make fuzz     mutate what comes from outside for an hour, guided by coverage (FUZZ_S=300 FUZZ_ONLY=form)'
	@echo 'make check    format, lint and types: says what is wrong, changes nothing'
	@echo 'make fix      format, and repair what the linter can'
	@echo 'make docs     write wangpd.toml and the tables of the documentation from the code'
	@echo 'make install  as root: $(PREFIX), $(SYSCONFDIR)/wangpd.toml and the systemd unit'
	@echo 'make clean    remove the environment and every cache; outputs/ and state/ stay'

# Written last: an interrupted pip leaves no stamp, and the next call starts again where pip left off.
$(STAMP): pyproject.toml constraints.txt
	@echo 'Setting up $(VENV) (a few minutes the first time) …'
	@$(PYTHON) -m venv $(VENV)
	@set -o pipefail; $(VENV)/bin/$(PIP_INSTALL) -e '.[test]' $(PIP_NEWS)
	@touch $@
	@echo 'Environment ready.'

# For the test of a TypeScript client. Without npm everything else is tested, and that test says what to install.
$(NPM_STAMP): $(wildcard $(CLIENTS)/package*.json)
	@if command -v npm >/dev/null; then \
		npm ci --prefix $(CLIENTS) --no-audit --no-fund --loglevel=error && touch $@; \
	else echo 'There is no npm here: sudo apt-get install nodejs npm'; fi

demo: $(STAMP)
	@$(VENV)/bin/python tools/run_demo.py

run: $(STAMP)
	@exec $(VENV)/bin/wangpd $(ARGS)

test: $(STAMP) $(NPM_STAMP)
	@$(PYTEST) -n $(PROCESSES) -m 'not proof' $(ARGS)

test-models: $(STAMP)
	@$(PYTEST) -n $(PROCESSES) -m proof $(ARGS)

test-all: test test-models

crash: $(STAMP)
	@CRASH_KILLS=$${CRASH_KILLS:-120} CRASH_TASKS=$${CRASH_TASKS:-10000} $(PYTEST) tests/test_crash.py -rP $(ARGS)

soak: $(STAMP)
	@SOAK_S=$${SOAK_S:-600} $(PYTEST) tests/test_soak.py -rP $(ARGS)

attack: $(STAMP)
	@ATTACK_SCALE=$${ATTACK_SCALE:-1} $(PYTEST) tests/test_attack.py -s $(ARGS)

fuzz: $(STAMP)
	@$(VENV)/bin/python -c 'import atheris' 2>/dev/null || $(VENV)/bin/$(PIP_INSTALL) -e '.[fuzz]'
	@$(VENV)/bin/python -m tests.fuzz.run

check: $(STAMP)
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

fix: $(STAMP)
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

docs: $(STAMP)
	@$(VENV)/bin/python -m tools.make_docs

clean:
	rm -rf $(VENV) $(CLIENTS)/node_modules build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Not editable, so the checkout may go away. build/ is removed before and after: setuptools packs what an older build left
# there, and root's files would be in the way of the next one. A configuration that is there is never overwritten.
install:
	@echo 'Installing into $(PREFIX) (a few minutes the first time) …'
	@$(PYTHON) -m venv $(PREFIX)/.venv
	@rm -rf build
	@set -o pipefail; $(PREFIX)/.venv/bin/$(PIP_INSTALL) . $(PIP_NEWS)
	@rm -rf build
	@install -D -m 644 README.md $(PREFIX)/README.md
	@install -D -m 644 -t $(PREFIX)/docs docs/*.md
	@install -D -m 644 wangpd.service $(UNITDIR)/wangpd.service
	@test -e $(SYSCONFDIR)/wangpd.toml || install -D -m 644 \
		<(sed -e 's|^\(models_dir *= *\)"[^"]*"|\1"$(MODELS_DIR)"|' \
			-e 's|^\(loras_dir *= *\)"[^"]*"|\1"$(LORAS_DIR)"|' wangpd.toml) $(SYSCONFDIR)/wangpd.toml
	@if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
	@echo 'Installed. Configuration: $(SYSCONFDIR)/wangpd.toml. Start: systemctl enable --now wangpd'
