"""The shapes of real models that the kernel benchmarks time. No jax, no torch."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Attention:
    """Decode attention: q [b, h, d], caches [b, k, s, d].

    Attributes:
        b: sequences.
        h: query heads.
        k: KV groups.
        s: cache length in tokens.
        d: head dim.
        groups: KV groups read per sequence, one row of the table each; k is dense.
        ragged: lengths uniform in s/8..s instead of all s.
    """

    b: int
    h: int
    k: int
    s: int
    d: int
    groups: tuple[int, ...]
    ragged: bool = False

    @property
    def dims(self) -> tuple[int, ...]:
        """What the dense rows of two cases with the same dims share."""
        return self.b, self.h, self.k, self.s, self.d

    def lengths(self) -> np.ndarray:
        """Valid cache positions of each sequence, int32 [b]."""
        if not self.ragged:
            return np.full(self.b, self.s, np.int32)
        rng = np.random.default_rng(0)
        return rng.integers(self.s // 8, self.s + 1, self.b).astype(np.int32)

    def bytes(self, groups: int, itemsize: int = 2) -> int:
        """What must be read: the valid keys and values of so many groups each."""
        return 2 * int(self.lengths().sum()) * groups * self.d * itemsize


@dataclasses.dataclass(frozen=True)
class Mlp:
    """A feed-forward layer on x [b, m] with f neurons: ReLU with biases, or gated.

    Attributes:
        b: batch.
        m: model dim.
        f: neurons.
        gated: a third matrix and SiLU, no biases (LLaMA); else ReLU and biases (OPT).
        densities: fractions of the neurons read, one row of the table each.
    """

    b: int
    m: int
    f: int
    gated: bool = False
    densities: tuple[float, ...] = (1.0, 0.5, 0.3, 0.1)

    def bytes(self, neurons: int, itemsize: int = 2) -> int:
        """What must be read: so many rows of each matrix."""
        return (3 if self.gated else 2) * neurons * self.m * itemsize

    def neurons(self, density: float) -> int:
        """How many neurons a density means."""
        return max(1, int(density * self.f))


@dataclasses.dataclass(frozen=True)
class Select:
    """Scores [b, c], float32, to the n best: of each row, or of the batch together."""

    b: int
    c: int
    n: int
    union: bool

    def bytes(self) -> int:
        """What must be read: the scores."""
        return 4 * self.b * self.c


ATTENTION = {
    "opt-66b": Attention(64, 72, 72, 1920, 128, (72, 36, 21, 7)),
    "llama-3.1-8b": Attention(64, 32, 8, 4096, 128, (8, 5, 4, 2)),
    "llama-3.1-8b-ragged": Attention(64, 32, 8, 4096, 128, (8, 4), ragged=True),
    "llama-2-7b": Attention(16, 32, 32, 4096, 128, (32, 16, 8)),
    "llama-3.1-70b": Attention(16, 64, 8, 8192, 128, (8, 5)),
    "llama-3.1-8b-long": Attention(1, 32, 8, 65536, 128, (8, 4)),
}
MLP = {
    "opt-66b-mlp": Mlp(64, 9216, 36864),
    "opt-6.7b-mlp-b16": Mlp(16, 4096, 16384),
    "opt-6.7b-mlp-b1": Mlp(1, 4096, 16384),
    "llama-3.1-8b-mlp-b1": Mlp(1, 4096, 14336, gated=True),
}
SELECT = {
    "opt-66b-neurons": Select(64, 36864, 11059, union=True),
    "opt-6.7b-neurons": Select(16, 16384, 4915, union=True),
    "llama-3.1-8b-heads": Select(64, 8, 4, union=False),
    "opt-66b-heads": Select(64, 72, 21, union=False),
}
CASES = {**ATTENTION, **MLP, **SELECT}

TOY_CASES = {
    "toy": Attention(2, 4, 2, 64, 64, (2, 1), ragged=True),
    "toy-mlp": Mlp(2, 64, 256, densities=(1.0, 0.5)),
    "toy-mlp-gated": Mlp(1, 64, 128, gated=True, densities=(0.5,)),
    "toy-neurons": Select(2, 256, 64, union=True),
    "toy-heads": Select(2, 8, 4, union=False),
}
