"""The default model as `transformers` runs it."""

import pytest


@pytest.fixture(scope="session")
def smollm2_torch(smollm2_gguf):
    """The default model in torch, float32, on the CPU."""
    torch = pytest.importorskip("torch", reason="needs it: pip install torch")
    transformers = pytest.importorskip(
        "transformers", reason="needs it: pip install transformers"
    )
    pytest.importorskip("accelerate", reason="needs it: pip install accelerate")
    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()
