"""Ways to damage a file by a seeded generator, and limits to hold meanwhile."""

import json
import random
import re
import signal
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np

MEMORY = 512 << 20  # bytes
SECONDS = 5  # for one file
EDGES = (0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
Mutation = Callable[[random.Random, bytes], bytes]


@contextmanager
def limits(seconds: float = SECONDS) -> Iterator[None]:
    """Raise for what hangs, even within a loop, or takes much memory."""

    def ring(*_):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    tracemalloc.start()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < MEMORY / 8, f"{peak} bytes"  # for a file of 100 kB


def json_values(rng: random.Random):
    """What does not belong into a configuration."""
    numbers = [*EDGES, -1, 0.5, -0.0, 1e308, float("nan"), float("inf"), 10**400]
    others = [None, True, "", "x", "\ud800", "\n", [], {}, [[]], {"a": None}, [1, "b"]]
    return rng.choice([*numbers, *others, 2**24, 4096, [2**63] * 50])


class Damage:
    """Ways to damage a file.

    Args:
      whole: the file.
      header: bytes of it that say what the others are. Only there are bytes changed:
        weights have no checksum.
      numbers: where lengths, counts and offsets of 64 bits are.
    """

    def __init__(self, whole: bytes, header: int, numbers: list[int]):
        self.whole, self.header, self.numbers = whole, header, numbers
        self.ways: list[Mutation] = [
            *(self.flip_one, self.flip_several, self.replace, self.truncate),
            *(self.insert, self.delete, self.duplicate, self.overwrite, self.edge),
        ]

    def cases(self, count: int) -> Iterator[tuple[str, bytes]]:
        """So many damaged files, each with the way it was damaged."""
        rng = random.Random(0)
        for i in range(count):
            way = self.ways[i % len(self.ways)]
            yield way.__name__, way(rng, self.whole)

    def every_byte(self) -> Iterator[tuple[str, bytes]]:
        """A bit of each byte of the header; every bit position occurs."""
        for at in range(self.header):
            flipped = bytes([self.whole[at] ^ 1 << at % 8])
            yield "flip", self.whole[:at] + flipped + self.whole[at + 1 :]

    def flip_one(self, rng, content, count=1):
        changed = bytearray(content)
        for _ in range(count):
            changed[rng.randrange(self.header)] ^= 1 << rng.randrange(8)
        return bytes(changed)

    def flip_several(self, rng, content):
        return self.flip_one(rng, content, rng.randint(2, 8))

    def replace(self, rng, content):
        at = rng.randrange(self.header)
        part = rng.choice([b"\xff", b"\0", b"\xc3(", rng.randbytes(rng.randint(1, 9))])
        return content[:at] + part + content[at + len(part) :]

    def truncate(self, rng, content):
        return content[: self.somewhere(rng, content)]

    def insert(self, rng, content):
        at = self.somewhere(rng, content)
        part = rng.choice([bytes(rng.randint(1, 64)), rng.randbytes(rng.randint(1, 9))])
        return content[:at] + part + content[at:]

    def delete(self, rng, content):
        at = self.somewhere(rng, content)
        return content[:at] + content[at + rng.randint(1, 40) :]

    def duplicate(self, rng, content):
        at = self.somewhere(rng, content)
        end = at + rng.choice([1, 8, 32, 500, 5000])
        return content[:end] + content[at:end] + content[end:]

    def overwrite(self, rng, content):
        size = rng.randint(2, min(60, self.header // 2))
        source, target = (rng.randrange(self.header - size) for _ in range(2))
        part = content[source : source + size]
        return content[:target] + part + content[target + size :]

    def edge(self, rng, content):
        at = rng.choice(self.numbers)
        return content[:at] + struct.pack("<Q", rng.choice(EDGES)) + content[at + 8 :]

    def somewhere(self, rng, content):
        """As often in the header as in the weights."""
        return rng.randrange(rng.choice([self.header, len(content)]))


class SafetensorsDamage(Damage):
    """And in the header's JSON, with its length set right."""

    def __init__(self, whole: bytes):
        self.text = whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]]
        super().__init__(whole, 8 + len(self.text), [0])
        self.ways += [self.dtype, self.name, self.number, self.swap, self.overlap]
        self.ways += [self.repeat, self.utf8, self.number, self.name]

    def with_header(self, text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + self.whole[self.header :]

    def entry(self, rng) -> tuple[dict, str]:
        entries = json.loads(self.text)
        return entries, rng.choice([name for name in entries if name[0] != "_"])

    def dtype(self, rng, content):
        entries, name = self.entry(rng)
        kinds = ["F64", "F16", "BF16", "F8_E4M3", "I32", "U8", "F128", "", None, 7, []]
        entries[name]["dtype"] = rng.choice(kinds)
        return self.with_header(json.dumps(entries).encode())

    def name(self, rng, content):
        entries, name = self.entry(rng)
        edits = [("0", "1"), ("weight", "bias"), ("model", "\0"), ("model", "\n" * 9)]
        edits += [("model", "\ud800"), ("o", ""), ("norm", "norm" * 2000), ("l", "ä")]
        part, other = rng.choice(edits)
        changed = name.replace(part, other)
        records = [
            json.dumps(changed if n == name else n) + ":" + json.dumps(entry)
            for n, entry in entries.items()
        ]
        return self.with_header(f"{{{','.join(records)}}}".encode())

    def number(self, rng, content):
        places = [match.span() for match in re.finditer(rb"\d+(?=[,\]])", self.text)]
        begin, end = rng.choice(places)
        values = [*map(str, EDGES), "-1", "1.5", "1e3", "00", "NaN", "9" * 5000]
        values += ["[1]", "true", "null", '"1"', ",".join(["2"] * 9999), "[" * 9999]
        values += ["1," * 9 + "null"]
        text = self.text[:begin] + rng.choice(values).encode() + self.text[end:]
        return self.with_header(text)

    def swap(self, rng, content):
        """Offsets of two tensors; of one size they would make another valid file."""
        entries, first = self.entry(rng)
        size = np.prod(entries[first]["shape"])
        others = [n for n in entries if n[0] != "_"]
        others = [n for n in others if np.prod(entries[n]["shape"]) != size]
        second = rng.choice(others)
        a, b = entries[first], entries[second]
        a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]
        return self.with_header(json.dumps(entries).encode())

    def overlap(self, rng, content):
        """One tensor where another is, of its size or not."""
        entries, first = self.entry(rng)
        others = [n for n in entries if n not in (first, "__metadata__")]
        second = rng.choice(others)
        entries[first]["data_offsets"] = entries[second]["data_offsets"]
        return self.with_header(json.dumps(entries).encode())

    def repeat(self, rng, content):
        """A key, with the same entry or with another shape of the same size."""
        entries, name = self.entry(rng)
        shape = entries[name]["shape"]
        entry = entries[name] | {"shape": rng.choice([shape, shape[::-1], [1, *shape]])}
        again = f",{json.dumps(name)}:{json.dumps(entry)}}}"
        return self.with_header(self.text.rstrip()[:-1] + again.encode())

    def utf8(self, rng, content):
        at = rng.randrange(len(self.text))
        part = rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x80"])
        return self.with_header(self.text[:at] + part + self.text[at:])


class GgufDamage(Damage):
    """And in the lists of metadata and tensors, wherever the `gguf` package has them.

    Lengths of keys and texts, counts of lists, dimensions and offsets.
    """

    def __init__(self, whole: bytes, path: Path):
        reader = gguf.GGUFReader(path)
        numbers, types, texts = [8, 16], [4], []
        self.sizes = {}  # of tensors, by the place of their offset
        fields = [f for name, f in reader.fields.items() if name[:5] != "GGUF."]
        for field in [*fields, *(tensor.field for tensor in reader.tensors)]:
            at = field.offset
            for part in field.parts:
                where = {8: numbers, 4: types}.get(part.itemsize, texts)
                where += range(at, at + part.nbytes, part.itemsize)
                at += part.nbytes
        for tensor in reader.tensors:
            at = tensor.field.offset + sum(p.nbytes for p in tensor.field.parts[:-1])
            self.sizes[at] = tensor.n_bytes
        self.types, self.texts = types, texts
        super().__init__(whole, reader.data_offset, numbers)
        self.ways += [self.edge, self.kind, self.text, self.swap, self.shift]

    def kind(self, rng, content):
        """Types of values, lists and tensors; ranks and numbers of 32 bits too."""
        at = rng.choice(self.types)
        value = rng.choice([*range(42), *EDGES[:4]])
        return content[:at] + struct.pack("<I", value) + content[at + 4 :]

    def text(self, rng, content):
        at = rng.choice(self.texts)
        return content[:at] + rng.randbytes(1) + content[at + 1 :]

    def shift(self, rng, content):
        """A tensor begins elsewhere, where there may be enough bytes for it."""
        at = rng.choice(list(self.sizes))
        begin = struct.unpack("<Q", content[at : at + 8])[0]
        begin = max(0, begin + rng.choice([-32, 32, 1, 1024, -1024, -begin]))
        return content[:at] + struct.pack("<Q", begin) + content[at + 8 :]

    def swap(self, rng, content):
        """Two numbers; offsets of tensors of one size would make a valid file."""
        first, second = sorted(rng.sample(self.numbers, 2))
        if self.sizes.get(first, -1) == self.sizes.get(second, -2):
            return self.edge(rng, content)
        a, b = content[first : first + 8], content[second : second + 8]
        middle = content[first + 8 : second]
        return content[:first] + b + middle + a + content[second + 8 :]
