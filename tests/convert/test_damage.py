"""Damaged files, full disks and killed processes: one error, nothing that loads."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from convert import ConversionError, convert
from convert.readers.gguf_header import read_header
from polarjax.params import read_folder
from tests.convert.checkpoints import (
    LLAMA,
    llama_tensors,
    write_gguf,
    write_hf,
    write_sharded,
)

REPOSITORY = Path(__file__).resolve().parents[2]


def safetensors_header(path: Path) -> int:
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def convert_bytes(path: Path, content: bytes, out: Path):
    """Convert `path` with this content: weights by path, or None if refused."""
    path.write_bytes(content)
    source = path if path.suffix == ".gguf" else path.parent
    try:
        convert(source, out, dtype="float32", overwrite=True, progress=False)
    except ConversionError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        assert not out.exists() and not out.with_name(out.name + ".partial").exists()
        return None
    params = read_folder(out)
    shutil.rmtree(out)
    return params


def assert_equal(params, reference):
    jax.tree.map(np.testing.assert_array_equal, params.weights, reference.weights)


def test_truncated_safetensors(tmp_path):
    path = write_hf(tmp_path / "hf") / "model.safetensors"
    whole = path.read_bytes()
    header = safetensors_header(path)
    for end in (0, 1, 7, 8, 9, header // 2, header, header + 1, len(whole) - 1):
        assert convert_bytes(path, whole[:end], tmp_path / "out") is None, end
    assert convert_bytes(path, whole + b"\0", tmp_path / "out") is None


def test_truncated_gguf(tmp_path, tokenizer_fields):
    path = tmp_path / "model.gguf"
    write_gguf(path, fields=tokenizer_fields)
    whole = path.read_bytes()
    ends = [0, 3, 4, 7, 8, 15, 23, 24, *range(32, len(whole), 997), len(whole) - 1]
    for end in ends:
        assert convert_bytes(path, whole[:end], tmp_path / "out") is None, end
    assert convert_bytes(path, whole + bytes(64), tmp_path / "out") is None


@pytest.mark.parametrize("count", [2**31, 2**40, 2**63, 2**64 - 1])
def test_absurd_counts_in_gguf(count, tmp_path, tokenizer_fields):
    """Refused at once: nothing is allocated or looped over on a file's word."""
    path = tmp_path / "model.gguf"
    write_gguf(path, fields=tokenizer_fields)
    whole = path.read_bytes()
    number = struct.pack("<Q", count)
    array = whole.index(b"tokenizer.ggml.tokens") + 21 + 4 + 4
    types = whole.index(b"tokenizer.ggml.token_type") + 25 + 4 + 4
    shape = whole.index(b"token_embd.weight") + 17 + 4
    for at in (8, 16, 24, array, array + 8, types, shape, shape + 8, shape + 20):
        content = whole[:at] + number + whole[at + 8 :]
        assert convert_bytes(path, content, tmp_path / "out") is None, at


def test_arrays_that_would_fill_the_memory(tmp_path):
    """Numbers of a million tokens twice, and one more."""
    path = tmp_path / "model.gguf"
    counts = {b"a": 2**20, b"b": 2**20, b"c": 1}
    for keys in (b"ab", b"abc"):
        arrays = [
            struct.pack("<QBIIQ", 1, key, 9, 0, counts[bytes([key])])
            + bytes(counts[bytes([key])])
            for key in keys
        ]
        head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(arrays))
        data = np.frombuffer((head + b"".join(arrays)).ljust(2**22, b"\0"), np.uint8)
        match = "1 numbers at byte .* are too many" if len(keys) > 2 else "no tensor"
        with pytest.raises(ConversionError, match=match):
            read_header(data, path)


