"""The engine's promises, measured at toy size: each of them, and what breaks one."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import engine_promises, promises_table
from benchmarks.promises import common, sameness, sizes, soak
from benchmarks.promises.sameness import Step
from polarjax.engine.flight import Landed
from polarjax.engine.pages import PagePool
from polarjax.engine.scheduler import Scheduler

SMALL = ("--shape", "toy-llama", "--repeats", "1", "--minutes", "0.03")

# What holds on any machine.
UNTIMED = {
    "compilations",
    "most_distinct",
    "different",
    "preemptions",
    "pages_lost",
    "books_wrong",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of all promises, by name, from the file that a run wrote."""
    path = tmp_path_factory.mktemp("promises") / "promises.json"
    status = engine_promises.main(
        [*engine_promises.NAMES, *SMALL, "--output", str(path)]
    )
    [run] = engine_promises.read(path)
    found = {result["promise"]: result for result in run["results"]}
    assert tuple(found) == engine_promises.NAMES
    assert run["model"] == "toy-llama" and run["slots"] == 4 and run["device"] == "cpu"
    assert run["command"].startswith("python -m benchmarks.engine_promises ready step")
    holds = [each["holds"] for one in found.values() for each in one["wanted"]]
    assert status == int(False in holds)
    return found | {"path": path}


@pytest.mark.parametrize("name", engine_promises.NAMES)
def test_what_is_no_matter_of_time_holds_of_a_toy(results, name):
    result = results[name]
    for each in result["wanted"]:
        assert each["figure"] in result["found"]
        expected = each["figure"] in UNTIMED
        assert each["holds"] is (True if expected else None), each


def test_figures_are_of_what_they_say(results):
    step, prefill, prefix, invariant, preempt, soaked, ready = (
        results[name]["found"] for name in (*engine_promises.MEASURED, "ready")
    )
    toy = sizes.TOY
    for kind in ("dense", "half", "mixed"):
        assert step[f"step_ms_{kind}"] > 0
        # The middle of the timed steps, but for those in which others began.
        assert 0 <= step[f"positions_{kind}"] - toy.positions < 8
    assert step["idle_share"] is None and "cpu" in step["idle_share_note"]
    rate = toy.prompts * toy.prompt_tokens / prefill["ms"] * 1e3
    assert prefill["tokens_per_second"] == pytest.approx(rate)
    assert (prefill["programs"], prefill["tokens_at_once"]) == (3, 128)
    assert prefix["cached_tokens"] == 384  # of 448, all whole pages but the last
    assert invariant["answers"] == 6 and invariant["requests"] == 3 * 6 + 6
    assert 0 < invariant["from_cached_prompts"] < 18
    assert preempt["pages"] == round(0.4 * preempt["pages_needed"])
    assert preempt["steps_short"] > preempt["steps_whole"] > 0
    assert 0 <= preempt["swap_share"] < 1 and preempt["swap_steps"]
    assert soaked["pages"] == soaked["free"] + soaked["cached"] > 0
    assert soaked["cancelled"] and len(soaked["tokens_per_second"]) == soak.WINDOWS
    assert ready["cold_seconds"] > ready["cached_seconds"] and ready["cache_bytes"]


def test_the_table_has_a_row_for_each_figure(results, tmp_path, capsys):
    assert promises_table.main([str(results["path"])]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in engine_promises.NAMES:
        [row] = [line for line in lines if line.startswith(f"| 1 | {name} |")]
        assert f"| {results[name]['wanted'][0]['wanted']} |" in row
    assert "| 1 |  | idle_share | at most 0.02 | not measured | not promised" in (
        "\n".join(lines)
    )
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"serving": []}))
    assert promises_table.main([str(other)]) == 1
    assert "choose another name" in capsys.readouterr().err


def test_an_answer_that_depends_on_others_is_seen(monkeypatch, capsys):
    """Each log-probability is made to depend on who is in the batch beside it."""
    told = Landed.hand_on

    def hand_on(self, requests, spans):
        beside = sum(one is not None for one in requests)
        self.logprob = self.logprob - np.float32(1e-3) * beside
        return told(self, requests, spans)

    monkeypatch.setattr(Landed, "hand_on", hand_on)
    assert engine_promises.main(["invariant", *SMALL]) == 1
    [line] = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result["found"]["most_distinct"] > 1 and result["found"]["differing"]
    assert result["wanted"][0]["holds"] is False


