"""Which prompts are read together: each once, in few shapes, with little padding."""

import numpy as np
import pytest

from polarjax.planning.blocks import plan_blocks, rows_of
from polarjax.planning.sizes import bucket

BUDGET = 16_384


@pytest.mark.parametrize(
    ("lengths", "calls"),
    [
        ([2048] * 8, [(4, 2048)] * 2),  # half as many rows of a short width
        ([1920] * 48, [(4, 2048)] * 12),
        ([3968] * 28, [(4, 4096)] * 7),
        ([32_767], [(1, 32_768)]),
        ([17_000, 5], [(1, 32_768), (2, 16)]),
        ([1], [(1, 16)]),
        ([5] * 3, [(4, 16)]),  # an empty row
        ([2048] * 5, [(4, 2048)] * 2),
        ([40_000], [(1, 40_960)]),  # the context is no power of two
        # Short prompts leave rows empty that are wider than theirs.
        ([900, 9, 1000, 700, 9], [(8, 1024), (8, 16)]),
    ],
)
def test_calls(lengths, calls):
    plan = plan_blocks(lengths, len(lengths), 40_960, BUDGET)
    assert [(block.rows, block.width) for block in plan] == calls


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [1, 100, 4096, BUDGET])
def test_each_prompt_once_and_no_more_than_a_bucket(seed, budget):
    rng = np.random.default_rng(seed)
    context, slots = 40_960, 64
    lengths = (2 ** rng.uniform(0, 15, rng.integers(1, 200))).astype(int).tolist()
    plan = plan_blocks(lengths, slots, context, budget)
    read = [i for block in plan for i in block.prompts]
    assert sorted(read) == list(range(len(lengths)))
    for block in plan:
        for i in block.prompts:
            assert lengths[i] <= block.width == min(bucket(lengths[i]), context)
        assert block.rows == 1 or block.rows * block.width <= budget
        assert len(block.prompts) <= block.rows & -block.rows
        # One shape for each width, whatever prompts there are.
        assert block.rows == rows_of(slots, block.width, budget) <= slots
    # Few rows beside the prompts' own: less than a call of each width.
    need = sum(min(bucket(n), context) for n in lengths)
    shapes = {(block.rows, block.width) for block in plan}
    spent = sum(block.rows * block.width for block in plan)
    assert spent <= need + sum((rows - 1) * width for rows, width in shapes)
    short = [rows * width for rows, width in shapes if width <= budget // 8]
    assert all(tokens <= budget // 2 for tokens in short)
    assert len(shapes) == len({block.width for block in plan})


def test_a_prompt_is_read_in_one_shape_whatever_its_mates_are():
    def shape(mates):
        plan = plan_blocks([5, *mates], 64, 8192, BUDGET)
        [block] = [b for b in plan if 0 in b.prompts]
        return block.rows, block.width

    mates = [[], [1], [700] * 3, [700] * 7, [30, 700, 4000], [5000] * 40, [31] * 9]
    assert {shape(each) for each in mates} == {(64, 16)}


def test_the_parts_of_a_batch_fill_rows_of_their_own():
    lengths = [900, 9, 9, 5, 700, 20, 9, 600]  # of two devices, four each
    plan = plan_blocks(lengths, 4, 8192, BUDGET, parts=2)
    assert [(b.rows, b.width) for b in plan] == [(4, 1024), (4, 32), (4, 16)]
    assert sorted(plan[0].prompts) == [0, 4, 7]
    assert plan[1].prompts == (5,)
    assert sorted(i for block in plan for i in block.prompts) == list(range(8))
    for block in plan:
        for part in range(2):
            own = [i for i in block.prompts if i // 4 == part]
            assert len(own) <= block.rows
