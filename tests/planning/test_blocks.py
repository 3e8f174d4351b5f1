"""Which prompts are read together: each once, in few shapes, with little padding."""

import numpy as np
import pytest

from polarjax.planning.blocks import plan_blocks
from polarjax.planning.sizes import bucket

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
        # Short prompts leave rows empty that are wider than theirs.
        ([900, 9, 1000, 700, 9], [(4, 1024), (2, 16)]),
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
        for i in block.prompts:
            assert lengths[i] <= block.width == min(bucket(lengths[i]), context)
        assert block.rows == 1 or block.rows * block.width <= budget
        assert len(block.prompts) <= block.rows & -block.rows
    # Few rows beside the prompts' own.
    need = sum(min(bucket(n), context) for n in lengths)
    widths = {block.width for block in plan}
    spent = sum(block.rows * block.width for block in plan)
    assert spent <= need + len(widths) * (budget // 8)
    assert len({(block.rows, block.width) for block in plan}) <= 3 * len(widths)


def test_a_prompt_is_read_at_its_own_width_whatever_its_mates_are():
    def width(mates):
        [block] = [b for b in plan_blocks([5, *mates], 8192, BUDGET) if 0 in b.prompts]
        return block.width

    mates = [[], [1], [700] * 3, [700] * 7, [30, 700, 4000], [5000] * 40, [31] * 9]
    assert {width(each) for each in mates} == {16}


def test_the_parts_of_a_batch_fill_rows_of_their_own():
    lengths = [900, 9, 9, 5, 700, 20, 9, 600]  # of two devices, four each
    plan = plan_blocks(lengths, 8192, BUDGET, parts=2)
    assert [(block.rows, block.width) for block in plan] == [
        *((2, 1024), (1, 32), (4, 16)),
    ]
    assert sorted(plan[0].prompts) == [0, 4, 7]
    assert plan[1].prompts == (5,)
    assert sorted(i for block in plan for i in block.prompts) == list(range(8))
    for block in plan:
        for part in range(2):
            own = [i for i in block.prompts if i // 4 == part]
            assert len(own) <= block.rows
