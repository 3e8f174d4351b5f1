"""What lines of a prompt file may ask for, and which files the work keeps away from."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

import polarjax
from polarjax.cli import main
from polarjax.engine.engine import Engine
from polarjax.engine.offline import continue_lines
from polarjax.engine.prompt_lines import FIELDS, Reader, read_lines, survey
from polarjax.engine.sampling import Variant
from polarjax.engine.tokenizer import Tokenizer
from polarjax.storage.files import FileError
from tests.cli.test_prompt_file import read, write
from tests.models import LLAMA, random_params, write_checkpoint

CONFIG = dataclasses.replace(
    LLAMA, layers=2, vocab_size=257, context=64, model_hash="abc"
)
ASKED = [
    {"prompt": "one", "n": 3, "temperature": 1.5, "seed": 5},
    {"prompt": "two", "n": 1},
    {"prompt": "three", "logprobs": 2, "min_p": 0.1, "temperature": 1},
    {"prompt": "four", "prompt_logprobs": 3},
    {"prompt": "five", "echo": True, "logprobs": 0, "n": 2, "temperature": 1},
    {"prompt": "six", "allowed_token_ids": [70, 65]},
    {"prompt": "seven", "logit_bias": {"66": 100, "0": -3.5}},
    {"prompt": "eight", "min_tokens": 4, "stop_ids": [3], "ignore_eos": True},
    {"prompt": "nine", "repetition_penalty": 1.5, "presence_penalty": 1},
    {"prompt": "ten", "frequency_penalty": 1.0, "density": 1, "stop": ["x", "yz"]},
    {"prompt": "eleven", "top_k": 5, "top_p": 0.9, "max_new_tokens": 3},
    {"prompt": "twelve", "stop": "q", "stop_ids": None, "logit_bias": None},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a model with routers, and no budgets: it needs a density."""
    folder = tmp_path_factory.mktemp("lines") / "model"
    write_checkpoint(folder, random_params(CONFIG, routers=True))
    return folder


@pytest.fixture
def run(checkpoint, tmp_path, capsys, monkeypatch):
    """Run the command in a folder of its own; its status and what it said."""
    monkeypatch.chdir(tmp_path)

    def call(words="", source="in.jsonl", output="out.jsonl"):
        options = ["--density", "0.5", "--max-new-tokens", "5", "--slots", "4"]
        files = ["--input", source, "--output", output]
        command = ["generate", str(checkpoint), *options, *files, *words.split()]
        return main.main(command), capsys.readouterr().err

    return call


def test_lines_ask_for_all_that_a_request_may(run, checkpoint, tmp_path):
    assert {key for line in ASKED for key in line} == {"prompt", *FIELDS}
    write(tmp_path / "in.jsonl", ASKED)
    assert run()[0] == 0
    results = read(tmp_path / "out.jsonl")
    params = polarjax.load(checkpoint)
    for i, (line, result) in enumerate(zip(ASKED, results, strict=True)):
        own = {"max_new_tokens": 5, "density": 0.5, "seed": i, **line}
        prompt, bias = own.pop("prompt"), own.get("logit_bias")
        own["logit_bias"] = bias and {int(token): x for token, x in bias.items()}
        out = polarjax.generate(params, [prompt], **own)
        assert ("choices" in result) == ("n" in line)
        answers = result.get("choices", [result])
        assert [one["tokens"] for one in answers] == out.tokens
        assert [one["text"] for one in answers] == out.texts
        assert [one["finish_reason"] for one in answers] == out.finish_reasons
        for j, one in enumerate(answers):
            assert ("logprobs" in one) == ("alternatives" in one) == ("logprobs" in own)
            if "logprobs" in own:
                assert one["logprobs"] == pytest.approx(out.logprobs[j], abs=1e-4)
                check_told(one["alternatives"], out.alternatives[j], own["logprobs"])
        told = out.prompt_logprobs[0]
        assert ("prompt_logprobs" in result) == (told is not None)
        if told is not None:
            assert result["prompt_logprobs"][0] is None
            assert result["prompt_logprobs"][1:] == pytest.approx(told[1:], abs=1e-4)
            count = own.get("prompt_logprobs", own.get("logprobs"))
            check_told(result["prompt_alternatives"], out.prompt_alternatives[0], count)
    assert len({tuple(one["tokens"]) for one in results[0]["choices"]}) > 1
    assert all(x["text"].startswith("five") for x in results[4]["choices"])
    assert set(results[5]["tokens"]) <= {65, 70}
    assert results[6]["tokens"] == [66] * 5


