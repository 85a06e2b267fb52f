# make demo: set up the lean runtime (no torch) and fuse a generated scene.
# make test: set up everything that the tests need and run them (QUICK=1: a few minutes' subset).
PYTHON ?= python3
VENV := .venv
DEV := .venv-dev

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(VENV)/bin/refusion demo

test: $(DEV)/installed
	$(DEV)/bin/python scripts/run_tests.py $(if $(QUICK),--quick)

lint: $(DEV)/installed
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

# torch first and by version: a range may fetch gigabytes of CUDA on a machine that has no use for it.
$(DEV)/installed: pyproject.toml
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(DEV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps triton==3.9.0
	$(DEV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[train,export,rtx,stream,mcap,webrtc,openvino,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(DEV) out runs build *.egg-info
