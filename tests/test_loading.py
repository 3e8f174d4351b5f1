"""Models and adapters from the hub and its cache."""

import dataclasses
import functools
import json
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import polarjax
from convert import ConversionError, convert
from convert.__main__ import main
from convert.describe import read_config
from polarjax import loading
from polarjax.config import FORMAT_VERSION
from polarjax.policies import save_adapter
from tests.convert.checkpoints import LLAMA as HF_LLAMA
from tests.convert.checkpoints import (
    OPT,
    gguf_tensors,
    llama_tensors,
    opt_tensors,
    write_gguf,
    write_hf,
)
from tests.models import LLAMA, byte_tokenizer, random_params, write_checkpoint


class Cache:
    """A folder laid out as `huggingface_hub` lays out its cache."""

    def __init__(self, root: Path):
        self.hub, self.assets = root / "hub", root / "assets"

    def add(self, name: str, folder: Path, commit="a" * 40, ref="main", only=None):
        """A snapshot of a folder's files, or of some: links to blobs."""
        home = self.hub / f"models--{name.replace('/', '--')}"
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs" / ref).write_text(commit)
        snapshot = home / "snapshots" / commit
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            at = file.relative_to(folder).as_posix()
            if (only is not None and at not in only) or (snapshot / at).exists():
                continue
            blob = home / "blobs" / f"{commit[:8]}-{at.replace('/', '-')}"
            blob.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, blob)
            (snapshot / at).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / at).symlink_to(blob)
        return snapshot


