"""`polarjax calibrate` and `recover`, on a random model whose tokens are bytes."""

import contextlib
import dataclasses
import errno
import io
import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import polarjax
from polarjax.calibration import calibrate, quality, recover
from polarjax.cli import main
from polarjax.policies import adapter as adapter_module
from polarjax.training import loop
from tests.models import LLAMA, random_params, write_checkpoint

TEXT = "\n\n".join(f"{i} green bottles, standing on the wall." for i in range(60))
CALIBRATE = "--tokens 1024 --context 32 --batch 2 --held-out 128 --density 1/2"
RECOVER = "--tokens 256 --context 32 --batch 4 --held-out 128 --rank 2 --patience 9"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "model"
    config = dataclasses.replace(LLAMA, vocab_size=257, context=512, model_hash="abc")
    write_checkpoint(folder, random_params(config))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def shown_by(*command):
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert main.main([str(part) for part in command]) == 0
    return " ".join(shown.getvalue().split())


@pytest.fixture(scope="module")
def calibrated(checkpoint, text, tmp_path_factory):
    """An adapter's folder, and what making it printed."""
    out = tmp_path_factory.mktemp("adapter") / "mine"
    other = out.with_name("other.jsonl")
    rows = [{"text": f"Row {i} of {i * i % 97}."} for i in range(99)]
    other.write_text("\n".join(map(json.dumps, rows)))
    texts = text, f"{other}=0.5", "self=0.5"
    command = ["calibrate", checkpoint, "--text", *texts, "--out", out]
    return out, shown_by(*command, *CALIBRATE.split())


@pytest.fixture(scope="module")
def adapter(calibrated):
    return calibrated[0]


@pytest.mark.devices(4)
@pytest.mark.slow
def test_an_adapter_does_not_depend_on_the_devices(checkpoint, text, tmp_path, capsys):
    """Searched, measured and mended over four, as on one."""
    options = f"--text {text} --tokens 256 --context 32 --batch 2 --held-out 192"
    made = []
    for devices in ("", "--tp 2 --dp 2"):
        mine, mended = tmp_path / f"a{len(made)}", tmp_path / f"b{len(made)}"
        common = f"{options} {devices}"
        command = f"calibrate {checkpoint} {common} --max-drop 9% --out {mine}"
        shown_by(*command.split())
        command = f"recover {checkpoint} {common} --adapter {mine} --density 1/2"
        shown_by(*f"{command} --rank 2 --out {mended}".split())
        assert ("over 4 devices" in capsys.readouterr().err) == bool(devices)
        made.append((mine, mended))
    for one, other in zip(*made, strict=True):
        cards = [card_of(folder) for folder in (one, other)]
        assert cards[0]["budgets"] == pytest.approx(cards[1]["budgets"])
        assert cards[0]["cost"] == cards[1]["cost"]
        for card in cards:
            card["polar"] = card["quality"]["text"]["Polar"]["perplexity"]
        assert cards[0]["polar"] == pytest.approx(cards[1]["polar"], rel=1e-3)
        routers = [load_file(folder / "routers.safetensors") for folder in (one, other)]
        assert routers[0].keys() == routers[1].keys()
        for name, array in routers[0].items():
            close = np.isclose(array, routers[1][name], rtol=0.02, atol=1e-3)
            assert close.mean() > 0.99, name


def card_of(folder):
    return json.loads((folder / "card.json").read_text())


