"""What the kernel tests share: which implementations to run, lowering for CUDA."""

import jax
import pytest

_TRITON = "triton" if jax.default_backend() == "gpu" else "triton_interpret"


@pytest.fixture(params=["xla", _TRITON])
def implementation(request):
    """Every implementation that can run here."""
    return request.param


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