def test_absurd_sizes_in_safetensors(tmp_path):
    path = write_hf(tmp_path / "hf") / "model.safetensors"
    whole = path.read_bytes()
    header = safetensors_header(path)
    for size in (0, header, 2**31, 2**62, 2**64 - 1):
        content = struct.pack("<Q", size) + whole[8:]
        assert convert_bytes(path, content, tmp_path / "out") is None
    entries = json.loads(whole[8:header])
    for change in (
        {"shape": [2**62, 2**62]},
        {"shape": [-1]},
        {"shape": [2] * 100_000},
        {"shape": [1] * 20 + [None]},
        {"data_offsets": [0, 2**60]},
        {"dtype": "F128"},
        {"dtype": "I32"},
    ):
        changed = {
            **entries,
            "model.norm.weight": entries["model.norm.weight"] | change,
        }
        text = json.dumps(changed).encode()
        content = struct.pack("<Q", len(text)) + text + whole[header:]
        assert convert_bytes(path, content, tmp_path / "out") is None


def test_repeated_keys(tmp_path):
    """The reference implementation takes the last of a name; who knows which counts."""
    folder = write_hf(tmp_path / "hf")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = safetensors_header(path)
    entry = json.dumps(json.loads(whole[8:header])["model.norm.weight"])
    text = whole[8:header].rstrip()[:-1] + f',"model.norm.weight":{entry}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[header:])
    with pytest.raises(ConversionError, match=r"the key 'model.norm.weight' twice"):
        convert(folder, tmp_path / "out", progress=False)
    path.write_bytes(whole)
    pair = struct.pack("<Q1sII", 1, b"a", 4, 0)
    twice = np.frombuffer(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + pair * 2, np.uint8)
    with pytest.raises(ConversionError, match=r"the key 'a' occurs twice"):
        read_header(twice, path)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"vocab_size": 60, ' + text[1:])
    match = r"config.json has the key 'vocab_size' twice"
    with pytest.raises(ConversionError, match=match):
        convert(folder, tmp_path / "out", progress=False)


def test_bytes_lost_where_padding_hides_it(tmp_path):
    """The file of these 34-byte blocks is as long as before, or may be."""
    path = tmp_path / "model.gguf"
    write_gguf(path, {**LLAMA, "vocab_size": 63}, kind="Q8_0")
    whole = path.read_bytes()
    _, entries = read_header(np.frombuffer(whole, np.uint8), path)
    first = entries[0]
    for content in (
        whole[: first.begin] + whole[first.begin + 2 :] + b"\0\0",
        whole[: first.begin] + b"\0" + whole[first.begin : -1],
    ):
        assert len(content) == len(whole)
        path.write_bytes(content)
        with pytest.raises(ConversionError, match=r"the padding from byte \d+ to \d+"):
            convert(path, tmp_path / "out", progress=False)


def test_a_pipe_is_not_waited_for(tmp_path):
    folder = write_sharded(tmp_path / "hf", LLAMA, llama_tensors())
    for name in ("model-00001-of-00003.safetensors", "config.json"):
        (folder / name).rename(tmp_path / name)
        os.mkfifo(folder / name)
        with pytest.raises(ConversionError, match=f"{name} is not a file"):
            convert(folder, tmp_path / "out", progress=False)
        # A link is as good as the file, also out of the folder.
        (folder / name).unlink()
        (folder / name).symlink_to(f"../{name}")
    convert(folder, tmp_path / "out", progress=False)


def test_damaged_shard(tmp_path):
    folder = write_sharded(tmp_path / "hf", LLAMA, llama_tensors())
    shard = folder / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    assert convert_bytes(shard, whole[:-5], tmp_path / "out") is None
    assert convert_bytes(shard, b"not at all", tmp_path / "out") is None
    assert convert_bytes(shard, whole, tmp_path / "out") is not None


def test_misnamed_files(tmp_path):
    gguf = tmp_path / "model.gguf"
    write_gguf(gguf)
    folder = write_hf(tmp_path / "hf")
    safetensors = (folder / "model.safetensors").read_bytes()
    # Each in the other's clothes; the content decides.
    assert convert_bytes(tmp_path / "other.gguf", safetensors, tmp_path / "out") is None
    path = folder / "model.safetensors"
    assert convert_bytes(path, gguf.read_bytes(), tmp_path / "out") is None
    renamed = tmp_path / "model.weights"
    gguf.rename(renamed)
    convert(renamed, tmp_path / "out", progress=False)


