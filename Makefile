# make setup: .venv with pixeldip, all extras and the development tools, at pinned versions
# make demo:  the tour; ends with the path of its report
# make test:  the tests

PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "pixeldip needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "no venv module: install it first (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

demo: setup
	$(BIN)/pixeldip demo

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf .venv build src/*.egg-info