def check_told(found, expected, count):
    expected = [one and dataclasses.asdict(one) for one in expected]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one["rank"] == other["rank"] and one["ids"] == list(other["ids"])
            assert len(one["ids"]) == count
            assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)


def test_help_and_docs_name_all_of_it(capsys):
    with pytest.raises(SystemExit):
        main.main(["generate", "--help"])
    told = re.sub(r"\s+", " ", capsys.readouterr().out)
    told = told.split("Each line of --input")[1].split("Each line of --output")[0]
    docs = Path(__file__).resolve().parents[2] / "docs" / "generation.md"
    page = docs.read_text().split("## A file of prompts")[1].split("\n## ")[0]
    page = page.split("Line i, from 0")[0]
    for name in FIELDS:
        assert re.search(rf"\b{name}\b", told) and f"`{name}`" in page, name


@pytest.mark.parametrize(
    ("own", "error"),
    [
        ({"sample": 1}, "line 1 has no field 'sample': id, prompt, messages, max_new"),
        ({"allowed_token_ids": [[1]]}, "allowed_token_ids must be a list of token ids"),
        ({"allowed_token_ids": [None]}, "allowed_token_ids must be a list of token id"),
        ({"stop_ids": 3}, "stop_ids must be a list of token ids"),
        ({"stop_ids": [True]}, "stop_ids must be a list of token ids"),
        ({"stop": [["a"]]}, "stop must be a text or a list of texts"),
        ({"logit_bias": [{"1": 5}]}, "logit_bias must be an object from token ids to"),
        ({"logit_bias": {"-1": 5}}, "logit_bias has the key '-1', which is no token"),
        ({"logit_bias": {"01": 5}}, "logit_bias has the key '01', which is no token"),
        ({"n": [2]}, "n must be a number"),
        ({"echo": [True]}, "echo must be true or false"),
    ],
)
def test_what_is_no_request_is_refused(own, error, tmp_path):
    path = write(tmp_path / "in.jsonl", [{"prompt": "a", **own}])
    with pytest.raises(FileError) as raised:
        list(read_lines(path))
    assert error in str(raised.value)


@pytest.fixture
def reader(checkpoint):
    config = polarjax.load(checkpoint).config
    return Reader(config, Tokenizer.load(config))


def test_a_survey_says_what_lines_need(reader, tmp_path):
    def found(*lines):
        lines = [{"prompt": "ab", "max_new_tokens": 4, **line} for line in lines]
        return survey(write(tmp_path / "in.jsonl", lines), reader, 64)

    plain = found({}, {"temperature": -1}, {"n": "x"})
    assert plain.variants == (Variant.GREEDY,) and plain.count == 3
    assert not (plain.logprobs or plain.prompt_logprobs or plain.densities)
    assert (plain.requests, plain.tokens, plain.mean) == (1, 6, 4)
    several = found({"n": 3}, {"prompt": "a" * 10, "temperature": 1})
    assert several.variants == (Variant.GREEDY, Variant.SAMPLED)
    assert (several.requests, several.mean) == (4, 6)
    assert found({"echo": True, "logprobs": 1}).prompt_logprobs
    # What a prompt that is refused asks for counts too; with wrong settings, too.
    long = found({"prompt": "a" * 99, "min_tokens": 1, "density": 0.5, "logprobs": 2})
    assert long.variants == (Variant.FULL,) and long.densities and long.logprobs
    assert found({"density": 0.5, "temperature": -1}).densities


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ({"prompt": "abc"}, "prompt 0 has 3 tokens, and a slot of this engine"),
        ({"prompt": "abc", "min_tokens": 1}, "prompt 0 has 3 tokens, and a slot"),
        ({"prompt": "abc", "logprobs": 1}, "prompt 0 has 3 tokens, and a slot"),
        ({"prompt": "a", "n": 999}, "n must be an integer from 1 to 128, got 999"),
        ({"prompt": "a", "logprobs": 99}, "logprobs must be None or an integer from 0"),
        ({"prompt": "a", "logit_bias": {"999": 1}}, "logit_bias must name token ids"),
        ({"prompt": [999]}, "prompt 0 has token id 999"),
    ],
)
def test_each_prompt_fails_alone_where_all_do(line, error, run, tmp_path):
    write(tmp_path / "in.jsonl", [line])
    assert run("--context 1")[0] == 0
    [result] = read(tmp_path / "out.jsonl")
    assert set(result) == {"index", "error"} and result["error"].startswith(error)


