"""`polarjax generate --input --output`: a file of prompts, stopped and gone on with."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import polarjax
from polarjax import Settings
from polarjax.cli import main, prompt_file
from polarjax.engine.engine import Engine
from polarjax.engine.offline import continue_lines
from polarjax.engine.prompt_lines import Reader, read_lines
from polarjax.policies import save_adapter
from tests.models import GREEDY, LLAMA, random_params, write_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = dataclasses.replace(
    LLAMA, layers=2, vocab_size=257, context=64, model_hash="abc"
)
LINES = [
    {"prompt": "one", "id": "a"},
    {"prompt": [2, 3, 4], "max_new_tokens": 9},
    {"prompt": "long" * 30, "id": 7},
    {"messages": [{"role": "user", "content": "hi"}], "temperature": 0.9, "seed": 5},
    {"prompt": [999], "id": "b"},
    {"prompt": "two", "density": 0.5, "stop_ids": [], "top_p": 0.5, "temperature": 1},
    {"prompt": "three", "stop": "x", "temperature": -1},
    {"prompt": "café"},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files") / "model"
    write_checkpoint(folder, random_params(CONFIG))
    return folder


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "mine"
    params = polarjax.load(checkpoint)
    learned = random_params(CONFIG, routers=True, budgets=(4, 2)).policy
    save_adapter(folder, dataclasses.replace(params, policy=learned))
    return folder


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def command(checkpoint, adapter, tmp_path):
    source = write(tmp_path / "in.jsonl", LINES)
    words = ["generate", checkpoint, "--adapter", adapter, "--input", source]
    words += ["--output", tmp_path / "out.jsonl", "--max-new-tokens", 6, "--slots", 2]
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def expected(checkpoint, adapter):
    """What the library says of each line."""
    params = polarjax.load(checkpoint, adapter=adapter)
    tokenizer = polarjax.engine.tokenizer.Tokenizer.load(params.config)
    chat = tokenizer.encode("<user>hi<answer>", special=False)
    asked = {
        0: ("one", {}),
        1: ([2, 3, 4], {"max_new_tokens": 9}),
        3: (chat, {"temperature": 0.9, "seed": 5}),
        5: ("two", {"density": 0.5, "stop_ids": [], "top_p": 0.5, "temperature": 1.0}),
        7: ("café", {}),
    }
    found = {}
    for i, (prompt, own) in asked.items():
        given = {"max_new_tokens": 6, "seed": i, **own}
        found[i] = polarjax.generate(params, [prompt], **given)
    return found


def check(results, expected):
    assert len(results) == len(LINES)
    labels = [("id", "a"), ("index", 1), ("id", 7), ("index", 3), ("id", "b")]
    labels += [("index", 5), ("index", 6), ("index", 7)]
    errors = {
        2: "prompt 2 has 120 tokens; the model's context is 64",
        4: "prompt 4 has token id 999; ids go from 0 to 256",
        6: "temperature must be a number from 0.0 to 1000000.0, got -1",
    }
    for i, (result, (key, label)) in enumerate(zip(results, labels, strict=True)):
        assert result[key] == label and next(iter(result)) == key
        if i in errors:
            assert set(result) == {key, "error"}
            assert result["error"].startswith(errors[i])
        else:
            out = expected[i]
            assert result["tokens"] == out.tokens[0] and result["text"] == out.texts[0]
            assert result["finish_reason"] == out.finish_reasons[0]
            assert result["prompt_tokens"] == out.stats.prompt_tokens


def test_a_file_gives_what_the_library_says(command, expected, tmp_path, capsys):
    assert main.main([*command, "--logprobs"]) == 0
    results = read(tmp_path / "out.jsonl")
    for i, out in expected.items():
        assert results[i].pop("logprobs") == pytest.approx(out.logprobs[0], abs=1e-4)
    check(results, expected)
    said = capsys.readouterr()
    assert "8 prompts, 3 of them failed" in said.err and "tokens/s" in said.err
    assert said.out == ""
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}
    # What is finished stays, unless it may go.
    assert main.main(command) == 1
    assert "out.jsonl exists, and is finished: choose another name, or --overwrite" in (
        capsys.readouterr().err
    )
    assert main.main([*command, "--overwrite"]) == 0
    check(read(tmp_path / "out.jsonl"), expected)


def test_the_bars_are_for_terminals(command, tmp_path, monkeypatch):
    class Screen(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    for screen in (Screen(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", screen)
        assert main.main([*command, "--overwrite"]) == 0
        said = screen.getvalue()
        shown = isinstance(screen, Screen)
        assert ("8/8" in said and "reading" in said) == shown
        assert said.count("tokens/s; written to") == 1


def stop_at(monkeypatch, number, error=KeyboardInterrupt):
    """Let a call of `step` fail, each time."""
    step, steps = Engine.step, []

    def failing(self):
        steps.append(1)
        if len(steps) == number:
            raise error
        return step(self)

    monkeypatch.setattr(Engine, "step", failing)
    return steps


def test_stopped_work_goes_on(command, expected, tmp_path, capsys, monkeypatch):
    partial = tmp_path / "out.jsonl.partial"
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        assert main.main(command) == 130
    said = capsys.readouterr().err
    assert f"interrupted: the same command goes on from {partial}\n" in said
    begun = read(partial)
    assert 0 < len(begun) < len(LINES) and not (tmp_path / "out.jsonl").exists()
    with open(partial, "ab") as file:
        file.write(b'{"index": 3, "te')  # a kill may cut a line short
    ran = []
    with monkeypatch.context() as patch:
        add = Engine.add
        patch.setattr(Engine, "add", lambda *a, **k: ran.append(k) or add(*a, **k))
        assert main.main(command) == 0
    assert min(each["number"] for each in ran) >= len(begun)
    results = read(tmp_path / "out.jsonl")
    check(results, expected)
    assert results[: len(begun)] == begun
    assert f"going on after {len(begun)} of 8 prompts" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--max-new-tokens", "7"], "settings.max_new_tokens is 6 there, 7 here"),
        (["--policy", "dense"], "policy."),
        (["--chat"], "chat is False there, True here"),
        ("input", "input is '"),
        ("adapter", "model.adapter.sha256 is '"),
    ],
)
def test_other_work_is_not_gone_on_with(
    change, named, command, checkpoint, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        assert main.main(command) == 130
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    capsys.readouterr()
    if change == "input":
        write(tmp_path / "in.jsonl", [*LINES[:-1], {"prompt": "tea"}])
        change = []
    elif change == "adapter":
        params = polarjax.load(checkpoint)
        learned = random_params(CONFIG, 9, routers=True, budgets=(4, 2)).policy
        other = dataclasses.replace(params, policy=learned)
        save_adapter(tmp_path / "other", other)
        change = ["--adapter", str(tmp_path / "other")]
    assert main.main([*command, *change]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "out.jsonl.partial is of other work (" + named in said
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before
    assert main.main([*command, *change, "--overwrite"]) == 0
    assert len(read(tmp_path / "out.jsonl")) == len(LINES)


def test_what_somebody_changed_is_not_gone_on_with(
    command, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        assert main.main(command) == 130
    partial, facts = (tmp_path / f"out.jsonl.partial{x}" for x in ("", ".json"))
    lines = partial.read_bytes()
    partial.write_bytes(lines.replace(b'"id": "a"', b'"id": "z"'))
    assert main.main(command) == 1
    assert f"{partial} is damaged in line 1: delete it" in capsys.readouterr().err
    partial.write_bytes(lines + b"\n" * 20)
    assert main.main(command) == 1
    assert f"{partial} is damaged in line " in capsys.readouterr().err
    facts.write_text("[]")
    assert main.main(command) == 1
    assert f"{facts} is not of this polarjax" in capsys.readouterr().err
    facts.unlink()
    assert main.main(command) == 1
    assert f"{partial} is not of this polarjax" in capsys.readouterr().err
    assert main.main([*command, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", "line 3 is not valid JSON"),
        ("[1]", "line 3 must hold a JSON object"),
        ('{"prompt": "a", "prompt": "b"}', "line 3 has the key 'prompt' twice"),
        ('{"text": "a"}', "line 3 has no field 'text': id, prompt, messages, max_new"),
        ('{"id": 1}', 'line 3 needs "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', 'line 3 needs "prompt" or "messages"'),
        ('{"prompt": 5}', "line 3: prompt must be a text or a list of token ids"),
        ('{"messages": "a"}', "line 3: messages must be a list"),
        ('{"prompt": "a", "id": [1]}', "line 3: id must be a text or a whole number"),
        ('{"prompt": "a", "seed": [1]}', "line 3: seed must be a number"),
        (b"\xff", "line 3 is not UTF-8 text"),
        (None, "has no prompts: write one JSON object a line"),
    ],
)
def test_a_wrong_line_is_named_before_the_work(line, error, command, tmp_path, capsys):
    text = b'{"prompt": "a"}\n\n'
    text += line if isinstance(line, bytes) else (line or "").encode()
    (tmp_path / "in.jsonl").write_bytes(b" \n" if line is None else text)
    assert main.main(command) == 1
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--json", "--json has no effect with --input"),
        ("--coordinator x:1", "--input is work of one process"),
        ("--max-new-tokens 0", "max_new_tokens must be a positive integer, got 0"),
        ("--slots 0", "--slots must be a positive integer, got 0"),
        ("--input nothing", "nothing cannot be read"),
        ("--input .", ". is not a file"),
    ],
)
def test_options_that_do_not_fit(words, error, command, capsys):
    assert main.main([*command, *words.split()]) == 1
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("", "there is no prompt: pass one or more, or an --input"),
        ("hi --input x", "pass prompts or an --input, not both"),
        ("--input x", "--input needs an --output"),
        ("hi --output x", "--output has no effect without --input"),
        ("hi --slots 3", "--slots has no effect without --input"),
    ],
)
def test_prompts_come_from_one_place(words, error, capsys):
    assert main.main(["generate", "model", *words.split()]) == 1
    assert error in capsys.readouterr().err


def test_a_context_may_be_asked_for(command, tmp_path):
    write(tmp_path / "in.jsonl", [{"prompt": "a" * 20}, {"prompt": "b"}])
    assert main.main([*command, "--context", "16", "--max-new-tokens", "40"]) == 0
    long, short = read(tmp_path / "out.jsonl")
    assert "prompt 0 has 20 tokens, and a slot of this engine has room" in long["error"]
    assert len(short["tokens"]) == 15


def test_questions_need_a_template(checkpoint, command, tmp_path, capsys):
    bare = tmp_path / "bare"
    params = polarjax.load(checkpoint)
    config = dataclasses.replace(params.config, folder="")
    polarjax.save(dataclasses.replace(params, config=config), bare)
    command = [str(bare) if word == str(checkpoint) else word for word in command]
    assert main.main(command) == 1
    said = capsys.readouterr().err
    assert "in.jsonl line 4 is a conversation, which needs a tokenizer" in said
    write(tmp_path / "in.jsonl", [{"prompt": [1, 2]}, {"prompt": "text"}])
    assert main.main(command) == 0
    one, two = read(tmp_path / "out.jsonl")
    assert one["text"] is None and len(one["tokens"]) == 6
    assert "prompt 1 is a str, but this checkpoint has no tokenizer" in two["error"]


def test_a_window_goes_through_in_order(checkpoint, tmp_path):
    """However many there are, few are kept; a long one does not change the order."""
    lines = [
        {"prompt": [i % 200], "max_new_tokens": 1 + 20 * (i % 7 == 0)}
        for i in range(60)
    ]
    path = write(tmp_path / "in.jsonl", lines)
    params = polarjax.load(checkpoint)
    results, most, told = [], [], []
    with polarjax.Engine(params, slots=2, context=32, **GREEDY) as engine:
        read_so_far = 0

        def source():
            nonlocal read_so_far
            for line in read_lines(path):
                read_so_far += 1
                yield line

        def keep(texts):
            most.append(read_so_far - len(results))
            results.extend(map(json.loads, texts))

        reader = Reader(params.config, engine.tokenizer, Settings(stop_ids=()))
        counted = continue_lines(
            engine,
            source(),
            reader,
            keep,
            window=8,
            tell=lambda counted: told.append(dataclasses.replace(counted)),
        )
    assert [result["index"] for result in results] == list(range(60))
    assert [len(r["tokens"]) for r in results] == [x["max_new_tokens"] for x in lines]
    assert max(most) <= 8 and counted.prompts == 60 and counted.failed == 0
    assert counted.tokens == sum(x["max_new_tokens"] for x in lines)
    assert [x.tokens for x in told] == sorted(x.tokens for x in told)
    assert told[-1].prompts == 60


def test_a_request_of_nan_is_a_line_of_its_own(checkpoint, tmp_path):
    path = write(tmp_path / "in.jsonl", [{"prompt": [i]} for i in (1, 14, 2)])
    params = polarjax.load(checkpoint)
    weights = dict(params.weights)
    tokens = weights["embed"]["tokens"].at[14].set(float("nan"))
    head = {"head": weights["embed"]["tokens"]}  # where it would be for every token
    weights["embed"] = {**weights["embed"], **head, "tokens": tokens}
    config = dataclasses.replace(params.config, tied_embeddings=False)
    broken = dataclasses.replace(params, weights=weights, config=config)
    results: list[str] = []
    with polarjax.Engine(broken, slots=2, context=32, **GREEDY) as engine:
        reader = Reader(config, engine.tokenizer, Settings(max_new_tokens=3))
        continue_lines(engine, read_lines(path), reader, results.extend)
    one, wrong, two = map(json.loads, results)
    error = "the model yields NaN for prompt 1: its weights are damaged"
    assert wrong == {"index": 1, "error": error}
    assert len(one["tokens"]) == len(two["tokens"]) == 3


def test_one_process_at_a_time_writes(command, tmp_path, capsys, monkeypatch):
    go_on, found = prompt_file._go_on, []

    def twice(*given):
        found.append(main.main(command))
        go_on(*given)

    monkeypatch.setattr(prompt_file, "_go_on", twice)
    assert main.main(command) == 0
    assert found == [1] and "another process is writing" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_process_leaves_whole_lines(command, expected, tmp_path):
    """Killed at several moments, it ends with what an undisturbed one writes."""
    partial, out = tmp_path / "out.jsonl.partial", tmp_path / "out.jsonl"
    many = [dict(LINES[i % 8], id=i) for i in range(400)]
    write(tmp_path / "in.jsonl", many)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    call = [sys.executable, "-m", "polarjax", *command]
    kills = 0
    for wanted in (1, 120, 300):
        process = subprocess.Popen(call, env=environment, cwd=tmp_path)
        while process.poll() is None:
            lines = partial.read_bytes().count(b"\n") if partial.exists() else 0
            if lines >= wanted:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
            time.sleep(0.002)
    assert kills >= 2
    if not out.exists():
        subprocess.run(call, env=environment, cwd=tmp_path, check=True)
    results = read(out)
    assert [result["id"] for result in results] == list(range(400))
    for i, one in expected.items():
        if i not in (0, 1, 3, 5, 7):
            continue
        for result in results[i::8]:
            if LINES[i].get("temperature") is None:
                assert result["tokens"] == one.tokens[0]
