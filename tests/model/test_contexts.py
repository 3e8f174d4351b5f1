"""How long a text may be, and what positions make of a longer one, as transformers."""

import dataclasses
import json

import numpy as np
import pytest

import polarjax
from convert import ConversionError, convert
from convert.__main__ import main
from convert.export import export
from polarjax.policy import Learned
from tests.convert.checkpoints import LLAMA, OPT, opt_tensors, write_hf
from tests.seal import seal

torch = pytest.importorskip("torch", reason="needs it: pip install torch")
transformers = pytest.importorskip(
    "transformers", reason="needs it: pip install transformers"
)

D = LLAMA["hidden_size"] // LLAMA["num_attention_heads"]
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LONGROPE = {
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.0, 4.0, 9.0],
    "original_max_position_embeddings": 16,
}
TEXT = np.random.default_rng(0).integers(0, LLAMA["vocab_size"], 60).tolist()


def model(folder, scaling, **changes):
    """A folder of Hugging Face's, and transformers' model of it."""
    config = {**LLAMA, "rope_scaling": scaling, **changes}
    write_hf(folder, config)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def theirs(reference, tokens):
    with torch.no_grad():
        return reference(torch.tensor([tokens])).logits[0].numpy()


def ours(folder, tokens, **options):
    params = polarjax.load(folder, **options)
    return np.asarray(polarjax.logits(params, [tokens])[0])


def assert_same(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("given", "word"), [(16, "type"), (20, "rope_type"), (64, "rope_type")]
)
def test_yarn_s_recipe(given, word, tmp_path, capsys):
    """Beyond max_position_embeddings, to factor times the original context."""
    scaling = {word: "yarn", **YARN}
    reference = model(tmp_path / "hf", scaling, max_position_embeddings=given)
    made = convert(tmp_path / "hf", tmp_path / "out", dtype="float32", progress=False)
    assert made.context == 64
    note = "the context is 64 tokens, YaRN's factor 4 times 16, beyond max_position"
    assert (note in capsys.readouterr().err) == (given < 64)
    assert_same(ours(tmp_path / "out", TEXT), theirs(reference, TEXT))
    out = polarjax.generate(
        polarjax.load(tmp_path / "out"), [TEXT[:20]], max_new_tokens=30, stop_ids=()
    )
    wanted = reference.generate(
        torch.tensor([TEXT[:20]]), max_new_tokens=30, do_sample=False, eos_token_id=None
    )
    assert out.tokens == [wanted[0, 20:].tolist()]


def test_yarn_without_a_factor(tmp_path):
    scaling = {"rope_type": "yarn", **YARN, "factor": None}
    reference = model(tmp_path / "hf", scaling)  # 64 / 16
    made = convert(tmp_path / "hf", tmp_path / "out", dtype="float32", progress=False)
    assert made.rope and (made.rope.factor, made.context) == (4.0, 64)
    assert_same(ours(tmp_path / "out", TEXT), theirs(reference, TEXT))
    scaling["factor"] = 4.0
    model(tmp_path / "four", scaling)
    four = convert(tmp_path / "four", tmp_path / "f", dtype="float32", progress=False)
    assert four.rope == made.rope


@pytest.mark.parametrize("given", [None, True])
def test_a_plain_kind_may_have_a_factor(given, tmp_path):
    scaling = {"rope_type": "default", "factor": 1.0} if given else None
    write_hf(tmp_path / "hf", {**LLAMA, "rope_scaling": scaling})
    made = convert(tmp_path / "hf", tmp_path / "out", progress=False)
    assert made.rope == polarjax.Rope(LLAMA["rope_theta"])


