"""Fixtures that several folders share."""

import dataclasses
import gc
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

# Before jax starts: tests of sharding need several devices. On a CPU most of the time
# goes into compiling tiny programs, half of it into emitters that later versions have
# made faster, a third of the rest into optimising them.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8"
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jax").startswith("0.10."),
)

# A test's programs are no use to the user whose cache folder it is.
os.environ["POLARJAX_NO_COMPILE_CACHE"] = "1"
if importlib.util.find_spec("jax_cuda13_plugin") is None:  # for processes of tests too
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
# Nor to any later test: to find that out, and where each line is from, takes a tenth.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import jax
import pytest
from filelock import FileLock
from jax._src import compiler

_COMPILED = {"as users do": False}
REPOSITORY = Path(__file__).resolve().parent.parent

# A GPU's default for float32 is TF32, which is no reference.
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_let_go():
    """Linux allows a process 65,530 memory maps; a compiled program takes several.

    The whole suite's would not fit, and XLA's answer to that is to abort.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def as_users_do():
    """A test that asks for it has its programs compiled as for users."""


@pytest.fixture(scope="session", autouse=True)
def emitters_of_whole_programs():
    """No setting of jax says which emitters a program has, where the flags say none."""
    if not jax.__version__.startswith("0.10."):
        yield
        return
    original = compiler.get_compile_options

    def options(*args, **kwargs):
        asked = kwargs.pop("env_options_overrides", None) or {}
        if _COMPILED["as users do"]:
            asked = {"xla_cpu_use_fusion_emitters": True, **asked}
        return original(*args, env_options_overrides=asked, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", options)
        yield


@pytest.fixture(autouse=True)
def selection_is_worth_it(monkeypatch):
    """On a measured GPU nothing would be selected in models as small as those of tests.

    Tests of that decision, which plant overheads of their own, say what they expect.
    """
    if jax.default_backend() == "gpu":
        monkeypatch.setattr("polarjax.planning.crossover.shipped", lambda kind: ())


# Half a minute or more each, the longest first: what begins last should end soon, or
# one worker waits for the other.
_LONG = (
    "engine/test_any_load.py",
    "mesh/test_cut.py",
    "training/test_train.py",
    "evaluation/test_shipped_adapter.py",
    "mesh/test_processes.py",
    "training/test_recovery.py",
    "evaluation/test_scoring.py",
    "evaluation/test_tasks.py",
    "calibration/test_calibrate.py",
    "cli/test_calibrate.py",
    "engine/test_engine.py",
    "cli/test_cli.py",
    "engine/test_batches.py",
    "evaluation/test_mesh.py",
    "convert/test_smollm2.py",
    "engine/test_smollm2.py",
    "bench/test_meshes.py",
    "bench/test_bench.py",
    "calibration/test_recover.py",
)


def pytest_collection_modifyitems(items):
    """Long files come first, the others as they are found."""
    here = Path(__file__).parent
    places = {here / name: i for i, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish():
    """Tracing makes many objects: to look for garbage took a tenth of the time."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def pytest_runtest_setup(item):
    if jax.default_backend() == "cpu":
        # But a real model's numbers take longer to compute than its program to compile.
        real = any(name.startswith("smollm2") for name in item.fixturenames)
        whole = real or "as_users_do" in item.fixturenames
        jax.config.update("jax_disable_most_optimizations", not whole)
        _COMPILED["as users do"] = whole
    if "gpu" in item.keywords and jax.default_backend() != "gpu":
        pytest.skip("needs a GPU, and jax for it: make test-gpu")
    for mark in item.iter_markers("devices"):
        if jax.device_count() < mark.args[0]:
            pytest.skip(
                f"needs {mark.args[0]} devices, here are {jax.device_count()} (host "
                "devices will do: JAX_PLATFORMS=cpu)"
            )


@pytest.fixture(scope="session")
def run_rtol() -> float:
    """How far two runs of the same float32 work may lie apart, relatively.

    A CPU repeats every bit. A GPU adds in any order, and may choose other kernels in
    another process, unless XLA_FLAGS=--xla_gpu_deterministic_ops=true.
    """
    return 1e-4 if jax.default_backend() == "gpu" else 0.0


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The default model's file, which `make model` fetches."""
    default = REPOSITORY / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path = Path(os.environ.get("POLARJAX_SMOLLM2_GGUF", default))
    if not path.exists():
        pytest.skip(f"needs the default model at {path}: `make model` fetches it")
    return path


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable) -> Path:
    """A folder that all workers of a run share, filled by the first that needs it."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, begun = base / name, base / f"{name}.begun"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            shutil.rmtree(begun, ignore_errors=True)
            make(begun)
            begun.rename(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf, tmp_path_factory) -> Path:
    """The default model, converted at float32; read only."""
    from convert import convert

    def make(folder):
        convert(smollm2_gguf, folder, dtype="float32", progress=False)

    return made_once(tmp_path_factory, "smollm2", make)


@pytest.fixture(scope="session")
def smollm2_in_torch(smollm2_gguf, tmp_path_factory) -> Callable:
    """Loads the default model as `transformers` reads its file, float32."""
    torch = pytest.importorskip("torch", reason="needs it: pip install torch")
    transformers = pytest.importorskip(
        "transformers", reason="needs it: pip install transformers"
    )
    pytest.importorskip("accelerate", reason="needs it: pip install accelerate")
    load = transformers.AutoModelForCausalLM.from_pretrained

    def make(folder):  # which takes half a minute
        file = {"gguf_file": smollm2_gguf.name}
        model = load(smollm2_gguf.parent, dtype=torch.float32, **file)
        model.hf_quantizer = None  # its numbers are float32 by now
        del model.config.quantization_config
        model.save_pretrained(folder)

    folder = made_once(tmp_path_factory, "smollm2-torch", make)
    return lambda **changes: load(folder, dtype=torch.float32, **changes).eval()


@pytest.fixture(scope="session")
def smollm2_torch(smollm2_in_torch):
    """The default model in torch, float32."""
    return smollm2_in_torch()


@pytest.fixture(scope="session")
def smollm2(smollm2_folder):
    """The default model in memory, float32."""
    import polarjax

    return polarjax.load(smollm2_folder)


@pytest.fixture(scope="session")
def smollm2_pair(request, smollm2, smollm2_in_torch):
    """The default model's first layers, as many as asked, and the same in torch.

    For tests of what is made of logits: a few layers take a third of the time.
    """
    layers = request.param
    weights = {
        name: value
        for name, value in smollm2.weights.items()
        if not name.startswith("layers_") or int(name[7:]) < layers
    }
    config = dataclasses.replace(smollm2.config, layers=layers)
    ours = dataclasses.replace(smollm2, weights=weights, config=config)
    return ours, smollm2_in_torch(num_hidden_layers=layers)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Texts and tasks that are not part of the repository."""
    default = REPOSITORY.parent / "shared" / "data"
    path = Path(os.environ.get("POLARJAX_DATA", default))
    if not path.is_dir():
        pytest.skip(
            f"needs texts and tasks at {path}: set POLARJAX_DATA to where they are"
        )
    return path
