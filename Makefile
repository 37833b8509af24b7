# Everything a new checkout needs: `make demo` and `make test`. Python 3.11+ and git are enough.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# pip's advice (a newer pip, who it runs as, where its scripts lie) is no part of a demo.
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
export PIP_ROOT_USER_ACTION ?= ignore
export PIP_NO_WARN_SCRIPT_LOCATION ?= 1

# Tests of bit-equality, engines and claims, for `make kernels`: other processors have other kernels, which round otherwise.
ROUNDING := $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not attack" -o timeout=900 \
	tests/unit/test_ledger_runs.py tests/reference/test_client_dp_account.py tests/reference/test_cohort.py \
	tests/reference/test_bodies_in_a_federation.py tests/integration/test_toy_bodies.py \
	tests/integration/test_federated_continual.py tests/integration/test_engines.py tests/integration/test_resume.py \
	tests/integration/test_kill_points.py tests/integration/test_secagg_rounds.py tests/conformance tests/claims

.PHONY: demo test test-flower slow attack claims full kernels gpu browser lint docs checkpoint smoke clean

demo: .venv/ready
	$(BIN)/fedpeft simulate quickstart

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not attack and not claims and not full and not browser"

# The oldest and the newest minor of Flower that pyproject.toml allows.
test-flower: .venv/ready
	.ci/flower 1.40
	.ci/flower 1.42

slow: .venv/ready
	$(BIN)/python -m pytest -m slow -o timeout=600

attack: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -m attack -o timeout=900

claims: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -m claims -o timeout=900

full: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -m full -o timeout=900

kernels: .venv/ready
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 $(ROUNDING)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX MKL_ENABLE_INSTRUCTIONS=AVX $(ROUNDING)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(ROUNDING)
	! grep -q avx512f /proc/cpuinfo || ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE \
		MKL_ENABLE_INSTRUCTIONS=AVX512 $(ROUNDING)

gpu: .venv/ready
	$(BIN)/python -m pytest -m gpu

# Chromium and its driver come from the system: apt-get install chromium chromium-driver.
browser: .venv/ready .venv/axe/package/axe.min.js
	$(BIN)/python -m pytest -m browser -o timeout=600

.venv/axe/package/axe.min.js: .venv/ready
	$(BIN)/python -m pip install --quiet "selenium>=4.30,<5"
	mkdir -p .venv/axe
	cd .venv/axe && npm pack --silent axe-core@4.14.1 && tar xzf axe-core-4.14.1.tgz

smoke: .venv/ready
	$(BIN)/python -m fedpeft.simulations.smoke

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	.ci/types $(BIN)/mypy

# Warnings are errors. The site begins at build/docs/index.html.
docs: .venv/ready
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -b html . build/docs

checkpoint: .venv/ready
	$(BIN)/python fedpeft/assets/make_tiny_vit.py

# A torch that is already there (a GPU machine's) is used; otherwise the pinned build is installed first, so that no
# dependency pulls another.
.venv/ready: pyproject.toml
	@echo "Setting up .venv with the tools for tests and docs: 2.6 GB, some minutes (pip install . alone is 1.9 GB)."
	$(PYTHON) -c "import torch" 2>/dev/null && $(PYTHON) -m venv --system-site-packages .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch .venv/ready

clean:
	rm -rf .venv .venv-flower-* build dist *.egg-info