def test_dynamic_scaling_goes_by_the_context(tmp_path, capsys):
    reference = model(tmp_path / "hf", DYNAMIC, max_position_embeddings=20)
    out = tmp_path / "out"
    made = convert(tmp_path / "hf", out, dtype="float32", progress=False)
    assert made.context == 20
    assert "beyond 20 tokens alone, which is the context" in capsys.readouterr().err
    assert_same(ours(out, TEXT[:20]), theirs(reference, TEXT[:20]))
    # A text as long as the context is what transformers has, once it has read it.
    assert_same(ours(out, TEXT[:41], context=41), theirs(reference, TEXT[:41]))
    assert_same(ours(out, TEXT, context=60), theirs(reference, TEXT))
    # A shorter one does not depend on its length.
    short = ours(out, TEXT[:9], context=60)
    assert_same(ours(out, TEXT, context=60)[:9], short)
    assert np.abs(short - ours(out, TEXT[:9])).max() > 0.01
    # The way back has words for that context too.
    convert(
        *(tmp_path / "hf", tmp_path / "long"),
        dtype="float32",
        context=60,
        progress=False,
    )
    export(polarjax.load(tmp_path / "long"), tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.config.max_position_embeddings == 60
    assert_same(theirs(back, TEXT[:9]), short)


@pytest.mark.parametrize(
    ("kind", "also"),
    [
        ("longrope", {"factor": 3.0, "attention_factor": None}),
        ("su", {}),
    ],
    ids=str,
)
def test_longrope_goes_by_the_context(kind, also, tmp_path, capsys):
    reference = model(tmp_path / "hf", {"rope_type": "longrope", **LONGROPE, **also})
    if kind == "su":  # as Phi-3's were, which puts the original context beside it
        scaling = {"type": "su", **LONGROPE}
        original = scaling.pop("original_max_position_embeddings")
        config = {**LLAMA, "rope_scaling": scaling}
        config["original_max_position_embeddings"] = original
        (tmp_path / "hf/config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    made = convert(tmp_path / "hf", out, dtype="float32", progress=False)
    assert made.context == 64
    assert "takes the long factors for texts of every" in capsys.readouterr().err
    assert_same(ours(out, TEXT), theirs(reference, TEXT))
    # The model is as sure of a short text as of the beginning of a long one ...
    assert_same(ours(out, TEXT[:10]), theirs(reference, TEXT)[:10])
    # ... and as transformers of one where the context is short.
    short = theirs(reference, TEXT[:10])
    assert_same(ours(out, TEXT[:10], context=16), short)
    assert np.abs(short - ours(out, TEXT[:10])).max() > 0.01
    again = convert(
        *(tmp_path / "hf", tmp_path / "short"),
        dtype="float32",
        context=16,
        progress=False,
    )
    assert (again.context, again.rope) == (16, made.rope)
    assert "long factors" not in capsys.readouterr().err
    assert_same(ours(tmp_path / "short", TEXT[:10]), short)
    for name in ("out", "short"):
        export(polarjax.load(tmp_path / name), tmp_path / f"{name}-back")
        back = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / f"{name}-back"
        )
        assert_same(theirs(back, TEXT), theirs(reference, TEXT))


def test_a_context_of_one_s_own(tmp_path, capsys):
    """At conversion and at load, shorter or longer; in notes where it is longer."""
    source = write_hf(tmp_path / "hf")
    command = [str(source), str(tmp_path / "out"), "--context", "100"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "context 100" in said.out
    assert "note: a context of 100 tokens: the model's own is 64" in said.err
    params = polarjax.load(tmp_path / "out")
    assert params.config.context == 100
    assert main([*command[:2], "--overwrite", "--context", "30"]) == 0
    assert "a context of" not in capsys.readouterr().err
    params = polarjax.load(tmp_path / "out", context=200)
    assert params.config.context == 200
    assert "note: a context of 200 tokens: the checkpoint's is 30" in (
        capsys.readouterr().err
    )
    assert polarjax.logits(params, [TEXT * 3]).shape[1] == 180
    params = polarjax.load(tmp_path / "out", context=20)
    out = polarjax.generate(params, [TEXT[:8]], max_new_tokens=90, stop_ids=())
    assert len(out.tokens[0]) == 12 and capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="a prompt may have 19 at most"):
        polarjax.generate(params, [TEXT])
    polarjax.save(params, tmp_path / "saved")
    assert polarjax.load(tmp_path / "saved").config.context == 20


@pytest.mark.parametrize("context", [0, -1, 2**24 + 1, True, 3.0, "9"])
def test_contexts_that_are_none(context, tmp_path):
    source = write_hf(tmp_path / "hf")
    with pytest.raises(ConversionError, match="context must be an integer from 1 to"):
        convert(source, tmp_path / "out", context=context, progress=False)
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="context must be an integer from 1 to"):
        polarjax.load(tmp_path / "out", context=context)


def test_learned_positions_are_what_they_are(tmp_path):
    source = write_hf(tmp_path / "hf", OPT, opt_tensors())
    match = "context 19: the model has learned positions of 20 tokens, and no others"
    with pytest.raises(ConversionError, match=match):
        convert(source, tmp_path / "out", context=19, progress=False)
    made = convert(source, tmp_path / "out", context=20, progress=False)
    assert polarjax.load(tmp_path / "out", context=20).config == made
    with pytest.raises(ValueError, match="context 21: the model has learned positions"):
        polarjax.load(tmp_path / "out", context=21)


def test_the_command_s_options_go_together(tmp_path, capsys):
    convert(write_hf(tmp_path / "hf"), tmp_path / "out", progress=False)
    command = [str(tmp_path / "hf"), str(tmp_path / "out")]
    with pytest.raises(SystemExit) as caught:
        main([*command, "--to-hf", "--context=9"])
    assert caught.value.code == 2
    assert "--context is of the conversion to" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--context=70", "--verify"]) == 0
    assert main([*command, "--context=70", "--verify"]) == 0
    assert main([*command, "--verify"]) == 1
    assert "context is 70, not 64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scaling", "context"),
    [(DYNAMIC, 60), ({"rope_type": "longrope", **LONGROPE}, 60)],
    ids=["dynamic", "longrope"],
)
def test_verify_reads_each_text_as_transformers_does(scaling, context, tmp_path):
    """By its own length, whatever the checkpoint's context makes of it."""
    from convert.verify import verify

    model(tmp_path / "hf", scaling, max_position_embeddings=50)
    made = convert(
        *(tmp_path / "hf", tmp_path / "out"),
        dtype="float32",
        context=context,
        progress=False,
    )
    found = verify(tmp_path / "hf", tmp_path / "out", context=context)
    assert found.agrees and found.prompts == 4
    assert made.rope
    wrong = dataclasses.replace(made.rope, factor=3.0, divisors=made.rope.long_divisors)
    path = tmp_path / "out/config.json"
    made = dataclasses.replace(made, rope=wrong)
    path.write_text(made.to_json(Learned().numbers()))
    seal(tmp_path / "out")
    with pytest.raises(ConversionError, match=r"rope\.\w+ is"):
        verify(tmp_path / "hf", tmp_path / "out", context=context)
