# Everything runs in .venv, which the first command sets up; uv is used where it is installed.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
INSTALL := $(if $(shell command -v uv),uv pip install -q --python .venv/bin/python,.venv/bin/python -m pip install -q --disable-pip-version-check)
WORKDIR ?= runs/digits

.PHONY: demo test check-real check-faults mutate lint config-docs clean

demo: .venv/ready  ## all phases on the embedded digits
	python main.py --config=digits --workdir=$(WORKDIR)

test: .venv/dev lint  ## what CI runs; three processes, because some wait for others
	python -m pytest -n 3 --dist worksteal -m "not real and not slow and not faults"

check-real: .venv/torch  ## against PyTorch, on the data and weights of ../shared, further cases
	python -m pytest -m "(real or torch or slow) and not faults"

check-faults: .venv/dev  ## hundreds of kills and damaged checkpoints, half an hour
	python -m pytest -m faults -s

mutate: .venv/dev  ## mistakes in the core, one by one: does a test notice? half an hour
	python -m tests.mutations

lint: .venv/dev
	ruff check .
	ruff format --check .

config-docs: .venv/ready  ## docs/CONFIG.md, after a change to metamix_jax/defaults.py
	python -m metamix_jax.config > docs/CONFIG.md

clean:
	rm -rf .venv runs build

.venv/ready: requirements.txt constraints.txt
	@echo "setting up .venv (about a minute) ..."
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(INSTALL) -r requirements.txt -c constraints.txt
	touch $@

.venv/dev: .venv/ready requirements-dev.txt
	$(INSTALL) -r requirements-dev.txt -c constraints.txt
	touch $@

.venv/torch: .venv/dev
	$(INSTALL) torch==2.14.1 torchvision==0.29.1 timm==1.0.31
	touch $@
