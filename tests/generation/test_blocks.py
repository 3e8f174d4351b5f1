"""Which prompts are read together: each once, in few shapes, with little padding."""

import numpy as np
import pytest

from polarjax.generation.blocks import plan_blocks
from polarjax.generation.requests import bucket

BUDGET = 16_384


@pytest.mark.parametrize(
    ("lengths", "calls"),
    [
        ([2048] * 8, [(8, 2048)]),
        ([1920] * 48, [(8, 2048)] * 6),
        ([3968] * 28, [(4, 4096)] * 7),
        ([32_767], [(1, 32_768)]),
        ([17_000, 5], [(1, 32_768), (1, 16)]),
        ([1], [(1, 16)]),
        ([5] * 3, [(4, 16)]),  # an empty row
        ([2048] * 5, [(4, 2048), (1, 2048)]),  # three would cost too much
        ([40_000], [(1, 40_960)]),  # the context is no power of two
        # Short prompts take the rows that are empty, no others.
        ([900, 9, 1000, 700, 9], [(4, 1024), (1, 16)]),
    ],
)
def test_calls(lengths, calls):
    plan = plan_blocks(lengths, 40_960, BUDGET)
    assert [(block.rows, block.width) for block in plan] == calls


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [1, 100, 4096, BUDGET])
def test_each_prompt_once_and_no_more_than_a_bucket(seed, budget):
    rng = np.random.default_rng(seed)
    context = 40_960
    lengths = (2 ** rng.uniform(0, 15, rng.integers(1, 200))).astype(int).tolist()
    plan = plan_blocks(lengths, context, budget)
    read = [i for block in plan for i in block.prompts]
    assert sorted(read) == list(range(len(lengths)))
    for block in plan:
        longest = max(lengths[i] for i in block.prompts)
        assert longest <= block.width == min(bucket(longest), context)
        assert block.rows == 1 or block.rows * block.width <= budget
        assert len(block.prompts) <= block.rows & -block.rows
    # Rows of prompts' own buckets, and few beside them.
    need = sum(min(bucket(n), context) for n in lengths)
    widths = {block.width for block in plan}
    spent = sum(block.rows * block.width for block in plan)
    assert spent <= need + len(widths) * (budget // 8)
    assert len({(block.rows, block.width) for block in plan}) <= 3 * len(widths)
