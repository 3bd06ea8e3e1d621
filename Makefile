# The front door. Each target is one call of the `aletheia` command; `make` alone lists them.

PYTHON  ?= python3
PROFILE ?= deepseek-coder-7b
ALETHEIA = .venv/bin/aletheia

# make's words into the command's: SET="a=1 b=2", FROM=EXP-…, RESUME=1, BACKEND=…, ARGS=…
profile  = --profile "$(PROFILE)" $(foreach pair,$(SET),--set "$(pair)") $(ARGS)
from     = $(if $(FROM),--from "$(FROM)")
resume   = $(if $(filter-out 0,$(RESUME)),--resume)

.NOTPARALLEL:
.SILENT:
.PHONY: help setup setup-vllm setup-llamacpp setup-latency lock demo data sft dpo merge serve eval run report bench test lint

help:
	echo "make demo            the whole pipeline on the embedded tiny model, on a CPU"
	echo "make test            the tests            make lint   formatter, linter, types"
	echo "make data sft dpo merge PROFILE=…         the stages, in this order"
	echo "make serve PROFILE=… BACKEND=…            an OpenAI-compatible endpoint on 127.0.0.1:8000"
	echo "make setup-vllm BUILD=…                   vLLM's own environment: cuda where there is a GPU, else cpu"
	echo "make setup-llamacpp                       llama.cpp, for aletheia export gguf and BACKEND=llamacpp"
	echo "make setup-latency                        guidellm, for aletheia eval latency"
	echo "make eval PROFILE=…                       held-out rows, benchmarks, win-rate against the base"
	echo "make run EXP=EXP-…                        runs a planned record"
	echo "make report                               one HTML page of all records"
	echo "make bench                                our speed and memory next to what a user would run instead; some two hours"
	echo "with SET=\"sft_config.epochs=1.0 …\"  FROM=EXP-…  RESUME=1  ARGS=…"

setup: .venv/.installed
.venv/.installed: requirements.lock pyproject.toml bootstrap.py
	$(PYTHON) bootstrap.py

setup-llamacpp: setup
	.venv/bin/python -m serving.llamacpp_backend.setup
setup-vllm:
	$(PYTHON) -m serving.vllm_backend.setup $(if $(BUILD),--build "$(BUILD)")

setup-latency: .venv-latency/.installed
.venv-latency/.installed: eval/requirements-latency.txt .venv/.installed
	.venv/bin/python -m venv --clear .venv-latency # sees .venv's packages: torch and transformers are not installed twice
	echo "import sysconfig; print(sysconfig.get_path('purelib'))" > .venv-latency/where.py
	.venv/bin/python .venv-latency/where.py > "$$(.venv-latency/bin/python .venv-latency/where.py)/aletheia.pth"
	.venv-latency/bin/python -m pip install --disable-pip-version-check --quiet -r eval/requirements-latency.txt
	.venv-latency/bin/guidellm --version > $@

lock: # every package anew, from the names in pyproject.toml
	$(PYTHON) bootstrap.py --lock

demo: setup
	$(ALETHEIA) demo --profile "$(if $(filter command line environment,$(origin PROFILE)),$(PROFILE),tiny)" $(foreach pair,$(SET),--set "$(pair)") $(ARGS)

data: setup
	$(ALETHEIA) data snapshot $(profile)
sft: setup
	$(ALETHEIA) sft $(profile) $(from) $(resume)
dpo: setup
	$(ALETHEIA) dpo $(profile) $(from) $(resume)
merge: setup
	$(ALETHEIA) merge $(profile) $(from) $(resume)
serve: setup
	$(ALETHEIA) serve $(profile) $(from) $(if $(BACKEND),--backend "$(BACKEND)")
eval: setup
	$(ALETHEIA) eval $(profile) $(from)

run: setup
	$(ALETHEIA) exp run "$(EXP)" $(ARGS)
report: setup
	$(ALETHEIA) report $(ARGS)

bench: setup
	.venv/bin/python benchmarks/gate.py
	.venv/bin/python benchmarks/list_records.py
	.venv/bin/python benchmarks/merging.py
	.venv/bin/python benchmarks/serving.py
	.venv/bin/python benchmarks/training.py $(ARGS)

test: setup
	.venv/bin/python -m pytest $(ARGS)
lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
