"""`evaluate`: one result, whatever interrupted it; and what is said in it."""

import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import polarjax
from polarjax.evaluation import (
    Scorer,
    Settings,
    evaluate,
    mcnemar,
    mean_interval,
    read_rows,
)
from polarjax.evaluation.damage import Damage
from polarjax.evaluation.journal import FileJournal
from polarjax.evaluation.measure import Measured
from polarjax.evaluation.results import damage_result, perplexity_result
from polarjax.policies import with_learned
from tests.evaluation.test_tasks import make_rows, write
from tests.models import LLAMA, random_params, write_checkpoint

CONFIG = dataclasses.replace(LLAMA, vocab_size=257, layers=2, model_hash="abc")
POLICIES = {"Polar 0.250": polarjax.Polar(0.25), "Polar 1.000": polarjax.Polar(1.0)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder / "model", random_params(CONFIG, routers=True))
    write(folder / "words.jsonl", make_rows(9))
    targets = [{"context": "one two", "target": f" {n}"} for n in "abcdefg"]
    write(folder / "last.jsonl", targets)
    text = "\n".join(f"{i} green bottles on the wall." for i in range(40))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def params(files):
    return polarjax.load(files / "model")


@pytest.fixture(scope="module")
def settings(files):
    return Settings(
        POLICIES,
        batch=4,
        tasks=[files / "words.jsonl", files / "last.jsonl"],
        text=files / "text.txt",
        kinds=("windows", "strided", "words"),
        tokens=300,
        window=48,
        new_tokens=6,
        prompts=5,
        prompt_tokens=9,
    )


@pytest.fixture(scope="module")
def whole(params, settings, files):
    """An unbroken run's result."""
    return evaluate(params, settings, out=files / "whole.json", command=["eval"])[0]


def numbers(result):
    """Without what may differ between two runs: times."""
    if isinstance(result, dict):
        timed = ("seconds", "tokens_per_second", "finished", "command")
        return {k: numbers(v) for k, v in result.items() if k not in timed}
    return [numbers(v) for v in result] if isinstance(result, list) else result


def test_the_result_says_how_it_was_made(whole, files):
    assert json.loads((files / "whole.json").read_text()) == whole
    assert not (files / "whole.json.partial").exists()
    made, setup = whole["made"], whole["setup"]
    assert made["command"] == ["eval"] and made["device"] and made["finished"]
    assert made["versions"]["jax"] and "commit" in made
    assert setup["model_hash"] == "abc" and setup["dtype"] == "float32"
    assert setup["mode"] == "decode" and setup["batch"] == 4
    assert list(setup["policies"]) == ["Dense", *POLICIES]
    assert setup["policies"]["Polar 0.250"]["density"] == 0.25
    assert whole["tasks"]["words"]["ids"] == [str(i) for i in range(9)]
    assert len(whole["tasks"]["words"]["sha256"]) == 64


def test_tasks_are_paired_with_dense(whole, files):
    task = whole["tasks"]["words"]
    dense, sparse, same = (task["results"][k] for k in ("Dense", *POLICIES))
    rows = read_rows(files / "words.jsonl")
    scores = -np.array(dense["nll"]).reshape(9, 3)
    assert dense["right"] == (scores.argmax(1) == [r.label for r in rows]).tolist()
    assert dense["against_dense"] is None and dense["density"] == 1
    value, low, high = dense["accuracy"]
    assert low < value == np.mean(dense["right"]) < high
    against = sparse["against_dense"]
    change = np.array(sparse["right"]) - dense["right"]
    assert against["accuracy"][0] == pytest.approx(change.mean())
    assert against["gained"] - against["lost"] == change.sum()
    assert against["mcnemar_p"] == mcnemar(
        np.array(sparse["right"], bool), np.array(dense["right"], bool)
    )
    assert sparse["density"] == pytest.approx((1 + 0.25) / 2)
    np.testing.assert_allclose(np.sum(sparse["use"], axis=1), [4, 1])
    assert same["right"] == dense["right"] and same["density"] == 1
    # What may differ is bounded even where nothing does.
    assert same["against_dense"]["accuracy"][1] < 0
    target = whole["tasks"]["last"]["results"]["Polar 0.250"]
    assert target["accuracy_per_byte"] is None
    value, low, high = target["target_perplexity"]
    assert value == pytest.approx(np.exp(np.mean(target["nll"])))
    assert target["against_dense"]["target_perplexity_ratio"][0] > 0


