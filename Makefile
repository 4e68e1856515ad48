# Every target but bench-gpu sets up what it needs in .venv first; `make demo` and `make test` are where to begin.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --editable ./kernels --editable ./assets

# Python keeps what it compiles: pytest rewrites every test file otherwise, which takes each of its processes seconds
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo report board test test-slow test-all test-rare test-pipelines test-diffusers mutants bench bench-gpu bench-gpu-dry tables weights types lint format docs setup dist release-check clean

demo: $(VENV)/.ready
	$(BIN)/python eval/studies/demo.py --out demo

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" --durations=15 --durations-min=1

test-slow: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n auto --dist worksteal -m "slow and not rare" --durations=15 --durations-min=1

test-all: test test-slow

# what CI leaves out: further cases of long matrices, whose values it has in others, and some long checks of further models
test-rare: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n auto --dist worksteal -m rare --durations=15 --durations-min=1

# every stock pipeline of diffusers with every method in every situation, of which `make test` and `make test-slow` run some
test-pipelines: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n auto --dist worksteal tests/pipelines/test_matrix.py --durations=15 --durations-min=1

# diffusers' own tests with dit-accel attached to every model they build; CI leaves it out, offline it skips
test-diffusers: $(VENV)/.ready-test
	$(BIN)/python tests/upstream/upstream_run.py $(ARGS)

# how many small defects in rules, plan, attachment, caches and kernels the tests notice; CI leaves it out, about an hour
mutants: $(VENV)/.ready-dev
	$(BIN)/python tests/mutants/mutants_run.py $(ARGS)

bench: $(VENV)/.ready
	$(BIN)/python kernels/bench/block_sparse.py

# on a machine with a GPU, torch and triton, and nothing else from the index: pieces of less than eight minutes, less than
# forty in all; a second start goes on where the first stopped, `gpu.py --list` names the pieces, `--piece 2` runs one
bench-gpu:
	PYTHONPATH=kernels $(PYTHON) kernels/bench/gpu.py

# the same way without a GPU: compiles what every case would launch, about an hour of one core from nothing
bench-gpu-dry: $(VENV)/.ready-test
	PYTHONPATH=kernels $(BIN)/python kernels/bench/gpu.py --dry-run sm_90

# the tables and pictures of README.md and docs/; what has run is kept, so it goes on where it stopped. From nothing the suites of
# wan-tiny and flux-tiny take about four core-hours (AMD EPYC, references included); the other runs were not timed together. Lines of
# studies that are at the tag studies-2026-12 alone stay as they are
SUITES := knee-wan-tiny knee-flux-tiny sparse-wan-tiny caches-wan-tiny caches-flux-tiny blocks-wan-plain blocks-flux-tiny
JUDGED := profiling-wan-plain profiling-flux-tiny guidance-wan-plain guidance-flux-tiny longer-wan-tiny larger-flux-tiny \
	guided-flux-tiny presets-wan-tiny presets-flux-tiny schedules-wan-tiny frontier-wan-tiny frontier-flux-tiny
TIMED := caches-time-wan-tiny blocks-time-wan-plain blocks-time-flux-tiny
RESULTS := eval/results
REPORTS := report-wan-tiny report-flux-tiny
BOARDS := board-wan-tiny board-flux-tiny
WORKERS ?= 2

tables: $(VENV)/.ready $(SUITES:%=suite-%) $(JUDGED:%=run-%) $(TIMED:%=timed-%) kernels/bench/results/cpu.jsonl
	$(BIN)/python kernels/bench/predictions.py --page docs/kernel-predictions.md
	$(BIN)/python eval/studies/demo.py --out demo
	cp demo/comparison.json eval/results/demo.json; cp demo/comparison.gif docs/demo.gif
	$(BIN)/python eval/studies/readme.py

suite-%: $(VENV)/.ready
	$(BIN)/dit-accel eval run eval/suites/$*.toml --workers $(WORKERS)
	$(BIN)/python eval/studies/suite_picture.py eval/suites/$*.toml

run-%: $(VENV)/.ready
	$(BIN)/dit-accel eval run eval/suites/$*.toml --workers $(WORKERS)

timed-%: $(VENV)/.ready
	$(BIN)/dit-accel eval run eval/suites/$*.toml --time

# both embedded models over the methods and their main combinations, on one page that opens offline, and their picture
report: $(REPORTS:%=run-%)
	$(BIN)/dit-accel eval report $(REPORTS:%=$(RESULTS)/%.jsonl) -o report.html
	$(BIN)/python eval/studies/lead_picture.py

# both embedded models by the protocol: a JSON file of each run, and the page of them
board: $(BOARDS:%=run-%)
	for name in $(BOARDS); do $(BIN)/dit-accel eval report $(RESULTS)/$$name.jsonl --json $(RESULTS)/board/$$name.json || exit; done
	$(BIN)/dit-accel eval board $(RESULTS)/board -o board.html

kernels/bench/results/cpu.jsonl: | $(VENV)/.ready
	$(BIN)/python kernels/bench/block_sparse.py --out $@

# the weights of LPIPS, which is skipped without them
weights: $(VENV)/.ready-test
	$(BIN)/dit-accel eval setup
	-$(BIN)/dit-accel eval setup --tier 2  # VBench's prompts

# the documentation site, into site/; a link that leads nowhere fails
docs: $(VENV)/.ready-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q -d site

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.ready-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.ready-dev

# source distributions and wheels of the commit, into dist/
dist: $(VENV)/.ready-dev
	$(BIN)/python tests/release/release_run.py --build $(ARGS)

# the same, then installed from an index on the disk and used from an empty folder; prints what would be uploaded
release-check: $(VENV)/.ready-dev
	$(BIN)/python tests/release/release_run.py $(ARGS)

clean:
	rm -rf $(VENV) .diffusers build kernels/build dist site demo report.html report.media board.html *.egg-info kernels/*.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: $(VENV)/bin/python pyproject.toml kernels/pyproject.toml assets/pyproject.toml
	@echo "Installing dit-accel and what it needs, torch among it, into $(VENV); that takes minutes, and pip is quiet meanwhile."
	$(INSTALL) --editable .
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	@echo "Installing what the tests need; minutes again."
	$(INSTALL) --editable ".[test]"
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready-test
	@echo "Installing what developers need besides."
	$(INSTALL) --editable ".[dev]"
	touch $@
