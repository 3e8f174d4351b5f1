"""The model that this project trains: what it learns, and the folder it is kept in."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax
from benchmarks.models import books_opt, books_text, opt_training
from benchmarks.models.opt_training import Training, train
from convert import convert
from convert.export import shards
from polarjax.engine import Tokenizer
from polarjax.model import Decoder, logits, whole

SHARD = 45_000
CONFIG = books_opt.make_config(
    vocab=300, context=32, layers=2, dim=32, heads=4, neurons=64
)
TRAINING = Training(steps=20, batch=8, learning_rate=1e-2, compute="float32")


def write_text(path, paragraphs, seed):
    """Documents of five paragraphs each, of words that follow one another."""
    rng = np.random.default_rng(seed)
    words = "the cat, a dog sat on mats; it's élan 42 times I saw him run – far".split()
    parts = []
    for i in range(1, paragraphs + 1):
        at = np.cumsum(rng.integers(0, 3, rng.integers(5, 40))) % len(words)
        parts.append(" ".join(words[j] for j in at) + ".")
        parts.append("\n\n\n" if i % 5 == 0 else rng.choice(["\n\n", "\n", "\n\n  "]))
    path.write_text("".join(parts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return write_text(folder / "train.txt", 600, 0), write_text(folder / "v.txt", 40, 1)


@pytest.fixture(scope="module")
def built(texts, tmp_path_factory):
    """The folder, and what was said of it."""
    out = tmp_path_factory.mktemp("built") / "opt"
    record = books_opt.build(
        texts[0],
        texts[1],
        out,
        CONFIG,
        TRAINING,
        dtype="float32",
        shard_bytes=SHARD,
    )
    return out, record


@pytest.fixture(scope="module")
def loaded(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "opt"
    convert(built[0], folder, dtype="float32", progress=False)
    return polarjax.load(folder)


@pytest.fixture(scope="module")
def tokenizer(texts):
    return books_text.train_tokenizer(texts[0], 300)


@pytest.fixture(scope="module")
def tokens(texts, tokenizer):
    return books_text.read_tokens(texts[0], tokenizer, 1)


def test_the_loss_falls_and_a_seed_decides_everything(tokens, run_rtol):
    first, second = train(CONFIG, tokens, TRAINING), train(CONFIG, tokens, TRAINING)
    assert first.losses[0] == pytest.approx(math.log(300), rel=0.05)
    assert np.mean(first.losses[-3:]) < 0.7 * first.losses[0]
    assert len(first.losses) == 20
    np.testing.assert_allclose(first.losses, second.losses, rtol=run_rtol)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, run_rtol, atol=10 * run_rtol),
        first.weights,
        second.weights,
    )
    start = [
        opt_training.initial_weights(jax.random.key(seed), config=CONFIG)
        for seed in (0, 1)
    ]
    table, other = (np.asarray(weights["embed"]["tokens"]) for weights in start)
    assert table.std() == pytest.approx(0.02, rel=0.05) and (table != other).all()
    # Two layers add to the residual stream twice each.
    assert np.std(start[0]["layers_1"]["mlp"]["down"]) == pytest.approx(0.01, rel=0.1)


def test_sixteen_bit_products_learn_as_well(tokens):
    exact = train(CONFIG, tokens, TRAINING)
    half = train(CONFIG, tokens, dataclasses.replace(TRAINING, compute="bfloat16"))
    np.testing.assert_allclose(half.losses, exact.losses, rtol=0.02)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.weights)} == {"float32"}


def test_losses_and_gradients_are_those_of_the_model(tokens):
    weights = opt_training.initial_weights(jax.random.key(0), config=CONFIG)
    weights = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.sign(leaf), weights)
    rows = jnp.asarray(books_text.blocks(tokens, 32)[:5], jnp.int32)

    def differentiate(function):
        return jax.jit(jax.value_and_grad(function, has_aux=True))

    def ours(weights):
        found = opt_training.token_losses(weights, rows, config=CONFIG, dtype="float32")
        return found[0].mean(), found

    def plain(weights):
        hidden = []
        found = whole(
            Decoder(CONFIG),
            weights,
            rows[:, :-1],
            observe=lambda layer, *seen: hidden.append(seen[-1]),
        )
        chosen = jnp.take_along_axis(
            jax.nn.log_softmax(logits(Decoder(CONFIG), weights, found.x)),
            rows[:, 1:, None],
            axis=-1,
        )
        return -chosen.mean(), hidden

    (loss, (nll, shares)), gradient = differentiate(ours)(weights)
    (wanted, hidden), expected = differentiate(plain)(weights)
    assert nll.shape == (5, 32) and shares["active"].shape == (2, 5)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        gradient,
        expected,
    )
    mlp = weights["layers_1"]["mlp"]
    above = hidden[1] @ mlp["up"].T + mlp["up_bias"] > 0
    np.testing.assert_allclose(shares["active"][1], above.mean((1, 2)), atol=1e-3)


def test_shares_of_heads():
    norms = np.array([[1, 4, 2, 3], [0, 0, 0, 5], [2, 2, 2, 2], [0, 0, 0, 0]])
    o = norms[..., None] * np.array([0.6, 0, 0.8])
    lesser, each = opt_training.head_shares(jnp.asarray(o))
    np.testing.assert_allclose(lesser, [0.3, 0, 0.5, 0.5], atol=1e-5)
    np.testing.assert_allclose(each[0], [0.1, 0.4, 0.2, 0.3], atol=1e-5)
    slope = jax.grad(lambda o: opt_training.head_shares(o)[0].sum())(jnp.asarray(o))
    assert np.isfinite(slope).all()
    uneven = np.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0], [1, 0, 0, 0]])
    found = opt_training.imbalance(jnp.asarray(uneven))
    np.testing.assert_allclose(found, [0, 1, 3], atol=1e-6)


def test_a_penalty_makes_heads_choose(tokens):
    lesser, uneven = {}, {}
    for weight in (0.0, 1.0):
        training = dataclasses.replace(TRAINING, steps=60, head_sparsity=weight)
        trained = train(CONFIG, tokens, training)
        shares = opt_training.evaluate(CONFIG, trained.weights, tokens, 8, "float32")[1]
        lesser[weight] = shares["lesser_heads"][1]  # layer 0 is free
        uneven[weight] = float(opt_training.imbalance(jnp.array(shares["heads"][1])))
    assert lesser[1.0] < 0.7 * lesser[0.0]
    assert uneven[1.0] < 0.1  # each token has its own
    with pytest.raises(ValueError, match="head_sparsity must not be negative: -1"):
        Training(head_sparsity=-1)


def test_shards_are_small_and_hold_everything(built):
    out, record = built
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert len(files) > 1 and all(file.stat().st_size <= SHARD for file in files)
    assert sum(file.stat().st_size for file in files) > 4 * record["parameters"]
    assert not list(out.parent.glob("*.partial"))


def test_the_record_says_what_was_made(built, loaded):
    out, record = built
    assert json.loads((out / "training.json").read_text()) == record
    leaves = jax.tree.leaves(loaded.weights)
    assert record["parameters"] == sum(leaf.size for leaf in leaves)
    assert record["tokens_seen"] == 20 * 8 * 32
    assert len(record["active_neurons"]) == 2
    assert all(0 < share < 1 for share in record["active_neurons"])
    assert all(0 < share < 0.5 for share in record["lesser_heads"])
    assert all(0 < uneven < 1 for uneven in record["head_imbalance"])


def test_perplexity_is_that_of_the_converted_model(built, loaded, texts, tokenizer):
    rows = books_text.blocks(books_text.read_tokens(texts[1], tokenizer, 1), 32)
    logits = polarjax.logits(loaded, rows[:, :-1].tolist())
    found = jax.nn.log_softmax(np.asarray(logits))
    nll = -np.take_along_axis(np.asarray(found), rows[:, 1:, None].astype(int), -1)
    assert rows[:, 1:].size == built[1]["validation_tokens"]
    assert math.exp(nll.mean()) == pytest.approx(
        built[1]["validation_perplexity"], rel=1e-4
    )


def test_transformers_computes_the_same(built, loaded, texts):
    torch = pytest.importorskip("torch", reason="needs it: pip install torch")
    transformers = pytest.importorskip(
        "transformers", reason="needs it: pip install transformers"
    )
    reference = transformers.OPTForCausalLM.from_pretrained(
        built[0], dtype=torch.float32
    ).eval()
    ids = np.random.default_rng(0).integers(0, 300, (3, 32))
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)).logits.numpy()
    ours = np.asarray(polarjax.logits(loaded, ids.tolist()))
    assert np.linalg.norm(ours - expected) < 1e-4 * np.linalg.norm(expected)
    auto = transformers.AutoTokenizer.from_pretrained(built[0])
    text = texts[1].read_text(encoding="utf-8")[:500]
    own = Tokenizer.load(loaded.config)
    assert own is not None
    assert auto(text)["input_ids"] == own.encode(text)
    assert auto.eos_token_id == loaded.config.eos_ids[0] == 0


def test_text_survives_the_tokenizer(loaded):
    tokenizer = Tokenizer.load(loaded.config)
    assert tokenizer is not None
    for text in ("", "the cat", "  two\n\n spaces ", "naïve – 漢字\t\0\r\n🙂"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer.encode(text, special=False)  # and starts with nothing


def test_pieces_have_the_tokens_of_the_whole(texts, tokenizer, tokens):
    read = list(books_text.pieces(texts[0], size=200))
    assert len(read) > 200
    whole = texts[0].read_text(encoding="utf-8").split(books_text.SEPARATOR)[:-1]
    expected = [0]
    for document in whole:
        expected += [*tokenizer.encode(document).ids, 0]
    assert tokens.tolist() == expected
    small = [tokenizer.encode(t).ids + [0] * ends for t, ends in read]
    assert [0, *(i for ids in small for i in ids)] == expected

    def words(text):  # no vocabulary merges across them
        return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    assert [w for t, _ in read for w in words(t)] == [
        w for t in whole for w in words(t)
    ]


def test_batches_are_blocks_of_the_text_in_another_order_each_epoch():
    text = np.arange(1003, dtype=np.uint16)
    stream = books_text.batches(text, 10, 7, 0)
    epochs = [np.concatenate([next(stream) for _ in range(14)]) for _ in range(2)]
    for rows in epochs:
        assert rows.shape == (98, 11)
        assert (np.diff(rows.astype(int)) == 1).all()  # of the text, in its order
        assert len(np.unique(rows[:, 1:])) == rows[:, 1:].size  # none twice
    first, second = (rows[:, 0].tolist() for rows in epochs)
    assert sorted(first) != first and first != second
    again = books_text.batches(text, 10, 7, 0)
    np.testing.assert_array_equal(next(again), epochs[0][:7])
    cut = books_text.blocks(text, 10)
    assert cut.shape == (100, 11) and cut[1, 0] == cut[0, -1] == 10


def test_the_model_itself_is_small_enough():
    config = books_opt.make_config()
    assert 26e6 < books_opt.parameters(config) < books_opt.LARGEST
    shards(config, "bfloat16", 15 * 2**20)
    with pytest.raises(ValueError, match=r"embed_tokens.*float32.*15,728,640"):
        shards(config, "float32", 15 * 2**20)
    with pytest.raises(ValueError, match=r"parameters are more than 28,000,000"):
        books_opt.make_config(layers=8)


TOY = "--steps 1 --batch 2 --context 32 --layers 1 --dim 32 --heads 4 --neurons 32"


def test_the_command(texts, tmp_path, capsys):
    # The sizes of the other tests, whose programs are compiled.
    options = "--steps 20 --batch 8 --context 32 --layers 2 --dim 32 --heads 4"
    options += f" --neurons 64 --vocab 300 --learning-rate 0.01 --out {tmp_path}/opt"
    options += f" --text {texts[0]} --valid {texts[1]}"
    assert books_opt.main(options.split()) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out.splitlines()[-1])
    assert record["training"]["compute"] == "bfloat16" and record["final_loss"] < 6
    assert "step 1 of 20" in captured.err and "step 20 of 20" in captured.err
    assert (tmp_path / "opt" / "tokenizer.json").exists()
    assert books_opt.main(options.split()) == 1
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, "", "no text file at {path}"),
        (b"caf\xe9 " * 500, "", "{path} is no UTF-8 text"),
        (b"", "", "{path} gives 257 different tokens, not 300"),
        (b"too short", "--vocab 257", "{path} has 11 tokens, at least 97 are needed"),
        (b"text", "--vocab 256", "a vocabulary has at least 257 tokens, not 256"),
        (b"text", "--dim 33", "dim 33 is not a multiple of heads 4"),
        (b"text", "--steps 0", "steps must be at least 1"),
        (b"text", "--shard-mib 0.001", "embed_tokens.weight takes"),
    ],
)
def test_bad_input_is_one_line(content, options, message, texts, tmp_path, capsys):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    files = ["--text", str(path), "--valid", str(texts[1])]
    out = ["--out", str(tmp_path / "opt"), "--vocab", "300"]
    assert books_opt.main([*files, *out, *TOY.split(), *options.split()]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message.format(path=path) in error
    assert [p.name for p in tmp_path.iterdir() if p != path] == []


def test_a_held_out_text_that_is_too_short_is_named(texts, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    with pytest.raises(ValueError, match=r"short\.txt has \d+ tokens, at least 33"):
        books_opt.build(texts[0], short, tmp_path / "opt", CONFIG, TRAINING)
    with pytest.raises(FileNotFoundError, match="absent"):
        books_opt.build(texts[0], tmp_path / "absent", tmp_path / "o", CONFIG, TRAINING)


def test_a_loss_that_is_no_number_stops_the_training(tokens, monkeypatch):
    def step(weights, state, batch, **_):
        return weights, state, jnp.array(jnp.nan)

    monkeypatch.setattr(opt_training, "_train_step", step)
    with pytest.raises(FloatingPointError, match="step 1 is nan: lower the learning"):
        train(CONFIG, tokens, TRAINING)
