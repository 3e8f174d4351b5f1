"""Fixtures of the conversion's tests."""

import pytest


@pytest.fixture
def small_blocks(monkeypatch):
    """Tiny tensors in several blocks, the last one shorter, as large ones are read."""
    monkeypatch.setattr("convert.source.BLOCK_BYTES", 3000)