def run(code: str, *arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


KILLED = """
import contextlib, os, random, shutil, signal, sys, time
from pathlib import Path
from polarjax import params
from polarjax.storage.checksums import check_files, read_checksums
from convert import convert

params.GROUP_BYTES = 1_000_000
source, out = map(Path, sys.argv[1:])
partial = out.with_name("out.partial")

def start():
    child = os.fork()
    if not child:
        convert(source, out, progress=False, overwrite=out.exists())
        os._exit(0)
    return child

def written(folder):
    size = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                size += os.path.getsize(os.path.join(where, name))
    return size

os.waitpid(start(), 0)
whole = written(out)
rng = random.Random(0)
for i in range(20):  # each over what the one before has left
    if i % 3 and out.exists():
        shutil.rmtree(out)
    child, ended = start(), 0
    moment = 1.05 * whole * (i + rng.random() - 0.5) / 19
    while not ended and written(partial) < moment:
        time.sleep(0.001)
        ended, _ = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if out.exists():
        print("whole")
        check_files(out, read_checksums(out))
    elif partial.exists():
        print("partial")
        if (partial / "new/config.json").exists():  # just before it is renamed
            check_files(partial / "new", read_checksums(partial / "new"))
    else:
        print("nothing")
os.waitpid(start(), 0)
assert not partial.exists()
"""


def test_killed_at_twenty_moments(tmp_path):
    """Forks without jax's backend; what is left is whole, or does not load."""
    config = {**LLAMA, "hidden_size": 512, "intermediate_size": 2048}
    source = write_hf(tmp_path / "hf", config)
    done = run(KILLED, source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert len(found) == 20 and found.count("partial") > 9, found
    assert read_folder(tmp_path / "out").config.layers == 2
    (tmp_path / "out/config.json").unlink()
    with pytest.raises(FileNotFoundError, match="whose writing was interrupted"):
        read_folder(tmp_path / "out")


TWO = """
import os, sys, time
from convert import convert

children = []
for i in range(2):
    if not (child := os.fork()):
        try:
            convert(*sys.argv[1:], progress=False)
        except FileExistsError as error:
            print(error, flush=True)
            os._exit(1)
        os._exit(0)
    children.append(child)
print(sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_two_conversions_into_one_folder(tmp_path):
    """One wins, the other is told."""
    source = write_hf(tmp_path / "hf")
    done = run(TWO, source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    told, failures = done.stdout.splitlines()
    assert failures == "1"
    assert "out exists" in told or "another process is writing" in told
    assert read_folder(tmp_path / "out").config.layers == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


@pytest.fixture
def small_disk(tmp_path):
    """Mount a tmpfs of some size; unmounted afterwards."""
    mounted = []

    def mount(limits: str) -> Path:
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", limits, "tmpfs", path]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("a full disk needs `mount`")
        if done.returncode:
            pytest.skip(f"a full disk needs the right to mount: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", path], check=True)


def convert_onto(disk: Path, tmp_path: Path) -> subprocess.CompletedProcess:
    config = {**LLAMA, "hidden_size": 128, "intermediate_size": 384}
    write_hf(tmp_path / "hf", config)
    arguments = [tmp_path / "hf", disk / "out", "--dtype", "float32"]
    return run(
        "from convert.__main__ import main; raise SystemExit(main())", *arguments
    )


def test_full_disk(tmp_path, small_disk):
    disk = small_disk("size=200k")
    done = convert_onto(disk, tmp_path)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note")]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: no space for ")
    assert list(disk.iterdir()) == []


def test_disk_that_fills_while_writing(tmp_path, small_disk):
    disk = small_disk("nr_inodes=3")  # the disk's own folder, DST and one file
    done = convert_onto(disk, tmp_path)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note")]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error:") and "No space left" in lines[0]
    assert list(disk.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user who is not root")
def test_a_place_that_cannot_be_written(tmp_path):
    source = write_hf(tmp_path / "hf")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OSError):
        convert(source, tmp_path / "locked/out", progress=False)


def test_interrupted(tmp_path, monkeypatch):
    """Ctrl-C leaves nothing."""
    source = write_hf(tmp_path / "hf")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("convert.core.check_finite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
