"""lm-eval's tasks under several policies: values, differences, errors."""

import dataclasses
import errno
import functools
import io
import json
import os
import sys
import textwrap

import numpy as np
import pytest
from rich.console import Console

import polarjax
from polarjax.cli import evaluate, main
from polarjax.evaluation.lm_eval import tasks as lm_eval_module
from polarjax.evaluation.lm_eval.tasks import Asked, run_lm_eval, table
from polarjax.evaluation.statistics import difference_interval, mcnemar, mean_interval
from tests.evaluation.tiny_tasks import (
    GENERATION,
    ROWS,
    SPARSE,
    choices,
    make_params,
    request,
)

lm_eval = pytest.importorskip("lm_eval", reason="needs it: pip install lm-eval")

from polarjax.evaluation.lm_eval.model import PolarLM  # noqa: E402

TASKS = {
    "choose": """
        output_type: multiple_choice
        doc_to_text: "{{context}}"
        doc_to_choice: "{{choices}}"
        doc_to_target: "{{label}}"
        metric_list:
          - {metric: acc, aggregation: mean, higher_is_better: true}
          - {metric: acc_norm, aggregation: mean, higher_is_better: true}
    """,
    "read": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list:
          - metric: word_perplexity
            aggregation: weighted_perplexity
            higher_is_better: false
          - metric: bits_per_byte
            aggregation: bits_per_byte
            higher_is_better: false
    """,
    "write": f"""
        output_type: generate_until
        doc_to_text: "{{{{context}}}}"
        doc_to_target: "{{{{target}}}}"
        generation_kwargs: {json.dumps(GENERATION)}
        metric_list:
          - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
    """,
}


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    return make_params(tmp_path_factory.mktemp("lm_eval"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in ROWS.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_task(folder, name, TASKS[name], path)
    (folder / "both.yaml").write_text(
        "group: both\ntask: [choose, write]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    write_task(folder, "lost", TASKS["choose"], folder / "nowhere.jsonl")
    none = textwrap.dedent(TASKS["choose"]) + "num_fewshot: 0\n"
    write_task(folder, "none", none, folder / "choose.jsonl")
    return folder


def write_task(folder, name, text, data):
    source = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ntest_split: test\n"
        f"dataset_kwargs: {json.dumps(source)}\n" + textwrap.dedent(text)
    )


@pytest.fixture(scope="module", autouse=True)
def few_tasks():
    """lm-eval's own 14 000 tasks take ten seconds to list."""
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        few = functools.partial(TaskManager, include_defaults=False)
        patch.setattr("lm_eval.tasks.TaskManager", few)
        yield


@pytest.fixture(scope="module")
def result(params, folder):
    names = ["both", "read"]
    return run_lm_eval(params, {"sparse": SPARSE}, names, batch=4, include_path=folder)


def test_results(params, result):
    json.dumps(result, allow_nan=False)
    assert result["lm_eval"] == lm_eval.__version__ and result["mode"] == "decode"
    assert set(result["tasks"]) == {"choose", "write", "both", "read"}
    for name in ("choose", "write", "read"):
        assert result["tasks"][name]["doc_ids"] == {name: list(range(len(ROWS[name])))}
        for label, low, high in (("Dense", 1, 1), ("sparse", 0.25, 0.9)):
            assert low <= result["tasks"][name]["policies"][label]["density"] <= high
    assert result["tasks"]["choose"]["truncated"] == 0
    assert result["tasks"]["write"]["truncated"] > 0


def answers(params, policy):
    """Which rows of the first task are right, by likelihood and by it per character."""
    model = PolarLM(params, policy, batch=4)
    requests = [request("", *text) for text, *_ in choices(params)]
    nll = np.array([value for value, _ in model.loglikelihood(requests)]).reshape(-1, 3)
    sizes = [[len(choice) for choice in row["choices"]] for row in ROWS["choose"]]
    labels = [row["label"] for row in ROWS["choose"]]
    return nll.argmax(1) == labels, (nll / sizes).argmax(1) == labels


def test_choices_against_dense(params, result):
    dense, sparse = answers(params, polarjax.Dense()), answers(params, SPARSE)
    assert (dense[0] != sparse[0]).any(), "a comparison of equals"
    found = result["tasks"]["choose"]["policies"]
    for i, key in enumerate(("acc,none", "acc_norm,none")):
        assert found["Dense"]["metrics"][key]["value"] == dense[i].mean()
        metric = found["sparse"]["metrics"][key]
        assert metric["value"] == sparse[i].mean()
        assert metric["stderr"] == pytest.approx(sparse[i].std(ddof=1) / 16**0.5)
        interval = difference_interval(sparse[i], dense[i])
        assert metric["against_dense"] == {
            **dict(zip(("difference", "low", "high"), interval, strict=True)),
            "p": mcnemar(sparse[i], dense[i]),
        }
    # The group's accuracy is that of its rows.
    group = result["tasks"]["both"]["policies"]["sparse"]["metrics"]["acc,none"]
    assert group["value"] == sparse[0].mean()


def test_texts_against_dense(params, result):
    requests = [request("", row["text"]) for row in ROWS["read"]]
    dense, sparse = (
        np.array(PolarLM(params, policy, batch=4).loglikelihood_rolling(requests))
        for policy in (polarjax.Dense(), SPARSE)
    )
    found = result["tasks"]["read"]["policies"]["sparse"]["metrics"]
    for key, column in (
        ("word_perplexity,none", str.split),
        ("bits_per_byte,none", str),
    ):
        sizes = np.array([len(column(row["text"])) for row in ROWS["read"]])
        change = mean_interval((sparse - dense) / sizes, sizes)
        metric = found[key]
        if key.startswith("word"):
            assert metric["value"] == pytest.approx(np.exp(-sparse.sum() / sizes.sum()))
            low, value, high = np.exp([-change.high, -change.value, -change.low])
            kind = "ratio"
        else:
            assert metric["value"] == pytest.approx(
                -sparse.sum() / sizes.sum() / np.log(2)
            )
            low, value, high = -np.array([change.high, change.value, change.low])
            low, value, high = np.array([low, value, high]) / np.log(2)
            kind = "difference"
        assert metric["against_dense"] == pytest.approx(
            {kind: value, "low": low, "high": high}
        )


def test_table(result):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(result))
    lines = console.export_text().splitlines()
    row = next(line for line in lines if "sparse" in line and " acc " in line)
    found = result["tasks"]["choose"]["policies"]["sparse"]
    metric = found["metrics"]["acc,none"]
    assert f"{metric['value']:.4f} ± {metric['stderr']:.4f}" in row
    change = metric["against_dense"]
    assert "{difference:+.4f} [{low:.4f}, {high:.4f}]".format(**change) in row
    assert f"{found['density']:.4f}" in row
    row = next(line for line in lines if "sparse" in line and "word_perplexity" in line)
    assert "× " in row