def test_calibrate_prints_recall_and_perplexities_and_writes_a_card(
    checkpoint, text, calibrated, capsys
):
    adapter, shown = calibrated
    card = card_of(adapter)
    assert card["model_hash"] == "abc"
    assert card["budgets"] == [4, 2, 2, 2]
    names = ["text", "other", "self"]
    assert [(t["name"], t["weight"]) for t in card["texts"]] == list(
        zip(names, [1, 0.5, 0.5], strict=True)
    )
    assert card["tokens"] == 1024 and card["context"] == 32
    assert card["held_out_tokens"] == dict.fromkeys(names, 128)
    assert card["training"]["steps"] == 16 and card["training"]["sparse"] == 0.5
    assert card["made"]["command"].startswith("polarjax")
    assert list(card["recall"]) == list(card["quality"]) == names
    assert "contract" not in card
    assert "warning" in card or card["cost"]["expected_speedup"] > 1
    for name in names:
        assert len(card["recall"][name]["by_layer"]) == 3
        assert card["recall"][name]["mean"]["chance"] == pytest.approx(0.5, abs=0.1)
        quality = card["quality"][name]
        wanted = ["Dense", "Oracle", "Polar", "Adaptive", "Random"]
        assert sorted(quality) == sorted(wanted)
        assert quality["Polar"]["density"] == (1 + 3 * 0.5) / 4
        assert f"{card['recall'][name]['mean']['routers']:.3f}" in shown
    for word in ("recall", "chance", "Dense", "Oracle", "Polar", "Random", "95 %"):
        assert word in shown
    # Before the work, not after it.
    again = ["calibrate", str(checkpoint), "--text", str(text), "--out", str(adapter)]
    assert main.main(again) == 1
    assert "exists" in capsys.readouterr().err


def test_a_command_that_was_stopped_goes_on(
    checkpoint, text, tmp_path, monkeypatch, capsys
):
    def interrupt(*_):
        raise KeyboardInterrupt

    command = ["calibrate", checkpoint, "--text", text, *CALIBRATE.split()]
    work = ["--work", tmp_path / "work"]
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "measure_recall", interrupt)
        stopped = [*command, *work, "--out", tmp_path / "a"]
        assert main.main([str(part) for part in stopped]) == 130
    assert [p.name for p in tmp_path.iterdir()] == ["work"]
    other = [*command, *work, "--seed", 1, "--out", tmp_path / "a"]
    assert main.main([str(part) for part in other]) == 1
    assert "a training of other settings or texts" in capsys.readouterr().err
    shown_by(*command, *work, "--out", tmp_path / "a")
    shown_by(*command, "--out", tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    one, other = (
        (tmp_path / name / "routers.safetensors").read_bytes() for name in "ab"
    )
    assert one == other


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "command", ["calibrate", pytest.param("recover", marks=pytest.mark.slow)]
)
def test_a_training_is_kept_until_its_adapter_is_saved(
    checkpoint, text, adapter, tmp_path, monkeypatch, capsys, command
):
    """A full disk, an --out that appears meanwhile; then it goes on elsewhere."""
    options = {"calibrate": CALIBRATE, "recover": f"--adapter {adapter} {RECOVER}"}
    base = f"{command} {checkpoint} --text {text} {options[command]}".split()
    work, out = tmp_path / "work", tmp_path / "a"
    kept = f"the training is kept in {work}: the same command, with another --out"

    def ask(out):
        code = main.main([*base, "--work", str(work), "--out", str(out)])
        return code, capsys.readouterr().err

    with monkeypatch.context() as patch:
        patch.setattr(adapter_module, "write_tensors", full)
        code, error = ask(out)
    assert code == 1 and "No space left on device" in error and kept in error
    assert error.count("\n") == 1 and str(out) in error
    assert [path.name for path in tmp_path.iterdir()] == ["work"]

    steps = []

    def never(*_, **__):
        raise AssertionError("it was trained again")

    def appear(*args, **options):
        steps.append(1)
        out.mkdir(exist_ok=True)
        (out / "thesis.txt").write_text("years of work")
        return measure(*args, **options)

    module = calibrate if command == "calibrate" else recover
    measure = module.measure_quality
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_rows", never)
        patch.setattr(module, "measure_quality", appear)
        code, error = ask(out)
        assert code == 1 and "a exists: choose another place" in error and kept in error
        assert error.count("\n") == 1 and steps
        patch.setattr(module, "measure_quality", measure)
        assert ask(tmp_path / "b")[0] == 0
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert main.main([*base, "--out", str(tmp_path / "c")]) == 0
    one, other = (
        (tmp_path / name / "routers.safetensors").read_bytes() for name in "bc"
    )
    assert one == other


