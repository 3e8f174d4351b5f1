"""Fixtures that several folders share."""

import gc
import importlib.util
import os
from pathlib import Path

# Before jax starts: tests of sharding need several devices. Without a GPU most of the
# time goes into compiling tiny programs, a third of it into LLVM's optimisations.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0"
    * (importlib.util.find_spec("jax_cuda13_plugin") is None),
)

# A test's programs are no use to the user whose cache folder it is.
os.environ["POLARJAX_NO_COMPILE_CACHE"] = "1"

import jax
import pytest

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
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def selection_is_worth_it(monkeypatch):
    """On a measured GPU nothing would be selected in models as small as those of tests.

    Tests of that decision, which plant overheads of their own, say what they expect.
    """
    if jax.default_backend() == "gpu":
        monkeypatch.setattr("polarjax.planning.crossover.shipped", lambda kind: ())


def pytest_runtest_setup(item):
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


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf, tmp_path_factory) -> Path:
    """The default model, converted at float32."""
    from convert import convert

    folder = tmp_path_factory.mktemp("smollm2") / "float32"
    convert(smollm2_gguf, folder, dtype="float32", progress=False)
    return folder


@pytest.fixture(scope="session")
def smollm2(smollm2_folder):
    """The default model in memory, float32."""
    import polarjax

    return polarjax.load(smollm2_folder)


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
