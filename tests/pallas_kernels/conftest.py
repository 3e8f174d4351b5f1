"""What the kernel tests share: which implementations to run, lowering for CUDA."""

import jax
import pytest


def _implementations(*kernels):
    if jax.default_backend() == "gpu":
        return ("xla", *kernels)
    return ("xla", *(f"{name}_interpret" for name in kernels))


@pytest.fixture(params=_implementations("triton"))
def implementation(request):
    """Every implementation that can run here."""
    return request.param


@pytest.fixture(params=_implementations("triton", "mosaic"))
def attention_implementation(request):
    """Every implementation of attention that can run here."""
    if request.param.startswith("mosaic"):
        request.getfixturevalue("mosaic_serves")
    return request.param


@pytest.fixture
def mosaic_serves():
    """Skips what neither the Mosaic kernel nor its interpreter can run here."""
    if jax.__version_info__ < (0, 11):
        pytest.skip(
            "the Mosaic kernel needs jax >= 0.11, and that Python 3.12: make test "
            "PYTHON=python3.12"
        )
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    if jax.default_backend() == "gpu" and capability != "9.0":
        pytest.skip(f"the Mosaic kernel needs a Hopper GPU, not {capability}")


@pytest.fixture
def interpret():
    """Whether kernels must be interpreted here, for want of a GPU."""
    return jax.default_backend() != "gpu"


@pytest.fixture
def lower_for_cuda():
    """Lowers a function for an H100 that need not be there; returns the text."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        pytest.skip("needs a jax with AbstractDevice: pip install -U jax")
    device = jax.sharding.AbstractDevice("NVIDIA H100", 132, "gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)

    def lower(function, *specs) -> str:
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(function).trace(*specs)
            return traced.lower(lowering_platforms=("cuda",)).as_text()

    return lower
