# The first target that needs it builds .venv; see `make help`.

PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NEEDED_GIB := 5

# Bytecode is written on first use, which is sooner than for all that pip installs.
PIP_INSTALL := -m pip install --quiet --no-compile
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test test-all gpu test-kernels test-faults test-soak test-recipes test-automodels test-torch refusals lint clean

help:
	@echo "make demo   train a tiny DeepSeek-V4 on the CPU with context parallelism and without"
	@echo "make test   lint, then all tests except the slow ones, with fixed random seeds"
	@echo "make test-all   make test, then all tests with new random cases, the slow ones too,"
	@echo "                and short tests with every other supported AutoModel"
	@echo "make test-kernels   the Triton kernels compiled with every supported Triton and linted, and"
	@echo "                interpreted with poisoned memory: 15 minutes"
	@echo "make test-faults   ranks that are killed, stopped or raise errors; resuming at other sizes: 20 minutes"
	@echo "make test-soak   resource leak checks over 500 steps, and two trainings in one process: 20 minutes"
	@echo "make test-recipes   every pair of recipe options, and docs/support.md's table of them: 25 minutes"
	@echo "make test-automodels   demo and tests with every supported AutoModel, and docs/support.md's matrix of them"
	@echo "make gpu    kernel tests, and timing of one emulated rank, on this machine's GPU"
	@echo "make test-torch   demo and some tests with torch 2.10 and 2.15 (7 GB of download each)"
	@echo "make refusals   write docs/refusals.md's tables of broken input from the tests"
	@echo "make lint   ruff, mypy and import-linter"
	@echo "make clean  remove .venv and all that was built"
	@echo "PYTHON=/path/to/python picks the Python that .venv is made of."

demo: $(INSTALLED)
	$(BIN)/python -m nemo_dsv4_cp.cli.demo

# In the order of tests/conftest.py: the longest first.
TWO_FILES_AT_A_TIME := -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(BIN)/python -m pytest $(TWO_FILES_AT_A_TIME) -m "not slow"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(TWO_FILES_AT_A_TIME) -m "not slow" \
		tests/kernels/triton

# All tests with the release of constraints.txt, then some with every other one.
test-all: test
	HYPOTHESIS_PROFILE=random $(BIN)/python -m pytest $(TWO_FILES_AT_A_TIME)
	HYPOTHESIS_PROFILE=random TRITON_INTERPRET=1 $(BIN)/python -m pytest $(TWO_FILES_AT_A_TIME) \
		tests/kernels/triton
	$(MAKE) $(OTHER_RELEASES:%=test-briefly-%)

# Binaries of every kernel, dtype and architecture by every supported Triton, which nothing runs;
# then kernels interpreted, with every access checked.
TRITONS := 3.4.0 3.6.0 3.9.0
test-kernels: $(INSTALLED) $(TRITONS:%=.triton/%/.installed)
	$(BIN)/python -m pytest -n 2 tests/bench/test_compiled_kernels.py tests/bench/test_inner_loops.py \
		tests/bench/test_binaries.py tests/kernels/test_devices.py
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels/triton/test_memory.py \
		tests/kernels/triton/test_sanitizer.py tests/kernels/triton/test_attention.py \
		tests/kernels/triton/test_selection.py
	$(MAKE) $(TRITONS:%=test-binaries-%)

test-binaries-%: .triton/%/.installed
	PYTHONPATH=.triton/$* $(BIN)/python -m pytest -n 2 -m slow tests/bench/test_compiled_kernels.py

.PRECIOUS: .triton/%/.installed
.triton/%/.installed: $(INSTALLED)
	@echo "Installing triton $* into .triton/$*, beside that of $(VENV): 0.6 GB."
	rm -rf .triton/$*
	$(BIN)/python $(PIP_INSTALL) --no-deps --target .triton/$* triton==$*
	@touch $@

# Killing, stopping and resuming whole runs of AutoModel's CLI, one after the other.
test-faults: $(INSTALLED)
	$(BIN)/python -m pytest tests/faults

# What ranks hold after hundreds of steps; -rP prints the counts.
test-soak: $(INSTALLED)
	$(BIN)/python -m pytest -rP tests/soak

# Every pair of recipe options, one launch at a time, and the table of what was found.
RECIPES := build/recipes.json
test-recipes: $(INSTALLED)
	$(BIN)/python -m pytest -vv --recipes $(RECIPES) tests/recipes/test_options.py tests/recipes/all_pairs
	PYTHONPATH=. $(BIN)/python docs/recipes.py $(RECIPES)

# The kernel tests on this machine's GPU, then one report: certificates, and times by every path.
GPU_REPORT := build/gpu-report
gpu: $(INSTALLED)
	mkdir -p $(dir $(GPU_REPORT))
	-$(BIN)/python -m pytest -m "not slow" --junitxml=$(GPU_REPORT)-tests.xml tests/kernels/triton \
		tests/attention/test_split_linear.py
	$(BIN)/python -m nemo_dsv4_cp gpu-report --out $(GPU_REPORT) --tests $(GPU_REPORT)-tests.xml

