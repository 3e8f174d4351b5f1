"""Latencies of made-up traces, computed by hand."""

import dataclasses

import pytest

from polarjax.bench.latencies import Spread, Trace, summarise

# Sent at 1 s; a first token 0.5 s later, then 2 tokens after 0.2 s, 1 after 0.1 s.
A = Trace(10, 1.0, ((1.5, 1), (1.7, 2), (1.8, 1)))
B = Trace(20, 1.5, ((3.5, 1),))  # a single token: no TPOT, no gap
C = Trace(30, 1.8, ((2.0, 3), (4.0, 4)))  # sent when A ends


def test_one_request():
    assert A.new_tokens == 4 and A.ended == 1.8
    assert A.ttft == pytest.approx(0.5) and A.e2el == pytest.approx(0.8)
    assert A.tpot == pytest.approx(0.3 / 3)
    assert [n for _, n in A.gaps] == [2, 1]
    assert [s for s, _ in A.gaps] == pytest.approx([0.2, 0.1])
    assert B.tpot is None and B.gaps == ()
    assert C.tpot == pytest.approx(2.0 / 6) and C.gaps == ((2.0, 4),)


def test_a_load():
    served = summarise([A, B, C])
    assert (served.requests, served.prompt_tokens, served.new_tokens) == (3, 60, 12)
    assert served.seconds == 4.0
    assert served.requests_per_second == 0.75 and served.tokens_per_second == 3.0
    assert served.total_tokens_per_second == 18.0
    # B is the last to have a token: by then A has all four, C three of its seven.
    assert served.queued_seconds == 3.5
    assert served.queued_tokens_per_second == 8 / 3.5

    def ms(spread):
        return pytest.approx(dataclasses.astuple(spread), rel=1e-9)

    # 200, 500, 2,000 ms: nine of ten are below 500 + 0.8 x 1,500.
    assert (900, 500, 1700, 1970) == ms(served.ttft_ms)
    # Of 100 and 1,000 / 3 ms.
    assert (650 / 3, 650 / 3, 310, 331) == ms(served.tpot_ms)
    # Gaps of 100, 200, 2,000 ms; by tokens 100, 100, 100 and four times 500.
    assert (2300 / 3, 200, 1640, 1964) == ms(served.itl_ms)
    assert (2300 / 7, 500, 500, 500) == ms(served.itl_token_ms)
    assert (5000 / 3, 2000, 2160, 2196) == ms(served.e2el_ms)
    assert served.tokens_per_chunk == 12 / 6
    assert served.most_open == 2  # A has ended when C begins
    assert served.goodput is None
    assert summarise([C, A, B]) == served


def test_percentiles_lie_between_neighbours():
    found = Spread.of([0.001 * n for n in range(101)])
    assert dataclasses.astuple(found) == pytest.approx((50, 50, 90, 99))
    assert Spread.of([]) is None
    alone = summarise([B])
    assert alone.tpot_ms is None and alone.itl_ms is None
    assert alone.itl_token_ms is None and alone.ttft_ms is not None


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 500.1}, 2),  # A, C
        ({"ttft": 200.1}, 1),
        ({"tpot": 100.1}, 2),  # A, and B that has none
        ({"e2el": 2000.1}, 2),
        ({"ttft": 600, "tpot": 200}, 1),
        ({"ttft": 1}, 0),
    ],
)
def test_goodput(limits, good):
    found = summarise([A, B, C], limits).goodput
    assert found.requests == good and found.limits_ms == limits
    assert found.requests_per_second == good / 4


def test_a_limit_has_a_name():
    with pytest.raises(ValueError, match="no limit 'itl': there are ttft, tpot, e2el"):
        summarise([A], {"itl": 1.0})