def test_perplexities(whole):
    found = whole["perplexity"]
    assert list(found) == ["windows", "strided", "words"]
    assert found["windows"]["scored"] == [48 - 24] * 6
    for kind in found.values():
        results = kind["results"]
        for label, r in results.items():
            value, low, high = r["perplexity"]
            assert value == pytest.approx(np.exp(sum(r["nll"]) / sum(kind["scored"])))
            assert low < value < high
            if label != "Dense":
                ratio = value / results["Dense"]["perplexity"][0]
                assert r["against_dense"]["ratio"][0] == pytest.approx(ratio)
    words = found["words"]
    assert sum(words["scored"]) == words["tokens"] == 300 == words["bytes"]
    total = sum(words["results"]["Dense"]["nll"])
    per_word = words["results"]["Dense"]["word_perplexity"][0]
    assert per_word == pytest.approx(np.exp(total / words["words"]))
    bits = words["results"]["Dense"]["bits_per_byte"][0]
    assert bits == pytest.approx(total / np.log(2) / 300)


def test_generation(whole, params, files):
    found = whole["generation"]
    assert found["prompts"] == 5 and found["prompt_tokens"] == 9
    sparse, same = (found["results"][k] for k in POLICIES)
    assert same["identical"][0] == 1 and same["divergence"] == [6] * 5
    assert max(map(max, same["kl_per_token"])) < 1e-6
    assert sparse["identical"][0] == np.mean(np.array(sparse["divergence"]) == 6)
    assert sparse["tokens_until_divergence"][0] == np.mean(sparse["divergence"])
    assert min(sparse["divergence"]) >= 1  # the first is dense prefill's
    assert sparse["kl"][0] == pytest.approx(np.mean(sparse["kl_per_token"]))
    assert sparse["kl"][0] > 0.01 and sparse["agreement"][0] < 1
    assert sparse["density"] == pytest.approx((1 + 0.25) / 2)
    text = (files / "text.txt").read_text(encoding="utf-8")
    tokens = polarjax.engine.Tokenizer.load(params.config).encode(text[:300])
    prompts = [tokens[at : at + 9] for at in range(0, 75, 15)]
    dense, other = (
        polarjax.generate(
            *(params, prompts), policy=policy, max_new_tokens=6, stop_ids=[]
        ).tokens
        for policy in (polarjax.Dense(), POLICIES["Polar 0.250"])
    )
    for i, (a, b) in enumerate(zip(dense, other, strict=True)):
        until = next((j for j in range(6) if a[j] != b[j]), 6)
        assert sparse["divergence"][i] == until


def test_what_is_bounded_has_bounds_inside_of_that():
    """Of few prompts, whose spread alone would lead beyond."""
    agree = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]], bool)
    kl = np.array([[1e-3] * 4, [2e-3] * 4, [0.5] * 4])
    damage = Damage(np.array([5, 4, 2]), kl, agree, 0.5)
    assert mean_interval(agree.mean(axis=1)).high > 1  # else this shows nothing
    found = damage_result({"P": damage}, 5)["results"]["P"]
    bounds = {
        "identical": (0, 1),
        "agreement": (0, 1),
        "tokens_until_divergence": (1, 5),
        "kl": (0, np.inf),
    }
    for name, (least, most) in bounds.items():
        value, low, high = found[name]
        assert least <= low <= value <= high <= most, name
        assert low < value, name
    assert found["tokens_until_divergence"][0] == pytest.approx(11 / 3)
    nll = np.array([0.01, 0.02, 0.9])  # of windows of one token
    measured = Measured(nll, nll > 0, np.ones((2, 4), int), 3, 1.0)
    facts = {"words": 2, "bytes": 9}
    result = perplexity_result(facts, [1, 1, 1], {"Dense": measured})["results"]
    for name in ("perplexity", "word_perplexity", "byte_perplexity"):
        value, low, high = result["Dense"][name]
        assert 1 == low < value < high, name
    assert result["Dense"]["bits_per_byte"][1] == 0


