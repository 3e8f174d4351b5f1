"""`polarjax bench serve` at toy size: what it writes, prints and refuses."""

import json
import math

import pytest

from benchmarks import serving_table
from polarjax.bench import serve_results, serving, shapes
from polarjax.bench.counts import Compilations, Reached
from polarjax.bench.latencies import Trace, summarise
from polarjax.cli import main
from polarjax.terminal.output import make_console
from tests.models import LLAMA, random_params, write_checkpoint

TOY = ("--shape", "toy-llama", "--requests", "5", "--slots", "2", "--max-output", "4")


def command(*argv):
    return main.main(["bench", "serve", *map(str, argv)])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The file of two runs, the second of which adds to the first's."""
    path = tmp_path_factory.mktemp("serving") / "serving.json"
    settings = ("--density", "1/2", "--goodput", "ttft:1e6", "--json", path)
    assert command(*TOY, *settings, "--static", "--rate", "inf", 500) == 0
    assert command(*TOY, *settings, "--max-concurrency", 1, "--load", "long") == 0
    return path


def test_a_file_holds_every_result_and_where_it_comes_from(written):
    first, second = serve_results.read(written)
    for run in (first, second):
        wanted = {"device", "commit", "command", "date", "versions", "memory_fraction"}
        assert wanted <= run.keys() and run["model"] == "toy-llama"
        assert run["load"]["requests"] == 5 and run["load"]["new_tokens"] == 20
    assert first["command"].startswith("polarjax bench serve --shape toy-llama")
    assert (first["load"]["name"], second["load"]["name"]) == ("chat", "long")
    assert (first["load"]["cut"], second["load"]["cut"]) == (0, 5)
    assert second["context"] == shapes.TOY_MODELS["toy-llama"].context
    found = [(r["how"], r["rate"], r["most_open"]) for r in first["results"]]
    assert found == [
        ("continuous", None, None),
        ("continuous", 500, None),
        ("static", None, None),
    ]
    [held] = second["results"]
    assert held["most_open"] == 1 and held["served"]["most_open"] == 1
    for result in (*first["results"], held):
        served = result["served"]
        assert (served["requests"], served["new_tokens"]) == (5, 20)
        assert served["goodput"]["requests"] == 5
        assert served["tokens_per_second"] == pytest.approx(20 / served["seconds"])
        assert 0 < served["ttft_ms"]["p50"] <= served["ttft_ms"]["p99"]
        assert served["e2el_ms"]["p50"] >= served["ttft_ms"]["p50"]
        assert (result["policy"], result["density"]) == ("density 0.5", 0.5)
        # Layer 0 reads both of its groups, layer 1 one.
        assert result["reached"]["density"] == [1.0, 0.5]
        assert result["reached"]["kv_bytes"] * 4 == (
            result["reached"]["kv_bytes_dense"] * 3
        )
        assert result["slots"] == 2


def result(**changes):
    traces = [Trace(10, 0.0, ((0.5, 1), (0.7, 2))), Trace(10, 0.0, ((1.0, 1),))]
    limits = changes.pop("limits", None)
    given = {
        "how": "continuous",
        "policy": "dense",
        "density": None,
        "rate": None,
        "most_open": None,
        "slots": 2,
        "served": summarise(traces, limits),
        "reached": Reached((1.0, 0.5), 3.0, 4.0, 10),
        "compilations": Compilations(),
    }
    return serve_results.Result(**{**given, **changes})


def test_the_table(capsys):
    rows = [
        result(limits={"ttft": 600}),
        result(rate=4.0, reached=None, compilations=Compilations(3, 1.25)),
    ]
    make_console().print(serve_results.table(rows))
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["policy", "rate", "req/s", "tokens/s"]
    # 4 tokens of 2 requests in 1 s; first tokens after 0.5 and 1 s; 0.1 s a token.
    shown = "continuous dense inf 2.00 4 4 750 995 100 100 200 850 997 0.750 0.750"
    shown += " 1.00"
    assert first.split() == shown.split()
    shown = "continuous dense 4 2.00 4 4 750 995 100 100 200 850 997 unknown unknown"
    assert second.split() == shown.split()
    [note] = serve_results.notes(rows)
    assert note.startswith("3 programs were compiled while dense, continuous at 4")
    assert "(1.2 s" in note and "--warmup" in note