@pytest.mark.parametrize("command", ["calibrate", "recover"])
def test_the_places_are_tried_before_the_work(
    checkpoint, text, adapter, tmp_path, monkeypatch, capsys, command
):
    def never(*_, **__):
        raise AssertionError("the work began")

    monkeypatch.setattr(calibrate.Texts, "read", never)
    options = {"calibrate": CALIBRATE, "recover": f"--adapter {adapter} {RECOVER}"}
    base = f"{command} {checkpoint} --text {text} {options[command]}".split()
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "thesis.txt").write_text("years of work")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    work, mine = f"--work {tmp_path / 'work'}", f"--work {tmp_path / 'mine'}"
    for wrong, message in (
        (f"--out /proc/nope {work}", "cannot write it: No such file or"),
        (f"--out {tmp_path / 'mine'} {work}", "mine exists: choose another place"),
        (f"--out {tmp_path / 'mine'} --overwrite", "mine is no polarjax adapter"),
        (
            f"--out {checkpoint} --overwrite",
            "model is no polarjax adapter: it will not",
        ),
        (f"--out {tmp_path / 'b'} --work {tmp_path / 'b'}", "neither may be the other"),
        (f"--out {tmp_path / 'b/c'} {work}/../b", "neither may be the other"),
        (f"--out {tmp_path / 'a'} {work}", "a.partial holds thesis.txt, which this"),
        (f"--out {tmp_path / 'b'} {mine}", "mine is no training of polarjax"),
        (f"--out {tmp_path / 'b'} --work /proc/nope", "No such file or directory"),
    ):
        assert main.main([*base, *wrong.split()]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert main.main([*base, "--out", str(tmp_path / "b")]) == 1
    assert re.search(r"no space for .*b: it needs 1\.1 MB and", capsys.readouterr().err)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a.partial", "mine", "work"}
    for place in ("a.partial", "mine"):
        assert (tmp_path / place / "thesis.txt").read_text() == "years of work"


def test_an_adapter_that_is_much_worse_is_not_advertised(
    checkpoint, text, tmp_path, monkeypatch, capsys
):
    # How much it takes has tests of its own.
    monkeypatch.setattr(quality, "_MUCH", -1.0)
    base = f"calibrate {checkpoint} --text {text} {CALIBRATE}".split()
    assert main.main([*base, "--out", str(tmp_path / "a")]) == 0
    card = card_of(tmp_path / "a")
    ratio = card["quality"]["text"]["Polar"]["ratio_to_dense"][0]
    warning = capsys.readouterr().err.splitlines()[-1]
    start = f"warning: perplexity of text is {ratio - 1:.0%} above the dense model's: "
    assert warning.startswith(start) and warning == f"warning: {card['warning']}"
    for help in ("--tokens, now 1,024", "polarjax recover", "--density", "--max-drop"):
        assert help in warning
    assert "expected_speedup" not in card["cost"] and card["cost"]["bytes_saved"] > 0


@pytest.mark.slow
def test_a_promise_that_cannot_be_kept_leaves_the_model_dense(
    checkpoint, tmp_path, monkeypatch
):
    """Routers that learned nothing, on text that the dense model knows best."""
    train = calibrate.train_routers

    def idle(params, blocks, training, **options):
        training = dataclasses.replace(training, learning_rate=0.0)
        return train(params, blocks, training, **options)

    monkeypatch.setattr(calibrate, "train_routers", idle)
    out = tmp_path / "refused"
    options = "--tokens 64 --context 64 --held-out 1536 --density 1/2 --mode mask"
    command = ["calibrate", checkpoint, "--text", "self", *options.split()]
    shown = shown_by(*command, "--max-drop", "0.01%", "--out", out)
    assert "only dense passes a drop of 0.01% at 95% confidence on self" in shown
    card = card_of(out)
    assert card["budgets"] == [4, 4, 4, 4] and card["contract"]["kept"] is False
    assert card["quality"]["self"]["Polar"]["ratio_to_dense"][0] == 1
    params = polarjax.load(checkpoint, adapter=out)
    sparse, dense = (
        polarjax.generate(params, ["one"], max_new_tokens=5, policy=policy)
        for policy in (None, polarjax.Dense())
    )
    assert sparse.tokens == dense.tokens and set(sparse.stats.density) == {1.0}


def test_recover(checkpoint, text, adapter, tmp_path):
    out = tmp_path / "recovered"
    command = ["recover", checkpoint, "--adapter", adapter, "--text", text, "self"]
    shown = shown_by(*command, *RECOVER.split(), "--learning-rate", 1e-2, "--out", out)
    card = card_of(out)
    assert card["budgets"] == [4, 2, 2, 2] and card["recovery"]["rank"] == 2
    assert set(card["divergence"]) == {"text", "self"}
    table = shown.split("KL from dense, nats a token")[1].split("┘")[0]
    numbers = [float(x) for x in re.findall(r"\d\.\d{4}", table)]
    assert len(numbers) == 4
    for before, after in card["divergence"].values():
        assert 0 < after
        for value in (before, after):  # the card rounds once more
            assert min(abs(value - number) for number in numbers) < 1.1e-4
    assert f"{card['parameters']:,} new parameters" in shown
    params = polarjax.load(checkpoint, adapter=out)
    assert "updates" in params.routers["layers_0"]
    options = {"max_new_tokens": 5, "policy": polarjax.Dense()}
    same = polarjax.generate(polarjax.load(checkpoint), ["one"], **options)
    assert polarjax.generate(params, ["one"], **options).tokens == same.tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("calibrate {checkpoint} --text nowhere", "no text file at"),
        (
            "calibrate {checkpoint} --text {text}",
            "text.txt has 2,048 tok",
        ),
        ("calibrate {checkpoint} --text {text}=x", "is no PATH=WEIGHT"),
        ("calibrate {checkpoint} --text self self", "are named 'self'"),
        (
            "calibrate {checkpoint} {short} --tokens 9",
            "at least one block",
        ),
        ("calibrate {checkpoint} {short} --density 1", "keeps all 4 KV"),
        (
            "calibrate {checkpoint} {short} --neuron-rank 4",
            "for ReLU MLPs",
        ),
        (
            "calibrate {checkpoint} {short} --max-drop 0",
            "max_drop must be",
        ),
        (
            "calibrate {checkpoint} {short} --batch 0",
            "batch must be a positive integer, got 0",
        ),
        (
            "calibrate {checkpoint} {short} --batch 5",
            "batch is 5, but the text to learn from has 4 blocks: lower it",
        ),
        (
            "calibrate {checkpoint} {short} --learning-rate nan",
            "learning_rate must be a number from 0 on, got nan",
        ),
        (
            "calibrate {checkpoint} {short} --passes 0",
            "passes must be a number above 0, got 0.0",
        ),
        (
            "calibrate {checkpoint} {short} --max-drop 1% --decode-batch 0",
            "(--decode-batch) must be a positive integer, got 0",
        ),
        (
            "recover {checkpoint} {short} --adapter {adapter} --batch 2 --patience 0",
            "patience must be a positive integer, got 0",
        ),
        ("calibrate {checkpoint} {short} --dp 4096", "dp is 4096, but there "),
        (
            "recover {checkpoint} {short} --adapter nowhere",
            "no adapter at",
        ),
        (
            "recover {checkpoint} {short} --adapter smollm2-135m",
            "was made for another model (hash",
        ),
        (
            "recover {checkpoint} {short} --adapter {adapter} --rank 0",
            "rank of the updates must be at least 1, got 0",
        ),
        (
            "recover {checkpoint} {short} --adapter {adapter} --work {text}",
            "text.txt is no training of polarjax",
        ),
    ],
)
def test_errors_are_one_line(
    checkpoint, text, adapter, tmp_path, capsys, arguments, message
):
    short = f"--text {text} --tokens 128 --context 32 --held-out 128"
    places = {"checkpoint": checkpoint, "text": text, "adapter": adapter}
    filled = arguments.format(short=short, **places)
    assert main.main([*filled.split(), "--out", str(tmp_path / "a")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
