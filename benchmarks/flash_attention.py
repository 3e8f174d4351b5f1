"""FlashAttention 3 as `transformers` looks for it, where its wheel has another name.

`transformers` takes the module `flash_attn_interface` only from a distribution called
flash-attn-3, which nobody publishes for pip. A wheel of the same module under another
name does the same work; what says so is a folder of metadata beside it.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

MODULE, DISTRIBUTION, VERSION = "flash_attn_interface", "flash-attn-3", "3.0.0"
WHEEL = "tokenspeed-fa3==3.0.0.post20260810"  # Hopper, CUDA 13


def has_its_name() -> bool:
    """Whether a distribution of the wanted name says that the module is its own."""
    owners = packages_distributions().get(MODULE, [])
    return DISTRIBUTION in [name.replace("_", "-") for name in owners]


def wheel() -> str | None:
    """Names and versions of the distributions that have the module; None for none."""
    owners = dict.fromkeys(packages_distributions().get(MODULE, []))
    return ", ".join(f"{name} {version(name)}" for name in owners) or None


def write_metadata(folder: Path) -> None:
    """Describe in a folder a distribution that owns the module.

    Args:
      folder: that is there, and will be searched for modules.
    """
    made = folder / f"{DISTRIBUTION.replace('-', '_')}-{VERSION}.dist-info"
    made.mkdir()
    about = "Metadata-Version: 2.1", f"Name: {DISTRIBUTION}", f"Version: {VERSION}"
    files = {
        "METADATA": "\n".join(about) + "\n",
        "RECORD": f"{MODULE}.py,,\n",
        "top_level.txt": f"{MODULE}\n",
    }
    for name, text in files.items():
        (made / name).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def under_its_name() -> Iterator[None]:
    """Let `transformers` find the module within, in a folder that is gone afterwards.

    Raises:
      ImportError: if there is no such module, saying what to install.
      RuntimeError: if `transformers` was imported before: it looks but once.
    """
    if find_spec(MODULE) is None:
        raise ImportError(
            f"FlashAttention 3 needs the module {MODULE}: pip install --no-deps "
            f"{WHEEL}, and einops, or take --attention sdpa"
        )
    if has_its_name():
        yield
        return
    if "transformers" in sys.modules:
        raise RuntimeError("transformers was imported too early to find it")
    with tempfile.TemporaryDirectory() as folder:
        write_metadata(Path(folder))
        sys.path.append(folder)
        try:
            yield
        finally:
            sys.path.remove(folder)