def test_what_gives_way_and_comes_back_wrong_is_seen(monkeypatch, capsys):
    """Its pages come back in another order."""
    plan = Scheduler.plan

    def mixed(back):
        indices, pages = zip(*back.copies, strict=True)
        copies = tuple(zip(indices, reversed(pages), strict=True))
        return dataclasses.replace(back, copies=copies)

    def other(self, *args):
        made = plan(self, *args)
        back = tuple(mixed(one) if one.copies else one for one in made.swaps_in)
        return dataclasses.replace(made, swaps_in=back)

    monkeypatch.setattr(Scheduler, "plan", other)
    assert engine_promises.main(["preempt", *SMALL]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["wanted"][0] == {
        "figure": "different",
        "wanted": "at most 0",
        "holds": False,
    }
    assert 0 < result["found"]["different"] <= result["found"]["preemptions"]


def test_a_page_that_is_not_given_back_is_seen(monkeypatch, capsys):
    release, left = PagePool.release, []

    def lose(self, table):
        if not left:
            left.append(table[-1])
            table = table[:-1]
        release(self, table)

    monkeypatch.setattr(PagePool, "release", lose)
    assert engine_promises.main(["soak", *SMALL]) == 1
    result = json.loads(capsys.readouterr().out)
    found = result["found"]
    assert found["pages_lost"] == found["books_wrong"] == 1
    assert found["books"].startswith("references are not those of the tables")
    assert [each["holds"] for each in result["wanted"][:2]] == [False, False]


def test_what_swaps_took_is_what_their_steps_took_beyond_others():
    reads, decodes = (True, True), (False, True)
    steps = [Step(1.0, decodes), Step(2.0, reads)] * 20
    assert sameness.swap_seconds(steps) == 0
    steps[10] = Step(1.5, decodes, swaps=1)
    steps[11] = Step(2.25, reads)  # what the device still did of it
    assert sameness.swap_seconds(steps) == pytest.approx(0.75)
    assert sameness.swap_seconds([Step(1.0, reads), Step(3.0, decodes, 1)]) == 3


def test_times_are_promised_of_one_gpu_at_the_whole_size_alone():
    wanted = sizes.Wanted("ms", most=2.0)
    assert wanted.holds(2.0) and wanted.holds(2.1) is False
    assert sizes.Wanted("x", least=8).holds(7.9) is False
    assert wanted.holds(None) is None
    assert (
        str(wanted) == "at most 2" and str(sizes.Wanted("x", least=8)) == "at least 8"
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["step", "--slots", "0"], "--slots must be a positive integer, got 0"),
        (["step", "--positions", "400"], "more than the context of toy-llama, 512"),
        (["step", "--positions", "5"], "--positions is 5"),
        (["prefix", "--positions", "200"], "it must be at least 264"),
        (["step", "--prefill-tokens", "0"], "--prefill-tokens must be a positive"),
        (["soak", "--minutes", "0"], "--minutes must be above 0, and finite, got 0.0"),
    ],
)
def test_numbers_out_of_range_are_named(given, said, capsys):
    assert engine_promises.main([*given, "--shape", "toy-llama"]) == 1
    assert said in capsys.readouterr().err


def test_a_file_of_something_else_is_left_alone(tmp_path, capsys):
    path = tmp_path / "serving.json"
    path.write_text('{"serving": []}')
    assert engine_promises.main(["step", *SMALL, "--output", str(path)]) == 1
    assert "is no file of benchmarks.engine_promises" in capsys.readouterr().err
    assert path.read_text() == '{"serving": []}'


def test_a_plan_is_seen_and_the_scheduler_left_as_it_was():
    class Scheduler:
        def plan(self):
            return "plan"

    class Runner:
        scheduler = Scheduler()

    class Engine:
        _runner = Runner

    with common.Plans(Engine()) as plans:
        assert Runner.scheduler.plan() == "plan"
    assert plans.made == ["plan"]
    Runner.scheduler.plan()
    assert plans.made == ["plan"] and not vars(Runner.scheduler)
