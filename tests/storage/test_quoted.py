"""Quotations in messages: one line, never long, and soon made."""

import time

import numpy as np
import pytest

from polarjax.storage.quoted import quoted


class Odd:
    def __repr__(self):
        raise RuntimeError("no\nrepr")


class Lines:
    def __repr__(self):
        return "line\n" * 1000


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (5, "5"),
        (-1.5, "-1.5"),
        ("a'b", '"a\'b"'),
        ([1, None], "[1, None]"),
        ({1: "x"}, "{1: 'x'}"),
        (10**400, "an integer of 1329 bits"),
        ([10**6000], "[an integer of 19932 bits]"),  # which has no `repr`
        ("\n\ud800", r"'\n\ud800'"),
    ],
)
def test_what_is_shown(value, shown):
    assert quoted(value) == shown


def test_it_is_one_short_line_and_takes_no_time():
    values = [
        Odd(),
        Lines(),
        [Lines()] * 5,
        "x\n" * 10**7,
        b"\n" * 10**7,
        bytearray(10**7),
        ["a" * 10**6] * 10**6,
        [[[[[[1] * 99] * 99] * 99] * 99] * 99] * 99,
        tuple(range(10**6)),
        set(range(10**6)),
        frozenset(range(10**6)),
        dict.fromkeys(range(10**6), "x" * 10**6),
        range(2**80),
        np.ma.masked_array([1, 2], [0, 1]),
        np.zeros((99, 99)),
        np.array(["x" * 10**6]),
    ]
    start = time.process_time()
    for value in values:
        text = quoted(value)
        assert 0 < len(text) <= 60 and text.isprintable(), type(value)
        assert len(quoted(value, 20)) <= 20
    assert time.process_time() - start < 1
