# Everything a new checkout needs: `make demo` and `make test`. Python 3.11+ and git are enough.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test slow attack claims gpu lint checkpoint smoke clean

demo: .venv/ready
	rm -rf runs/quickstart
	$(BIN)/fedpeft simulate quickstart --out runs/quickstart

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not attack and not claims"

slow: .venv/ready
	$(BIN)/python -m pytest -m slow -o timeout=600

attack: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -m attack -o timeout=900

claims: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -m claims -o timeout=900

gpu: .venv/ready
	$(BIN)/python -m pytest -m gpu

smoke: .venv/ready
	$(BIN)/python -m fedpeft.simulations.smoke

lint: .venv/ready
	$(BIN)/ruff check .
	.ci/types $(BIN)/mypy

checkpoint: .venv/ready
	$(BIN)/python fedpeft/assets/make_tiny_vit.py

# A torch that is already there (a GPU machine's) is used; otherwise the pinned build is installed first, so that no
# dependency pulls another.
.venv/ready: pyproject.toml
	$(PYTHON) -c "import torch" 2>/dev/null && $(PYTHON) -m venv --system-site-packages .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch .venv/ready

clean:
	rm -rf .venv build dist *.egg-info