def test_samples_count_in_the_window(reader, checkpoint, tmp_path):
    lines = [{"prompt": [i + 1], "n": 4, "max_new_tokens": 3} for i in range(9)]
    path = write(tmp_path / "in.jsonl", lines)
    waiting, results = [], []
    with polarjax.Engine(
        polarjax.load(checkpoint), slots=2, context=32, variants=[Variant.GREEDY]
    ) as engine:
        density = dataclasses.replace(reader.defaults, density=0.5)
        mine = dataclasses.replace(reader, defaults=density)
        counted = continue_lines(
            engine,
            read_lines(path),
            mine,
            results.extend,
            window=8,
            tell=lambda counted: waiting.append(engine.waiting),
        )
    assert [json.loads(one)["index"] for one in results] == list(range(9))
    assert all(len(json.loads(one)["choices"]) == 4 for one in results)
    assert max(waiting) <= 8 and counted.prompts == 9 and counted.tokens == 9 * 4 * 3


def test_stopped_work_with_samples_goes_on(run, tmp_path, monkeypatch):
    write(tmp_path / "in.jsonl", [{"prompt": "a", "n": 2}] * 6)
    step, steps = Engine.step, []

    def failing(self):
        steps.append(1)
        if len(steps) == 12:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", failing)
        assert run()[0] == 130
    begun = len(read(tmp_path / "out.jsonl.partial"))
    assert 0 < begun < 6
    status, said = run()
    assert status == 0 and f"going on after {begun} of 6 prompts" in said


@pytest.mark.parametrize("overwrite", ["", "--overwrite"])
@pytest.mark.parametrize("end", ["", ".partial", ".partial.json"])
@pytest.mark.parametrize("link", ["", "soft", "hard", "output"])
def test_prompts_are_not_written_over(link, end, overwrite, run, tmp_path):
    target = "out.jsonl"
    path = write(tmp_path / f"{target}{end}", [{"prompt": "a"}])
    before, source = path.read_bytes(), path.name
    if link == "soft":
        source = "mine.jsonl"
        os.symlink(path, source)
    elif link == "hard":
        source = "mine.jsonl"
        os.link(path, source)
    elif link == "output":
        os.symlink(tmp_path / target, "other.jsonl")
        target = "other.jsonl"
    names = sorted(os.listdir())
    status, said = run(overwrite, source, target)
    assert status == 1 and said.count("\n") == 1
    assert f"--input {source} is {path}, which work on --output {target} writes" in said
    assert path.read_bytes() == before and sorted(os.listdir()) == names


@pytest.mark.parametrize(
    ("output", "error"),
    [
        (".", ". is a folder: name a file in it"),
        ("/dev/null", "/dev/null is a device or the like, which no file can replace"),
        ("no/where/out.jsonl", "no/where for no/where/out.jsonl: make it"),
        ("in.jsonl/out.jsonl", "in.jsonl for in.jsonl/out.jsonl: make it"),
        ("ready.jsonl", "ready.jsonl exists, and is finished"),
    ],
)
def test_outputs_that_cannot_be(output, error, run, tmp_path):
    write(tmp_path / "in.jsonl", [{"prompt": "a"}])
    write(tmp_path / "ready.jsonl", [{}])
    for overwrite in ("", "--overwrite")[: 1 if "ready" in output else 2]:
        status, said = run(overwrite, output=output)
        assert status == 1 and error in said and said.count("\n") == 1
    assert sorted(os.listdir()) == ["in.jsonl", "ready.jsonl"]


def test_a_refused_run_leaves_no_file(run, tmp_path):
    write(tmp_path / "in.jsonl", [{"prompt": "a"}])
    foreign = write(tmp_path / "out.jsonl.partial.json", [{"mine": 1}])
    before = foreign.read_bytes()
    status, said = run()
    assert status == 1 and f"{foreign} is not of this polarjax" in said
    assert sorted(os.listdir()) == ["in.jsonl", foreign.name]
    assert foreign.read_bytes() == before


def test_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "\xef\xbb\xbfa"}\n\xef\xbb\xbf\n')
    [line] = read_lines(path)
    assert line.prompt == "\ufeffa" and line.index == 0


def test_no_two_lines_have_one_id(reader, tmp_path):
    path = tmp_path / "in.jsonl"
    # Of the same hash, yet different: -1 and -2.
    apart = [{"prompt": "a", "id": x} for x in (1, "1", -1, -2, None, None, "b")]
    assert survey(write(path, apart), reader, 64).count == 7
    write(path, [*apart, {"prompt": "c", "id": "b"}])
    with pytest.raises(FileError, match=r"line 8 has the id 'b' of .*line 7: give"):
        survey(path, reader, 64)
