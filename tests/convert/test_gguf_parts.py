"""GGUF files in parts: any of them is the whole, and what is missing has a name."""

import shutil

import gguf
import jax
import numpy as np
import pytest

from convert import ConversionError, convert
from convert.describe import read_config
from convert.readers.gguf_parts import part_names
from convert.verify import verify
from polarjax.params import read_folder
from tests.convert.checkpoints import (
    LLAMA,
    byte_level_fields,
    gguf_tensors,
    llama_tensors,
    write_gguf,
)

pytestmark = pytest.mark.usefixtures("small_blocks")
COUNT = 5  # of 21 tensors, 5 in each


@pytest.fixture
def parts(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    fields = byte_level_fields()
    write_gguf(folder / "tiny.gguf", kind="Q8_0", fields=fields, part_tensors=5)
    names = [f"tiny-{i:05}-of-{COUNT:05}.gguf" for i in range(1, COUNT + 1)]
    assert sorted(path.name for path in folder.iterdir()) == names
    return [folder / name for name in names]


def weights(config):
    return jax.tree.map(np.asarray, read_folder(config.folder).weights)


def test_any_part_is_the_whole(parts, tmp_path):
    path = tmp_path / "whole.gguf"
    write_gguf(path, kind="Q8_0", fields=byte_level_fields())
    whole = convert(path, tmp_path / "whole", progress=False)
    for i, part in enumerate((parts[0], parts[1], parts[-1])):
        made = convert(part, tmp_path / f"out{i}", progress=False)
        assert made.model_hash == whole.model_hash
        assert made.architecture == whole.architecture
        assert (made.eos_ids, made.bos_ids) == (whole.eos_ids, whole.bos_ids)
        jax.tree.map(np.testing.assert_array_equal, weights(made), weights(whole))
        for name in ("tokenizer.json", "chat_template.jinja"):
            text = (tmp_path / f"out{i}" / name).read_bytes()
            assert text == (tmp_path / "whole" / name).read_bytes()
        assert read_config(part).architecture == whole.architecture


def test_a_first_part_of_metadata_alone(parts, tmp_path):
    """As `llama-gguf-split --no-tensor-first-split` writes it."""
    expected = convert(parts[0], tmp_path / "out", progress=False)
    tensors = gguf_tensors(LLAMA, llama_tensors())
    folder = tmp_path / "other"
    folder.mkdir()
    whole = gguf.GGUFReader(parts[0])
    for i in range(2):
        writer = gguf.GGUFWriter(folder / f"a-{i + 1:05}-of-00002.gguf", "llama")
        del writer.kv_data[0]["general.architecture"]
        if i == 0:
            for field in whole.fields.values():
                if not field.name.startswith(("GGUF.", "split.")):
                    kind = field.types[0]
                    sub = field.types[-1] if len(field.types) > 1 else None
                    writer.add_key_value(field.name, field.contents(), kind, sub)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(tensors))
        if i == 1:
            for name, array in tensors.items():
                kind = gguf.GGMLQuantizationType.Q8_0
                kind = kind if array.ndim == 2 else gguf.GGMLQuantizationType.F32
                writer.add_tensor(
                    name, gguf.quants.quantize(array, kind), raw_dtype=kind
                )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    made = convert(folder / "a-00001-of-00002.gguf", tmp_path / "b", progress=False)
    assert made.model_hash == expected.model_hash


def refused(path, tmp_path, match):
    with pytest.raises(ConversionError, match=match) as caught:
        convert(path, tmp_path / "out", progress=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_parts_that_do_not_belong_together(parts, tmp_path):
    away = parts[2].rename(tmp_path / "away.gguf")
    for part in (parts[0], parts[3]):
        refused(part, tmp_path, rf"is one of 5 parts, but {parts[2]} is missing")
    refused(away, tmp_path, r"is one part of 5, number 3: .* ends in -00003-of-00005")
    shutil.copy(parts[1], parts[2])
    refused(parts[0], tmp_path, rf"{parts[2].name} is part 2 of 5, not 3 of 5")
    parts[2].write_bytes(b"nothing of the kind")
    refused(parts[0], tmp_path, rf"{parts[2].name} is not a GGUF file: it begins with")
    content = away.read_bytes()
    parts[2].write_bytes(content[: len(content) // 2])
    refused(parts[0], tmp_path, rf"{parts[2].name} is truncated or damaged")
    # Of another model: tensors twice, or too few of them.
    other = tmp_path / "other"
    other.mkdir()
    tensors = gguf_tensors(LLAMA, llama_tensors())
    turned = dict([*list(tensors.items())[3:], *list(tensors.items())[:3]])
    write_gguf(other / "tiny.gguf", tensors=turned, part_tensors=5)
    shutil.copy(other / parts[2].name, parts[2])
    refused(parts[0], tmp_path, r"has the tensor 'blk.*', and so has .*tiny-0000")
    few = dict(list(tensors.items())[:10] + list(tensors.items())[11:])
    for path in other.iterdir():
        path.unlink()
    write_gguf(other / "tiny.gguf", tensors=few, part_tensors=5)
    writer = gguf.GGUFWriter(parts[2], "llama")
    writer.add_uint16("split.no", 2)
    writer.add_uint16("split.count", 5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(parts[0], tmp_path, r"the 5 parts of .* have 16 tensors, not 21")


def test_a_part_is_never_the_destination_s(parts):
    with pytest.raises(ConversionError, match="would delete"):
        convert(parts[1], parts[0].parent, overwrite=True, progress=False)


def test_verify_says_what_to_do(parts, tmp_path):
    pytest.importorskip("torch", reason="needs it: pip install torch")
    pytest.importorskip("transformers", reason="needs it: pip install transformers")
    convert(parts[0], tmp_path / "out", progress=False)
    with pytest.raises(ConversionError, match=r"in parts: join them first with `llama"):
        verify(parts[0], tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("a-00002-of-00003.gguf", 3),
        ("a-00001-of-00001.gguf", 1),
        ("deep/er-00001-of-00002.gguf", 2),
        ("a-00004-of-00003.gguf", 1),
        ("a-00000-of-00003.gguf", 1),
        ("a-00001-of-99999.gguf", 1),
        ("a-1-of-3.gguf", 1),
        ("plain.gguf", 1),
    ],
)
def test_names(name, count):
    found = part_names(name)
    assert len(found) == count and name in found