def test_the_table_for_a_page(written, tmp_path, capsys):
    """Held against the fastest of transformers on the same load, unless it is sdpa."""
    ours = serve_results.read(written)[0]
    rate = ours["results"][0]["served"]["tokens_per_second"]

    def theirs(how, speed, load=ours["load"], when=None):
        served = {**ours["results"][0]["served"], "tokens_per_second": speed * rate}
        row = {"how": f"transformers, {how}", "served": served, "rate": when}
        return {
            **ours,
            "load": load,
            "versions": {"torch": "2", "transformers": "5"},
            "results": [{**ours["results"][0], **row, "reached": None}],
        }

    others = [
        theirs("paged|flash_attention_3, compile level 0", 0.25),
        theirs("paged|flash_attention_3, compile level 1", 0.5),
        theirs("paged|sdpa, compile level 0", 2),
        theirs("flash_attention_3", 4, {**ours["load"], "seed": 1}),
        theirs("flash_attention_3", 4, when=8),
    ]
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"serving": [ours, *others]}))
    assert serving_table.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].startswith("| 1 | ") and "| chat: 5 requests, " in lines[4]
    assert "| torch 2, transformers 5 |" in lines[5]
    rows = [line.split(" | ") for line in lines if line.count(" | ") == 12]
    assert {len(row) for row in rows} == {len(serving_table._HEAD)}
    head, continuous, paced, static, *rest = rows
    assert head[7] == "x transformers" and continuous[3] == "continuous, density 0.5"
    assert (continuous[2], paced[2]) == ("all at once", "500")
    assert (continuous[7], paced[7].strip()) == ("2.00", "")
    assert float(static[7]) > 0 and continuous[11:] == ["0.750", "0.750 |"]
    assert rest[0][3] == "transformers, paged|flash_attention_3, compile level 0"
    assert not any(row[7].strip() for row in rest)
    path.write_text("{}")
    assert serving_table.main([str(path)]) == 1
    assert "is no file of" in capsys.readouterr().err


def test_a_file_of_something_else_is_not_continued(tmp_path, capsys):
    path = tmp_path / "x.json"
    for content in ("[]", "{", '{"serving": [{}]}', '{"serving": 3}'):
        path.write_text(content)
        assert command(*TOY, "--json", path) == 1
        error = capsys.readouterr().err
        assert "is no file of `polarjax bench serve`: choose another name" in error
        assert path.read_text() == content


def test_what_is_read():
    params = random_params(LLAMA, routers=True)

    def found(densities, adapter):
        ways = serving.ways(params, densities, adapter)
        return [(way.label, way.density) for way in ways]

    assert found(None, False) == [("dense", None)]
    assert found(None, True) == [("the adapter's own", None)]
    assert found([1.0, 0.625], False) == [("dense", None), ("density 0.625", 0.625)]
    assert found([1.0], True) == [("all groups, adapter", None)]
    [way] = serving.ways(params, [1.0], True)
    assert way.policy.asks == ()


def test_a_checkpoints_special_tokens_are_in_no_prompt(tmp_path, monkeypatch):
    """And its model is loaded, with routers by chance."""
    folder, played = tmp_path / "model", []
    write_checkpoint(folder, random_params(LLAMA))

    def play(engine, load, due, **_):
        played.extend(load)
        assert engine.context == 64 and engine.slots == 1
        return [Trace(1, 0.0, ((1.0, 1),))]

    monkeypatch.setattr(serving.serve, "play", play)
    short = ("--requests", 40, "--warmup", 0, "--slots", 1, "--context", 64)
    assert command(folder, *short, "--density", 0.5) == 0
    ids = {int(x) for ask in played for x in ask.prompt}
    assert 256 not in ids and len(ids) > 200 and max(ids) < LLAMA.vocab_size


