"""Repositories of the Hugging Face hub, through `huggingface_hub` and its cache."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

from polarjax.storage.tensors import TENSORS

# org/name, org/name/file.gguf; each may end in @revision
_ID = re.compile(r"(\w[\w.-]*)(/\w[\w.-]*)(?:/([^@]+\.gguf))?(?:@(\S+))?", re.ASCII)
_SECONDS = 10.0  # to wait for the hub's first answer


@dataclasses.dataclass(frozen=True)
class Repository:
    """A repository of models, at one of its revisions.

    Without a network, or with `HF_HUB_OFFLINE=1`, it is what the cache holds of it.

    Attributes:
      name: "org/name".
      file: the GGUF file in it that is meant, or "".
      revision: branch, tag or commit; None for the default branch.
      missing: what an error begins with: what it might have been instead.
    """

    name: str
    file: str
    revision: str | None
    missing: str

    @classmethod
    def parse(cls, text: str, missing: str) -> Repository:
        """Read "org/name" or "org/name/file.gguf", either with "@revision".

        Args:
          text: which is no path of anything that exists.
          missing: such as "no checkpoint folder at checkpoints/foo".

        Raises:
          FileNotFoundError: if it is no such id, or rather a path: in a folder that
            exists here.
        """
        found = _ID.fullmatch(text)
        if not found:
            raise FileNotFoundError(
                f"{missing}; nor is it an id of the Hugging Face hub (org/name)"
            )
        first, second, file, revision = found.groups()
        if not revision and Path(first).is_dir():
            raise FileNotFoundError(
                f"{missing}; {first} is a folder here: if you mean the Hugging Face "
                f"hub, write {text}@main"
            )
        return cls(first + second, file or "", revision, missing)

    @property
    def commit(self) -> str:
        """Hash of the revision.

        Raises:
          FileNotFoundError: if it is neither on the hub nor in the cache.
        """
        if isinstance(self._info, Exception):
            return self.download().name
        return self._info.sha

    def files(self) -> list[str]:
        """What it holds; without a network, what the cache does.

        Raises:
          FileNotFoundError: if it is neither on the hub nor in the cache.
        """
        if isinstance(self._info, Exception):
            folder = self.download()
            # A link that leads nowhere is what is left of a file, not nothing.
            found = (path for path in folder.rglob("*") if not path.is_dir())
            return sorted(path.relative_to(folder).as_posix() for path in found)
        return sorted(entry.rfilename for entry in self._info.siblings or ())

    def is_checkpoint(self) -> bool:
        """Whether it holds a model as polarjax writes it, not one to convert.

        Raises:
          FileNotFoundError: if it is neither on the hub nor in the cache.
        """
        return TENSORS.format("00001") in self.files()

    def download(self, *patterns: str, ignore: tuple[str, ...] = ()) -> Path:
        """Bring files into the cache, unless they are there.

        Args:
          patterns: of their names, as in a shell; `*` includes slashes.
          ignore: patterns of those that are not wanted.

        Returns:
          The folder of the commit.

        Raises:
          FileNotFoundError: saying why they cannot be had.
        """
        offline = isinstance(self._info, Exception)
        try:
            # By the revision: by its commit, the cache would not learn what main is.
            folder = Path(
                _library().snapshot_download(
                    self.name,
                    revision=self.revision,
                    allow_patterns=list(patterns),
                    ignore_patterns=list(ignore),
                    local_files_only=offline,
                )
            )
        except Exception as error:  # of many types
            reason = self._reason(self._info) if offline else first_line(error)
            raise FileNotFoundError(f"{self.missing}; {reason}") from None
        if not offline and folder.name != self.commit:
            raise FileNotFoundError(
                f"{self.missing}; {self.name} has changed meanwhile, from commit "
                f"{self.commit} to {folder.name}: try again"
            )
        return folder

    def assets(self) -> Path:
        """Folder for what is made of this commit.

        It is `assets/polarjax/org--name/COMMIT` in huggingface_hub's own folder
        (`HF_HOME`, or `HF_ASSETS_CACHE`).
        """
        named = self.name.replace("/", "--")
        return _library().cached_assets_path("polarjax", named, self.commit)

    @functools.cached_property
    def _info(self) -> Any:
        """What the hub says, or the exception why it says nothing."""
        try:
            library = _library()
        except ImportError:
            raise FileNotFoundError(
                f"{self.missing}; to look for it on the Hugging Face hub, install "
                "huggingface_hub (pip install huggingface_hub)"
            ) from None
        try:  # snapshot_download asks too, but might wait for minutes
            return library.HfApi().model_info(
                self.name, revision=self.revision, timeout=_SECONDS
            )
        except Exception as error:  # of many types
            return error

    def _reason(self, error: Exception) -> str:
        errors = _library().errors
        if isinstance(error, errors.GatedRepoError):
            return (
                f"{self.name} is gated: ask for access at "
                f"https://huggingface.co/{self.name}, then log in (hf auth login)"
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"the Hugging Face hub has no repository {self.name}, or it is private "
                "(hf auth login)"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{self.name} has no revision {self.revision}"
        if isinstance(error, errors.HFValidationError):
            return f"nor is it an id of the Hugging Face hub: {first_line(error)}"
        return (
            f"nor is all of {self.name} in the Hugging Face hub's cache, and the hub "
            f"cannot be reached: {first_line(error)}"
        )


def _library() -> Any:
    import huggingface_hub
    import huggingface_hub.errors

    return huggingface_hub


def first_line(error: Exception) -> str:
    """What it says, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