class Stop(Exception):
    pass


def test_work_that_is_cut_short_goes_on(params, settings, whole, tmp_path):
    """Stopped again and again, its file cut anywhere, it ends with the same numbers."""
    out, rng = tmp_path / "cut.json", random.Random(0)
    partial = tmp_path / "cut.json.partial"
    tries = 0
    while not out.exists():
        tries, seen = tries + 1, []

        def stop(what, done, total, seen=seen, most=9 * tries):
            if what != "compiling" and done:
                seen.append(what)
                if len(seen) > most:
                    raise Stop

        try:
            evaluate(params, settings, out=out, progress=stop)
        except Stop:
            size = partial.stat().st_size
            with open(partial, "ab") as file:
                file.truncate(rng.randrange(size // 2, size))
    assert tries > 2 and not partial.exists()
    found = json.loads(out.read_text())
    assert numbers(found) == numbers(whole)


KILLED = """
import os, signal, sys
import polarjax
from polarjax.evaluation import Settings, evaluate
folder, out = sys.argv[1:]
seen = 0
def kill(what, done, total):
    global seen
    seen += what == "task words" and done > 0
    if seen == 3:
        os.kill(os.getpid(), signal.SIGKILL)
tasks = [folder + "/words.jsonl"]
settings = Settings({"P": polarjax.Polar(0.25)}, batch=4, tasks=tasks)
evaluate(polarjax.load(folder + "/model"), settings, out=out, progress=kill)
"""


def test_a_killed_process_leaves_what_it_found(files, params, tmp_path, run_rtol):
    out = tmp_path / "killed.json"
    arguments = [sys.executable, "-c", KILLED, str(files), str(out)]
    alike = {
        # On a GPU this process holds most of the memory,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # and multiplies float32 as such.
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    done = subprocess.run(arguments, env={**os.environ, **alike})
    assert done.returncode == -signal.SIGKILL and not out.exists()
    lines = out.with_name("killed.json.partial").read_text().splitlines()
    assert len(lines) > 1
    settings = Settings(
        {"P": polarjax.Polar(0.25)}, batch=4, tasks=[files / "words.jsonl"]
    )
    scored = []
    score = Scorer.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "score", lambda *args: scored.append(1) or score(*args))
        resumed, _ = evaluate(params, settings, out=out)
        again = len(scored)
        unbroken, _ = evaluate(params, settings)
    # What the killed process had written was not scored again.
    assert again == len(scored) - again - (len(lines) - 1)
    for label in ("Dense", "P"):
        mine, theirs = (
            r["tasks"]["words"]["results"][label] for r in (resumed, unbroken)
        )
        assert mine["right"] == theirs["right"]
        np.testing.assert_allclose(mine["nll"], theirs["nll"], rtol=run_rtol)


def test_what_is_done_is_not_done_again(params, settings, whole, files):
    def never(what, done, total):
        raise AssertionError("measured again")

    found, path = evaluate(params, settings, out=files / "whole.json", progress=never)
    assert found == whole and path == files / "whole.json"
    other = dataclasses.replace(settings, batch=5)
    with pytest.raises(FileExistsError, match=r"whole.json exists, of another"):
        evaluate(params, other, out=files / "whole.json")


def test_work_of_other_settings_is_not_taken_up(tmp_path):
    facts = {"setup": {"mode": "decode"}, "batch": 4}
    with FileJournal(tmp_path / "a.json", facts) as journal:
        journal["x"] = [0.1]
    with FileJournal(tmp_path / "a.json", facts) as journal:
        assert dict(journal) == {"x": [0.1]}
    other = {"setup": {"mode": "mask"}, "batch": 4}
    message = "setup.mode is 'decode' there, 'mask' here"
    with pytest.raises(FileExistsError, match=message):
        FileJournal(tmp_path / "a.json", other)
    with FileJournal(tmp_path / "a.json", other, overwrite=True) as journal:
        assert not journal


def test_other_routers_are_other_work(params, files, tmp_path):
    settings = Settings(
        {"P": polarjax.Polar(0.25)}, "mask", 4, tasks=[files / "words.jsonl"]
    )
    first, path = evaluate(params, settings, out=tmp_path)
    assert path is not None and path.name.startswith("model-mask-")
    other = random_params(CONFIG, seed=1, routers=True).routers
    changed = with_learned(params, routers=other)
    with pytest.raises(FileExistsError, match="of another evaluation"):
        evaluate(changed, settings, out=path)
    second, _ = evaluate(changed, settings, out=path, overwrite=True)
    mine, theirs = (r["tasks"]["words"]["results"] for r in (first, second))
    assert mine["Dense"]["nll"] == theirs["Dense"]["nll"]
    assert mine["P"]["nll"] != theirs["P"]["nll"]


def test_overwriting_goes_on_where_it_stopped(tmp_path):
    facts, out = {"batch": 4}, tmp_path / "a.json"
    with FileJournal(out, facts) as journal:
        journal.finish({"first": 1})
    for i in range(3):
        with FileJournal(out, facts, overwrite=True) as journal:
            assert len(journal) == i
            journal[str(i)] = i
            # The finished result stays until the new one is whole.
            assert json.loads(out.read_text()) == {"first": 1}
            with pytest.raises(FileExistsError, match="another process is writing"):
                FileJournal(out, facts, overwrite=True)
    with FileJournal(out, {"batch": 5}, overwrite=True) as journal:
        assert not journal
        assert json.loads(out.read_text()) == {"first": 1}
        journal.finish({"second": 2})
    assert json.loads(out.read_text()) == {"second": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "theirs",
    [b"years of work", b'{"facts": {"batch": 4}}\n["x", 1]\n', b"\0" * 99],
    ids=["text", "json", "zeros"],
)
def test_somebodys_own_files_are_left_alone(tmp_path, theirs, overwrite):
    partial, temporary = (tmp_path / f"a.json.{end}" for end in ("partial", "tmp"))
    partial.write_bytes(theirs)
    temporary.write_bytes(theirs)
    message = r"a\.json\.partial is no journal of this polarjax"
    with pytest.raises(FileExistsError, match=message):
        FileJournal(tmp_path / "a.json", {"batch": 4}, overwrite)
    assert partial.read_bytes() == theirs
    partial.unlink()
    with FileJournal(tmp_path / "a.json", {"batch": 4}, overwrite) as journal:
        journal.finish({})
    assert temporary.read_bytes() == theirs
    partial.mkdir()
    with pytest.raises(FileExistsError, match=message):
        FileJournal(tmp_path / "a.json", {"batch": 4}, overwrite=True)


def test_a_journal_that_is_cut_anywhere_goes_on(tmp_path):
    out, facts = tmp_path / "a.json", {"setup": {"mode": "decode"}, "batch": 4}
    with FileJournal(out, facts) as journal:
        journal["x"] = [0.1]
        journal["y"] = {"z": 2}
    whole = journal.partial.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        journal.partial.write_bytes(whole[:size])
        with FileJournal(out, facts) as journal:
            lines = sum(end <= size for end in ends)
            assert list(journal) == ["x", "y"][: max(0, lines - 1)]
        assert journal.partial.read_bytes() == whole[: ends[max(0, lines - 1)]]


def test_a_journal_that_is_damaged_is_said_to_be(tmp_path):
    out, facts = tmp_path / "a.json", {"batch": 4}
    with FileJournal(out, facts) as journal:
        journal["x"] = [0.1]
        journal["y"] = [0.2]
    lines = journal.partial.read_bytes().splitlines(keepends=True)
    for wrong in (b'["x", [0.1\n', b"\0\0\n", b"7\n", b'[["x"], 1]\n', b"\n"):
        content = b"".join([lines[0], wrong, lines[2]])
        journal.partial.write_bytes(content)
        with pytest.raises(ValueError, match=r"partial is damaged in line 2: delete"):
            FileJournal(out, facts)
        assert journal.partial.read_bytes() == content
        with FileJournal(out, facts, overwrite=True) as journal:
            assert not journal


def test_a_full_disk_keeps_what_was_measured(tmp_path, monkeypatch):
    out, facts, fsync = tmp_path / "a.json", {"batch": 4}, os.fsync

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with FileJournal(out, facts) as journal:
        journal.finish({"first": 1})
    with FileJournal(out, facts, overwrite=True) as journal:
        journal["x"] = 1
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(
            OSError, match=r"a\.json\.partial \(No space left .*\): what"
        ):
            journal["y"] = 2
        with pytest.raises(OSError, match=r"No space left on device: .*a\.json'"):
            journal.finish({"second": 2})
    monkeypatch.setattr(os, "fsync", fsync)
    assert json.loads(out.read_text()) == {"first": 1}
    with FileJournal(out, facts, overwrite=True) as journal:
        assert journal["x"] == 1
        journal.finish({"second": 2})
    assert json.loads(out.read_text()) == {"second": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_one_window_and_a_text_without_spaces(params, files, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("x" * 60, encoding="utf-8")
    settings = Settings({"P": polarjax.Polar(0.5)}, text=text, window=60)
    settings = dataclasses.replace(settings, kinds=("windows", "words"))
    result, path = evaluate(params, settings, out=tmp_path / "a.json")
    found = result["perplexity"]
    value, low, high = found["windows"]["results"]["P"]["perplexity"]
    assert value > 1 and low is None and high is None
    assert found["words"]["results"]["P"]["word_perplexity"][1:] == [None, None]
    pytest.importorskip("matplotlib", reason="needs it: pip install matplotlib")
    from polarjax.evaluation.report.page import make_report

    assert make_report([path], tmp_path / "page").exists()


def test_settings_that_make_no_sense(params, settings, files, tmp_path):
    cases = [
        (Settings({}), "nothing to evaluate"),
        (dataclasses.replace(settings, mode="mask"), "generation is what decoding doe"),
        (dataclasses.replace(settings, text=None), "takes its prompts from a text"),
        (dataclasses.replace(settings, policies={}), "pass a sparse policy"),
        (dataclasses.replace(settings, tasks=[files / "last.jsonl"] * 2), "two tasks"),
        (
            dataclasses.replace(settings, prompt_tokens=110, tokens=99),
            "too short for a pr",
        ),
        (dataclasses.replace(settings, kinds=("best",)), "no perplexity 'best'"),
        (dataclasses.replace(settings, prefix=0), "prefix must be a positive integer"),
        (dataclasses.replace(settings, limit=-1), "limit must be a positive integer"),
        (
            dataclasses.replace(settings, window=1),
            "window must be .* at least 2, got 1",
        ),
        (dataclasses.replace(settings, new_tokens=1), "at least 2 new tokens"),
        (dataclasses.replace(settings, new_tokens=200), "beyond the model's context"),
        (dataclasses.replace(settings, policies={"Dense": polarjax.Oracle(0.5)}), "la"),
        (dataclasses.replace(settings, window=257), "window is 257, beyond the model"),
        (dataclasses.replace(settings, tokens=40), "40 tokens are less than one wind"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            evaluate(params, wrong, out=tmp_path / "never.json")
    assert not list(tmp_path.iterdir())


def test_kernels_that_do_not_run_here_are_told_at_once(
    params, settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    wrong = dataclasses.replace(settings, implementation="triton")
    with pytest.raises(ValueError, match="'triton' needs a GPU, and jax runs on the c"):
        evaluate(params, wrong, out=tmp_path / "never.json")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_json_is_told_at_once(params, settings, tmp_path):
    mine = tmp_path / "notes.txt"
    mine.write_text("years of work")
    with pytest.raises(FileExistsError, match=r"notes.txt is a file, but no .json: pa"):
        evaluate(params, dataclasses.replace(settings, tasks=["nowhere"]), out=mine)
