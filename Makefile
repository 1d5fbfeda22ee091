# make run: data → registered model.   make test: the quick tests.   make help: all targets.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
.PHONY: help run test test-slow test-all soak lint format report ui sync submit promote rollback \
  serve clean bench experiment lock

export VIRTUAL_ENV := $(CURDIR)/.venv
export PATH := $(VIRTUAL_ENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export RAY_USAGE_STATS_ENABLED := 0
ifdef Q
export TIGHTBOUND_VERBOSITY := quiet
endif
ifdef V
export TIGHTBOUND_VERBOSITY := verbose
endif

PYTHON ?= >=3.11,<3.14
INSTALLED := .venv/.installed

help:
	@echo "make run        data → sweep → train → evaluate → register → report; does only what changed;"
	@echo "                Q=1: faults alone; V=1: every step"
	@echo "make report     show the report page"
	@echo "make ui         MLflow's page of runs and registered models"
	@echo "make sync       send MLflow what it missed while it was down"
	@echo "make submit ADDRESS=http://host:8265   the same on a Ray cluster, results brought here;"
	@echo "                JOB=id: follow a job again; CANCEL=id: end it"
	@echo "make promote VERSION=3   champion by hand;  make rollback: the one before"
	@echo "make serve      the champion as a web service on port 5001"
	@echo "make test       the quick tests;  make test-all: also the slow ones"
	@echo "make soak       all bad input, and faults of the machine many times over; hours"
	@echo "make bench      speed against other libraries, side by side; MNIST=folder that has it"
	@echo "make experiment NAME=iwae-table1-vae-k1   a published setting (experiments/); MNIST=folder that has it"
	@echo "make lint       style and types;  make format: mend the style"
	@echo "make clean      remove what can be made again; registry and DVC's cache stay"
	@echo "make lock       pin the newest versions that pyproject.toml allows"

run: export TIGHTBOUND_ENSURE_FOLLOWS := 1
run: $(INSTALLED)
	@python -m pipeline.params
	@python -m pipeline.launch.preflight
	@dvc repro $(if $(V),,--quiet)
	@python -m pipeline.register --ensure
	@$(if $(Q),true,echo "report     reports/report.html")

test: $(INSTALLED)
	@pytest -q -m "not slow"

test-slow: $(INSTALLED)
	@pytest -q -m slow $(SLOW)

test-all: test test-slow

# All bad input and every fault many times over, rather than the share that CI takes: hours.
soak: $(INSTALLED)
	@TIGHTBOUND_SOAK=1 pytest -q --timeout 0 tests/pipeline/prepare/test_bad_data.py \
	  tests/pipeline/test_bad_input_commands.py tests/pipeline/test_disk.py \
	  tests/pipeline/train/test_train_faults.py tests/end_to_end/test_faults.py \
	  tests/end_to_end/test_two_nodes.py tests/end_to_end/test_kills.py \
	  tests/end_to_end/test_tracking_faults.py --junitxml=bench/soak.xml $(SOAK)

# CHANGES: more params on top of the overlay, such as CHANGES="training.epochs=10".
experiment: $(INSTALLED)
	@python -m pipeline.launch.experiment "$(or $(NAME),$(error which one? make experiment NAME=iwae-table1-vae-k1; all: experiments/))" \
	  $(if $(MNIST),data.root="$(abspath $(MNIST))") $(CHANGES)

# The peers have an environment of their own. MNIST: a root of torchvision.datasets.MNIST.
BENCHED := .venv-bench/.installed
bench: $(INSTALLED) $(BENCHED)
	@python -m bench.compare $(if $(MNIST),--mnist "$(MNIST)")

$(BENCHED): bench/requirements.txt | uv
	@$(UV) venv --quiet --clear --python "$(PYTHON)" .venv-bench
	@$(UV) pip install --quiet --python .venv-bench/bin/python -r $<
	@touch $@

lint: $(INSTALLED)
	@ruff check
	@ruff format --check
	@pyright

format: $(INSTALLED)
	@ruff check --fix
	@ruff format

report:
	@test -f reports/report.html || { echo "no report yet; make run makes it" >&2; exit 1; }
	@echo "$(CURDIR)/reports/report.html"
	@if [ -t 1 ]; then { command -v xdg-open >/dev/null && xdg-open reports/report.html; } \
	  || { command -v open >/dev/null && open reports/report.html; } || true; fi

ui: $(INSTALLED)
	@mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}"

sync: $(INSTALLED)
	@python -m pipeline.tracking --sync

submit: $(INSTALLED) $(CHECKED)
	@python -m pipeline.launch.submit $(if $(ADDRESS),--address "$(ADDRESS)") \
	  $(if $(JOB),--job "$(JOB)") $(if $(CANCEL),--cancel "$(CANCEL)")

promote: $(INSTALLED)
	@python -m pipeline.register.registry --promote "$(or $(VERSION),$(error which one? make promote VERSION=3))"

rollback: $(INSTALLED)
	@python -m pipeline.register.registry --rollback

serve: $(INSTALLED)
	@test -f reports/register.json || { echo "no model yet; make run makes it" >&2; exit 1; }
	@export MLFLOW_TRACKING_URI="$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}"; \
	name=$$(python -c 'import json; print(json.load(open("reports/register.json"))["model_name"])'); \
	mlflow models serve --model-uri "models:/$$name@champion" --env-manager local --port 5001 --timeout 600

clean:
	@rm -rf data/prepared models reports dvc_plots .tightbound/ray build *.egg-info \
	  .pytest_cache .ruff_cache .hypothesis $(CHECKED)
	@find vae pipeline tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "DVC's cache, mlflow.db and its artifacts are untouched; dvc repro brings the outputs back"

# uv, from PATH or into .venv-tools, which nothing else uses.
UV = $$(command -v uv || echo .venv-tools/bin/uv)

.PHONY: uv
uv:
	@command -v uv >/dev/null || test -x .venv-tools/bin/uv || { \
	  python3 -m venv .venv-tools && .venv-tools/bin/pip install --quiet uv; }

$(INSTALLED): requirements.lock pyproject.toml | uv
	@test -x .venv/bin/python || $(UV) venv --quiet --clear --python "$(PYTHON)" .venv
	@echo "installing requirements.lock into .venv (the first time takes some minutes)"
	@$(UV) pip install $$([ -t 2 ] || echo --quiet) --compile-bytecode -r requirements.lock
	@$(UV) pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

lock: | uv
	@$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --no-annotate --custom-compile-command "make lock" --extra pipeline --extra dev --extra server \
	  pyproject.toml --output-file requirements.lock
