"""Fixtures of the conversion's tests."""

import pytest

from tests.convert.checkpoints import byte_level_fields


@pytest.fixture
def tokenizer_fields():
    return byte_level_fields()


@pytest.fixture
def small_blocks(monkeypatch):
    """Tiny tensors in several blocks, the last one shorter, as large ones are read."""
    monkeypatch.setattr("convert.source.BLOCK_BYTES", 3000)
