"""What a training yields is saved, and only then does what kept the training go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from polarjax.mesh.cut import by_writer, mesh_of, writes
from polarjax.params import Params
from polarjax.policies.adapter import save_adapter
from polarjax.storage.folder import CARD_FILE, try_destination
from polarjax.training.loop import claim, clear

# Of a card; a contract with many settings takes a tenth of it.
_CARD_BYTES = 1 << 20


def try_places(
    out: str | Path,
    work: Path | None,
    shapes: Any,
    *,
    overwrite: bool = False,
    mesh: Mesh | None = None,
) -> None:
    """Raise unless a training can be kept, and its adapter written: before the work.

    Of several processes all must call it.

    Args:
      out: folder of the adapter to make.
      work: folder that is to keep the training, which is made; None for none.
      shapes: what will be trained, as arrays or their shapes. Room for float32 is
        asked for; half of that serves most of them.
      overwrite: whether an adapter at `out` may be replaced.
      mesh: of the model.

    Raises:
      FileExistsError: if `out` is there and may not be replaced, or what is beside it
        is in the way.
      ValueError: if `work` is no folder of a training, or one of both in the other.
      OSError: if one of them cannot be written, or there is no room.
    """
    nbytes = 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes)) + _CARD_BYTES

    def do() -> None:
        if work:
            places = [Path(place).resolve() for place in (out, work)]
            if places[0] in (places[1], *places[1].parents) or places[1] in (
                places[0].parents
            ):
                raise ValueError(
                    f"{work} keeps the training and {out} shall be the adapter: "
                    "neither may be the other, nor lie in it"
                )
            claim(work)
        try_destination(out, nbytes, overwrite, CARD_FILE)

    by_writer(mesh, do)


class Trained:
    """What a training yields: a model, its card, and the folder that kept the work.

    Attributes:
      params: the model with what was trained.
      work: folder that keeps the training until `save` has written its outcome; None
        for none.
    """

    params: Params
    work: Path | None

    def card(self) -> dict[str, Any]:
        """What an adapter's card says of it, as JSON values."""
        raise NotImplementedError

    def save(
        self,
        path: str | Path,
        card: Mapping[str, Any] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        """Write the adapter, and then delete `work`.

        Of several processes all must call it; if the one that writes fails, all do.

        Args:
          path: the folder to make.
          card: what else its card shall say, as JSON values.
          overwrite: replace an adapter that is there.

        Raises:
          FileExistsError: if something is at `path`.
          OSError: if it cannot be written; `work` stays.
          ValueError: if what was trained holds NaN.
        """
        mesh, failed = mesh_of(self.params.weights), None
        whole = {**self.card(), **(card or {})}
        try:
            save_adapter(path, self.params, whole, overwrite=overwrite)
        except OSError as error:
            failed = error

        def tell() -> None:
            if failed:
                raise failed

        by_writer(mesh, tell)
        if self.work and writes(mesh):
            clear(self.work)