# Releases of AutoModel, each in an environment on top of .venv: they pin different transformers.
OTHER_RELEASES := 0.6.0 0.5.0
RELEASES := 0.7.0 $(OTHER_RELEASES)
PINNED_BY_AUTOMODEL := nemo_automodel|transformers|datasets|numpy|safetensors|torchao|torchdata
PYTEST_OF_RELEASE = .releases/$*/bin/python -m pytest -p no:cacheprovider

# Hypothesis draws ratios too, and 0.5's own indexer is no oracle for ratio 4.
test-automodel-%: .releases/%/.installed
	@echo "nemo_automodel $*"
	.releases/$*/bin/python -m nemo_dsv4_cp.cli.demo
	$(PYTEST_OF_RELEASE) --matrix .releases/$*/matrix.json tests/automodel/test_contracts.py \
		tests/automodel/test_surface*.py tests/automodel/legacy/test_cp_utils.py tests/exchange tests/test_recipe.py \
		tests/attention/test_layer.py \
		--deselect tests/attention/test_layer.py::test_any_layer_equals_automodel

test-automodels: $(RELEASES:%=test-automodel-%)
	$(BIN)/python docs/matrix.py $(RELEASES:%=.releases/%/matrix.json)

test-briefly-%: .releases/%/.installed
	@echo "nemo_automodel $*"
	$(PYTEST_OF_RELEASE) tests/automodel/test_contracts.py tests/automodel/test_surface*.py \
		tests/automodel/legacy/test_cp_utils.py \
		tests/test_recipe.py::test_the_cli_trains_at_cp_2_as_at_cp_1_and_the_loss_falls

.PRECIOUS: .releases/%/.installed
.releases/%/.installed: $(INSTALLED)
	@echo "Installing nemo_automodel $* into .releases/$*, on top of $(VENV)."
	$(BIN)/python -m venv --clear .releases/$*
	grep -vE '^($(PINNED_BY_AUTOMODEL))==' constraints.txt > .releases/$*/constraints.txt
	echo "nemo_automodel==$*" >> .releases/$*/constraints.txt
	beneath=$$($(abspath $(BIN))/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	own=$$(.releases/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	echo "import site; site.addsitedir('$$beneath')" > $$own/beneath.pth
	.releases/$*/bin/python $(PIP_INSTALL) -c .releases/$*/constraints.txt nemo_automodel
	@touch $@

# Releases of torch beside the one of constraints.txt: the one of AutoModel's own lock, the newest.
OTHER_TORCHES := 2.10.0 2.15.0
PYTEST_OF_TORCH = .torch/$*/bin/python -m pytest -p no:cacheprovider

test-torch-%: .torch/%/.installed
	@echo "torch $*"
	.torch/$*/bin/python -m nemo_dsv4_cp.cli.demo
	$(PYTEST_OF_TORCH) --matrix .torch/$*/matrix.json tests/attention tests/exchange \
		tests/automodel/test_torch_api.py tests/test_recipe.py

test-torch: $(OTHER_TORCHES:%=test-torch-%)
	$(BIN)/python docs/matrix.py $(RELEASES:%=.releases/%/matrix.json) \
		$(OTHER_TORCHES:%=.torch/%/matrix.json)

.PRECIOUS: .torch/%/.installed
.torch/%/.installed: $(INSTALLED)
	@echo "Installing torch $* into .torch/$*, on top of $(VENV): about 7 GB."
	$(BIN)/python -m venv --clear .torch/$*
	beneath=$$($(abspath $(BIN))/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	own=$$(.torch/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	echo "import site; site.addsitedir('$$beneath')" > $$own/beneath.pth
	.torch/$*/bin/python $(PIP_INSTALL) torch==$*
	# The triton 3.9 of torch 2.15 breaks AutoModel's LoRA kernels at import: that of .venv serves.
	case "$$(.torch/$*/bin/python -c 'import triton; print(triton.__version__)')" in 3.9.*) \
		.torch/$*/bin/python -m pip uninstall --quiet --yes triton;; esac
	@touch $@

refusals: $(INSTALLED)
	PYTHONPATH=. $(BIN)/python docs/hostile.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

# torch comes first: with the rest, pip could settle for another build of it.
$(INSTALLED): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "No Python 3.11 or newer was found (PYTHON='$(PYTHON)')."; \
		echo "Install one, with its venv module, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; \
		exit 1; }
	@free=$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1048576) }'); \
	test -d $(VENV) || test $$free -ge $(NEEDED_GIB) || { \
		echo "$$free GiB are free in $(CURDIR), and $(VENV) and .releases need about $(NEEDED_GIB)."; \
		echo "Free some space, or clone the repository to a larger disk."; \
		echo "A torch without CUDA is the smallest: set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"; \
		exit 1; }
	@echo "Installing into $(VENV): some minutes, and about 3 GiB."
	@test -x $(BIN)/pip || "$(PYTHON)" -m venv --clear $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt torch
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .releases .torch .triton build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