@pytest.fixture
def library(tmp_path, monkeypatch):
    library = pytest.importorskip(
        "huggingface_hub", reason="needs it: pip install huggingface_hub"
    )
    constants = pytest.importorskip(
        "huggingface_hub.constants", reason="needs it: pip install huggingface_hub"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    # The library takes HF_ASSETS_CACHE once, when it is first asked.
    place = functools.partial(
        library.cached_assets_path, assets_dir=tmp_path / "home/assets"
    )
    monkeypatch.setattr(library, "cached_assets_path", place)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return library


@pytest.fixture
def cache(library, tmp_path):
    """Of a machine without a network."""
    return Cache(tmp_path / "home")


@pytest.fixture
def online(library, cache, monkeypatch):
    """A hub: folders, or errors, by name, and which files were asked for."""
    remote, asked = {}, []

    def files(name):
        paths = (p for p in remote[name].rglob("*") if p.is_file())
        return sorted(p.relative_to(remote[name]).as_posix() for p in paths)

    class Api:
        def model_info(self, name, *, revision, timeout):
            assert timeout <= 10
            found = remote.get(name, "RepositoryNotFoundError")
            if isinstance(found, str):
                response = SimpleNamespace(headers={}, request=None, status_code=404)
                raise getattr(library.errors, found)("404 Error", response=response)
            siblings = [SimpleNamespace(rfilename=file) for file in files(name)]
            return SimpleNamespace(sha="b" * 40, siblings=siblings)

    def snapshot_download(
        name, *, revision, allow_patterns, ignore_patterns, local_files_only
    ):
        if local_files_only:
            raise library.errors.LocalEntryNotFoundError("not in the cache")
        if revision == "full-disk":
            raise OSError("No space left on device")
        patterns = {
            "allow_patterns": allow_patterns,
            "ignore_patterns": ignore_patterns,
        }
        wanted = library.utils.filter_repo_objects(files(name), **patterns)
        asked.append(sorted(wanted))
        return str(cache.add(name, remote[name], "b" * 40, only=asked[-1]))

    monkeypatch.setattr(library, "HfApi", Api)
    monkeypatch.setattr(library, "snapshot_download", snapshot_download)
    return SimpleNamespace(remote=remote, asked=asked)


def assert_same(ours, theirs):
    assert ours.config.architecture == theirs.config.architecture
    assert ours.config.model_hash == theirs.config.model_hash
    jax.tree.map(np.testing.assert_array_equal, ours.weights, theirs.weights)
    jax.tree.map(np.testing.assert_array_equal, ours.routers, theirs.routers)


def test_a_model_is_converted_once_for_each_commit(cache, tmp_path, monkeypatch):
    source = write_hf(tmp_path / "tiny")
    snapshot = cache.add("me/tiny", source)
    convert(source, tmp_path / "out", progress=False)
    params = loading.load("me/tiny")
    assert_same(params, polarjax.load(tmp_path / "out"))
    folder = Path(params.config.folder)
    place = cache.assets / "polarjax" / "me--tiny" / ("a" * 40)
    assert folder.name == "tiny"
    assert folder.parent.parent == place / f"bfloat16-{FORMAT_VERSION}"
    stamp = (folder / "config.json").stat().st_mtime_ns
    # Again, and the weights are needed no more.
    (snapshot / "model.safetensors").unlink()
    assert_same(loading.load("me/tiny@main"), params)
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    with pytest.raises(ConversionError, match=r"model\.safetensors"):
        loading.load("me/tiny", dtype="float32")  # not out of bfloat16
    write_hf(tmp_path / "tiny", OPT, opt_tensors())
    cache.add("me/tiny", source, commit="c" * 40, ref="v2")
    assert loading.load("me/tiny@v2").config.family == "opt"
    assert loading.load("me/tiny", dtype="bfloat16").config.family == "llama"
    exact = loading.load("me/tiny@" + "c" * 40, dtype="float32")
    assert str(exact.dtype) == "float32" and exact.config.family == "opt"


def test_a_path_wins(cache, tmp_path):
    write_checkpoint(tmp_path / "me/tiny", random_params(LLAMA))
    cache.add("me/tiny", write_hf(tmp_path / "hf"))
    assert loading.load("me/tiny").config.dim == LLAMA.dim
    assert loading.load("me/tiny@main").config.dim != LLAMA.dim
    cache.add("you/tiny", tmp_path / "hf")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint folder at you/tiny$"):
        loading.load(Path("you/tiny"))
    (tmp_path / "you").mkdir()
    with pytest.raises(FileNotFoundError, match=r"you is a folder here: .*tiny@main"):
        loading.load("you/tiny")


def test_a_checkpoint_of_ours_is_loaded_as_it_is(cache, tmp_path):
    params = random_params(LLAMA, routers=True)
    mine = write_checkpoint(tmp_path / "mine", params)
    snapshot = cache.add("me/mine", tmp_path / "mine")
    found = loading.load("me/mine")
    assert_same(found, mine)
    assert Path(found.config.folder) == snapshot and not cache.assets.exists()
    with pytest.raises(ConversionError, match="me/mine is a polarjax checkpoint"):
        convert("me/mine", tmp_path / "out")
    with pytest.raises(ConversionError, match=r"me/mine has no x\.gguf; it has none"):
        loading.load("me/mine/x.gguf")


def test_what_only_looks_like_ours_is_converted(cache, tmp_path):
    source = write_hf(tmp_path / "tiny", HF_LLAMA | {"format_version": 1})
    (source / "checksums.json").write_text("{}")
    cache.add("me/tiny", source)
    convert(source, tmp_path / "out", progress=False)
    assert_same(loading.load("me/tiny"), polarjax.load(tmp_path / "out"))


def test_gguf(cache, tmp_path):
    (tmp_path / "files/q4").mkdir(parents=True)
    write_gguf(tmp_path / "files/q4/tiny.Q4_0.gguf", kind="Q4_0")
    cache.add("me/tiny-GGUF", tmp_path / "files")
    params = loading.load("me/tiny-GGUF/q4/tiny.Q4_0.gguf")
    convert(tmp_path / "files/q4/tiny.Q4_0.gguf", tmp_path / "out", progress=False)
    assert_same(params, polarjax.load(tmp_path / "out"))
    assert Path(params.config.folder).name == "tiny.Q4_0"
    with pytest.raises(ConversionError, match="name one, such as me/tiny-GGUF/q4/tiny"):
        loading.load("me/tiny-GGUF")
    with pytest.raises(ConversionError, match=r"has no x.gguf; it has q4/tiny.Q4_0"):
        loading.load("me/tiny-GGUF/x.gguf@main")


def test_gguf_in_parts(cache, online, tmp_path):
    """All are downloaded, and nothing else, whichever is named."""
    (tmp_path / "files/q8").mkdir(parents=True)
    write_gguf(tmp_path / "files/q8/tiny.gguf", kind="Q8_0", part_tensors=8)
    write_gguf(tmp_path / "files/other.gguf")
    names = [f"q8/tiny-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    online.remote["me/parts"] = tmp_path / "files"
    params = loading.load(f"me/parts/{names[1]}")
    assert online.asked == [names]
    convert(tmp_path / "files" / names[0], tmp_path / "out", progress=False)
    assert_same(params, polarjax.load(tmp_path / "out"))
    (tmp_path / "files" / names[2]).unlink()
    online.remote["me/fewer"] = tmp_path / "files"
    with pytest.raises(ConversionError, match=rf"has {names[0]}, but no {names[2]}"):
        loading.load(f"me/fewer/{names[0]}")
    assert online.asked == [names]


def test_an_adapter_of_peft_s(online, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    record = {"peft_type": "LORA", "base_model_name_or_path": "me/llama"}
    (folder / "adapter_config.json").write_text(json.dumps(record))
    (folder / "adapter_model.safetensors").write_bytes(b"large")
    online.remote["me/lora"] = folder
    with pytest.raises(ConversionError, match="me/lora is a LoRA adapter of me/llama,"):
        loading.load("me/lora")
    assert online.asked == [["adapter_config.json"]]


def test_files_of_one_name_are_models_of_their_own(cache, tmp_path):
    files = tmp_path / "files"
    write_hf(files)
    for seed, name in enumerate(("a/tiny.gguf", "b/tiny.gguf", "tiny.gguf")):
        (files / name).parent.mkdir(exist_ok=True)
        tensors = gguf_tensors(HF_LLAMA, llama_tensors(seed=seed + 1))
        write_gguf(files / name, tensors=tensors)
    cache.add("me/tiny", files)
    ids = "me/tiny", "me/tiny/a/tiny.gguf", "me/tiny/b/tiny.gguf", "me/tiny/tiny.gguf"
    for again in range(2):
        models = [loading.load(name).config for name in ids]
        assert len({config.model_hash for config in models}) == 4, again
    assert {Path(config.folder).name for config in models} == {"tiny"}


def test_a_tokenizer_that_comes_later(cache, tmp_path):
    source = write_hf(tmp_path / "tiny")
    (source / "README.md").write_text("mine")
    bare = "config.json", "model.safetensors"
    snapshot = cache.add("me/tiny", source, only=bare)
    assert not (loading.find_checkpoint("me/tiny") / "tokenizer.json").exists()
    (source / "tokenizer.json").write_text(byte_tokenizer().to_str())
    cache.add("me/tiny", source)
    found = loading.find_checkpoint("me/tiny")
    assert (found / "tokenizer.json").exists()
    # What conversion does not read, and what it needs no more, is no matter.
    (source / "LICENSE.md").write_text("yours")
    cache.add("me/tiny", source)
    (snapshot / "model.safetensors").unlink()
    assert loading.find_checkpoint("me/tiny") == found


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tiny.gguf"]
)
def test_a_cache_whose_files_were_deleted(name, cache, tmp_path):
    source = write_hf(tmp_path / "tiny")
    (source / "tokenizer.json").write_text(byte_tokenizer().to_str())
    write_gguf(source / "tiny.gguf")
    snapshot = cache.add("me/tiny", source)
    (snapshot / name).resolve().unlink()
    model = "me/tiny/tiny.gguf" if name == "tiny.gguf" else "me/tiny"
    with pytest.raises(ConversionError, match=rf"/{name} is a link to .* not there"):
        loading.load(model)


def test_two_processes_want_the_same(cache, tmp_path, monkeypatch, capsys):
    cache.add("me/tiny", write_hf(tmp_path / "tiny"))
    busy, go_on = threading.Event(), threading.Event()

    def convert_slowly(*args, **options):
        conversions.append(args)
        busy.set()
        assert go_on.wait(60)
        return convert(*args, progress=False, **options)

    def sleep(seconds):
        go_on.set()

    conversions = []
    monkeypatch.setattr("convert.convert", convert_slowly)
    monkeypatch.setattr(loading, "time", SimpleNamespace(sleep=sleep))
    # The lock is of an open folder: for it, threads are as good as processes.
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(loading.find_checkpoint, "me/tiny")
        assert busy.wait(60)
        assert loading.find_checkpoint("me/tiny") == first.result()
    assert len(conversions) == 1
    assert "another process is converting me/tiny: waiting" in capsys.readouterr().err


def test_adapters(cache, online, tmp_path):
    config = dataclasses.replace(LLAMA, model_hash="abc")
    params = random_params(config, routers=True, budgets=(4, 2, 2, 2))
    save_adapter(tmp_path / "files", params)
    (tmp_path / "files/README.md").write_text("mine")
    bare = dataclasses.replace(params, policy=polarjax.Dense())
    write_checkpoint(tmp_path / "model", bare)
    online.remote["me/adapter"] = tmp_path / "files"
    found = loading.load(tmp_path / "model", adapter="me/adapter")
    files = ["card.json", "checksums.json", "fingerprint.safetensors"]
    assert online.asked == [[*files, "routers.safetensors"]]
    assert found.policy.learned.budgets == (4, 2, 2, 2)
    assert found.routers.keys() == params.routers.keys()
    with pytest.raises(
        FileNotFoundError,
        match=r"it has smollm2-135m, smollm2-135m-1pct.* no repository me/no",
    ):
        loading.find_adapter("me/no")
    with pytest.raises(FileNotFoundError, match=r"an adapter is a repository .*, not"):
        loading.find_adapter("me/adapter/x.gguf")


MORE = "additional_chat_templates/rag.jinja"


def test_downloads_what_conversion_reads(online, tmp_path):
    source = write_hf(tmp_path / "tiny")
    useless = "pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors"
    for name in (*useless, "README.md", "model.pt", "weights/x.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"")
    for name in ("tokenizer_config.json", "chat_template.jinja", MORE):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    (source / "tokenizer.model").write_bytes(b"\n\x07\n\x05<unk>")
    online.remote["me/tiny"] = source
    assert main(["me/tiny", str(tmp_path / "out")]) == 0
    assert polarjax.load(tmp_path / "out").config.family == "llama"
    assert online.asked[0] == ["config.json"]
    assert online.asked[1:] == [
        [
            *("chat_template.jinja", "config.json", "model.safetensors"),
            *("tokenizer.model", "tokenizer_config.json"),
        ],
        [MORE],
    ]
    # A destination that is taken is refused before anything is asked.
    assert main(["me/tiny", str(tmp_path / "out")]) == 1
    assert len(online.asked) == 3


def test_a_plan_downloads_the_configuration_alone(online, tmp_path):
    online.remote["me/tiny"] = write_hf(tmp_path / "tiny")
    assert read_config("me/tiny") == read_config(tmp_path / "tiny")
    assert online.asked == [["config.json"]]
    with pytest.raises(ConversionError, match="would be downloaded whole"):
        read_config("me/tiny/model.gguf")
    with pytest.raises(FileNotFoundError, match="no such file or folder: nowhere"):
        read_config("nowhere")


def test_refusals_come_before_the_download(online, tmp_path, capsys):
    source = write_hf(tmp_path / "other")
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (source / "config.json").write_text(json.dumps(config))
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles/pytorch_model.bin").write_bytes(b"")
    (tmp_path / "pickles/config.json").write_text("{}")
    online.remote |= {"me/other": source, "me/pickles": tmp_path / "pickles"}
    for name, words in (
        ("me/other", "the architecture MambaForCausalLM is not supported"),
        ("me/pickles", "me/pickles/pytorch_model.bin is a pickle"),
        ("me/none", "no such file or folder: me/none; the Hugging Face hub has no"),
    ):
        assert main([name, str(tmp_path / "out")]) == 1
        assert f"error: {words}" in capsys.readouterr().err
    assert online.asked == [["config.json"]]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "nor is it an id of the Hugging Face hub"),
        ("a/b/c", "nor is it an id of the Hugging Face hub"),
        ("/a/b", "nor is it an id of the Hugging Face hub"),
        ("a--b/c", "nor is it an id of the Hugging Face hub: Cannot have --"),
        ("me/none", "hub cannot be reached: .*offline mode is enabled"),
    ],
)
def test_neither_here_nor_there(name, words, cache):
    with pytest.raises(FileNotFoundError) as caught:
        loading.load(name)
    assert str(caught.value).startswith(f"no checkpoint folder at {name}; ")
    assert "\n" not in str(caught.value)
    assert caught.match(words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("me/none", "the Hugging Face hub has no repository me/none, or it is private"),
        ("me/gated", "me/gated is gated: ask for access at https://hugg"),
        ("me/tiny@v3", "me/tiny has no revision v3"),
        ("me/full@full-disk", "No space left on device"),
    ],
)
def test_what_the_hub_answers(name, words, online, tmp_path):
    online.remote |= {"me/gated": "GatedRepoError", "me/tiny": "RevisionNotFoundError"}
    online.remote["me/full"] = write_hf(tmp_path / "full")
    with pytest.raises(FileNotFoundError) as caught:
        loading.load(name)
    assert str(caught.value).startswith(f"no checkpoint folder at {name}; {words}")


def test_a_branch_that_moves_meanwhile(online, cache, library, tmp_path, monkeypatch):
    online.remote["me/tiny"] = write_hf(tmp_path / "tiny")
    newer = cache.add("me/tiny", tmp_path / "tiny", "c" * 40)
    with monkeypatch.context() as patch:
        patch.setattr(library, "snapshot_download", lambda *_, **__: str(newer))
        with pytest.raises(FileNotFoundError, match=r"from commit b{40} to c{40}: try"):
            loading.load("me/tiny")
    assert "b" * 40 in loading.load("me/tiny").config.folder


def test_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"me/tiny; .*pip install huggingface_hub"
    ):
        loading.load("me/tiny")