def test_what_is_played_again_has_other_ids(monkeypatch):
    """A cache of prefixes would find the same ones; nobody asks for them again."""
    played = []

    def play(engine, load, due, **_):
        played.append(load)
        return [Trace(1, 0.0, ((1.0, 1),))]

    monkeypatch.setattr(serving.serve, "play", play)
    assert command(*TOY, "--rate", "inf", 4, 8, "--warmup", 3) == 0
    warmed, *rest = played
    assert [len(load) for load in played] == [3, 5, 5, 5]
    assert [len(ask.prompt) for ask in warmed] == [
        len(ask.prompt) for ask in rest[0][:3]
    ]
    assert len({ask.prompt.tobytes() for load in played for ask in load}) == 18


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "either a checkpoint or --shape, such as --shape toy-llama"),
        (["x", "--shape", "toy-llama"], "either a checkpoint or --shape"),
        (["--shape", "toy-opt", "--adapter", "a"], "--adapter has no effect with --sh"),
        (["x", "--any-model"], "--any-model has no effect without --adapter"),
        (["x", "--adapter", "a", "--head-rank", "8"], "--head-rank has no effect"),
        ([*TOY, "--static", "--rate", "4"], "add inf to --rate"),
        ([*TOY, "--rate", "4", "4"], "--rate has a number twice"),
        ([*TOY, "--goodput", "ttft:1", "ttft:2"], "--goodput has a latency twice"),
        ([*TOY, "--slots", "0"], "--slots must be a positive integer, got 0"),
        ([*TOY, "--max-concurrency", "-1"], "--max-concurrency must be a positive"),
        ([*TOY, "--warmup", "-1"], "--warmup must be an integer of at least 0"),
        ([*TOY, "--seed", "-1"], "--seed must be an integer of at least 0, got -1"),
        ([*TOY, "--density", "1.5"], "above 0 and at most 1"),
        ([*TOY, "--memory-fraction", "2"], "memory_fraction must be"),
        ([*TOY, "--context", "513"], "--context is 513, beyond the model's of 512"),
        ([*TOY, "--tp", "3"], "tp 3 does not divide the model's 4 query heads"),
        (["nowhere"], "no checkpoint folder at nowhere"),
    ],
)
def test_bad_arguments_are_named(argv, message, capsys):
    assert command(*argv) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rate", "0"], "no rate such as 4"),
        (["--rate", "fast"], "'fast' is no rate such as 4 or 0.5 requests a second"),
        (["--goodput", "itl:3"], "there are ttft, tpot, e2el"),
        (["--goodput", "ttft"], "'ttft' is no limit such as ttft:200"),
        (["--goodput", "ttft:nan"], "no limit"),
        (["--load", "chatter"], "invalid choice: 'chatter'"),
        (["--shape", "gpt"], "invalid choice: 'gpt'"),
    ],
)
def test_slips_are_told_with_the_usage(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command(*TOY, *argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_options_of_the_other_command_have_no_effect(capsys):
    assert main.main(["bench", "--toy", "serve", *TOY]) == 1
    error = capsys.readouterr().err
    assert "--toy before serve is of `polarjax bench`" in error
    assert main.main(["bench", "serve", *TOY[:2], "--requests", "0"]) == 1
    assert "--requests must be" in capsys.readouterr().err


def test_help_teaches(capsys):
    for call, wanted in (
        (["bench", "serve"], "example: polarjax bench serve --shape llama-3.1-8b"),
        (["bench"], "serve play a load of requests"),
    ):
        with pytest.raises(SystemExit) as stop:
            main.main([*call, "--help"])
        assert stop.value.code == 0
        assert wanted in " ".join(capsys.readouterr().out.split())


def test_rates_are_numbers_of_json(written):
    """An infinite rate is null: JSON knows no infinity."""
    text = written.read_text()

    def refuse(name):
        raise AssertionError(name)

    json.loads(text, parse_constant=refuse)
    assert not math.isinf(serve_results.read(written)[0]["results"][1]["rate"])