def test_a_metric_that_is_no_mean_is_not_compared(monkeypatch):
    def run(values, reported):
        rows = [
            {"doc_id": i, "filter": "none", "m": value}
            for i, value in enumerate(values)
        ]
        return {"results": {"t": {"m,none": reported}}, "samples": {"t": rows}}

    def compare(one, other):
        return lm_eval_module._compare("t", "m,none", ["t"], one, other)

    dense = run([1.0, 2.0, 6.0], 3.0)
    found = compare(run([1.5, 2.0, 7.0], 3.5), dense)
    interval = mean_interval(np.array([0.5, 0, 1]))
    assert found == dict(zip(("difference", "low", "high"), interval, strict=True))
    assert compare(run([1.5, 2.0, 7.0], 2.0), dense) is None  # a median
    assert compare(run([1.5, 2.0], 1.75), dense) is None  # other rows
    assert compare(run(["a", "b", "c"], 3.5), dense) is None
    assert compare(run([[1, 0], [1, 1], [0, 1]], 0.5), dense) is None
    fractions = {"one": [0.9, 0.0, 1.0], "other": [0.0, 0.1, 0.1]}
    one, other = (run(x, float(np.mean(x))) for x in fractions.values())
    assert compare(one, other)["high"] > 1
    monkeypatch.setattr(lm_eval_module, "_FRACTIONS", ("m",))
    assert compare(one, other)["high"] == 1
    assert compare(other, one)["low"] == -1
    single = compare(run([2.0], 2.0), run([5.0], 5.0))
    assert single == {"difference": -3.0, "low": None, "high": None}


def test_errors(params, folder, monkeypatch, tmp_path):
    run = functools.partial(run_lm_eval, params, {}, include_path=folder, batch=4)
    with pytest.raises(
        ValueError, match=r"no task 'nothing'.*lm-eval ls tasks.*include"
    ):
        run(["choose", "nothing"])
    with pytest.raises(ValueError, match=r"task 'lost' does not load.*nowhere.jsonl"):
        run(["lost"])
    # What lm-eval would leave out without a word.
    for names in (["none"], ["choose", "none"]):
        with pytest.raises(ValueError, match=r"'none' says num_fewshot 0 .*, not 3: l"):
            run(names, Asked(num_fewshot=3))
    with pytest.raises(ValueError, match="name at least one task"):
        run([])
    with pytest.raises(ValueError, match="limit must be above 0, got 0"):
        run(["choose"], Asked(limit=0))
    with pytest.raises(ValueError, match=r"no folder .*nowhere"):
        run(["choose"], include_path=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no mode 'guess'"):
        run(["choose"], Asked(limit=1), mode="guess")
    with pytest.raises(ValueError, match="the label 'Dense' is the dense model's"):
        run_lm_eval(params, {"Dense": SPARSE}, ["choose"], include_path=folder)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        bare = dataclasses.replace(
            params, config=dataclasses.replace(params.config, folder="")
        )
        run_lm_eval(bare, {}, ["choose"], include_path=folder)


def test_without_lm_eval(params, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        ValueError, match=r"not installed: pip install 'polarjax\[eval\]'"
    ):
        run_lm_eval(params, {}, ["choose"])


def test_the_command_writes_what_it_prints(
    params, folder, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "found.json"
    arguments = ["lm-eval", params.config.folder, "--tasks", "choose"]
    options = (
        "--policies dense,random --densities 1/2 --limit 3 --batch 4 --out".split()
    )
    arguments += ["--include-path", str(folder), *options, str(out)]
    assert main.main(arguments) == 0
    record = json.loads(out.read_text())
    shown = capsys.readouterr().out
    assert f"lm-eval {lm_eval.__version__}, mode decode" in shown
    assert list(record["tasks"]["choose"]["policies"]) == ["Dense", "Random 0.500"]
    assert record["made"]["versions"]["jax"] and record["setup"]["dtype"] == "float32"
    assert main.main(arguments) == 1
    assert "exists" in capsys.readouterr().err
    # Before the work, not after it.
    monkeypatch.setattr(evaluate, "load", None)
    assert main.main([*arguments[:-1], "/proc/results.json"]) == 1
    assert "cannot write it: " in capsys.readouterr().err
    monkeypatch.undo()
    # Nobody's files but its own, and the old one until the new one is whole.
    (tmp_path / f"{out.name}.tmp").write_text("years of work")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main.main([*arguments, "--overwrite"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert json.loads(out.read_text()) == record
    assert (tmp_path / f"{out.name}.tmp").read_text() == "years of work"
