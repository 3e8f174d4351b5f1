"""Fixtures of both ways to an adapter, training and recovery."""

import pytest

from polarjax.calibration.calibrate import Texts


@pytest.fixture
def no_text_is_read(monkeypatch):
    """Fail where work begins that a check should have refused."""

    def never(*_, **__):
        raise AssertionError("the work began")

    monkeypatch.setattr(Texts, "read", never)
