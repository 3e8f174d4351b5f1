"""Added and special tokens, as the small files beside a vocabulary tell them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from convert.files import is_there, read_json
from convert.source import ConversionError
from convert.tokenizing.no_text import NoTextError

# In the order in which transformers adds them.
_ROLES = tuple(
    f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_DIGITS = 19  # of an id, fewer
_EXTRA = ("extra_special_tokens", "additional_special_tokens")


@dataclasses.dataclass(frozen=True)
class Declared:
    """Tokens that are matched in a text before anything else.

    Attributes:
      listed: by id.
      named: by role, such as "bos_token".
      extra: further special ones; None where nothing is said of them.
    """

    listed: dict[int, AddedToken]
    named: dict[str, AddedToken]
    extra: list[AddedToken] | None

    def special(self) -> list[AddedToken]:
        """The special ones that are told by name or apart from the list."""
        return [*self.named.values(), *(self.extra or ())]

    def as_written(self) -> Declared:
        """The same; the listed ones are matched in the text as it was given."""
        listed = {i: _copy(t, normalized=False) for i, t in self.listed.items()}
        return dataclasses.replace(self, listed=listed)


def read_declared(
    folder: Path, config: dict[str, Any], defaults: Mapping[str, str]
) -> Declared:
    """Read what a folder says of added and special tokens.

    `added_tokens_decoder` of tokenizer_config.json is the whole list; without it
    special_tokens_map.json counts before tokenizer_config.json, and added_tokens.json
    is the list.

    Args:
      folder: of the checkpoint.
      config: its tokenizer_config.json.
      defaults: of the tokenizer's class, by role, where the files leave one out.

    Raises:
      ConversionError: if a file is damaged.
    """
    where = f"{folder / 'tokenizer_config.json'}"
    settings: dict[str, Any] = {**defaults, **config}
    listed = _listed(config.get("added_tokens_decoder"), where)
    if "added_tokens_decoder" not in config:
        if is_there(folder / "special_tokens_map.json"):
            settings |= read_json(folder / "special_tokens_map.json")
        if is_there(folder / "added_tokens.json"):
            listed = _older(folder / "added_tokens.json", settings)
    by_text = {token.content: token for token in listed.values()}
    named: dict[str, AddedToken] = {}
    others = [key for key in settings if key.endswith("_token") and key not in _ROLES]
    for role in (*_ROLES, *others):
        value = settings.get(role)
        if role in others and not isinstance(value, str | dict):
            continue  # a flag, such as add_bos_token
        if value == "":  # as LLaMA-1's have it
            value = defaults.get(role)
        if value is not None:
            token = _token(value, f"{role} in {where}")
            named[role] = by_text.get(token.content, token)
    given = [settings[key] for key in _EXTRA if key in settings]
    extra = next(filter(None, given), []) if given else None
    if isinstance(extra, dict):
        named |= {role: _token(v, f"{role} in {where}") for role, v in extra.items()}
        extra = []
    if extra is not None:
        if not isinstance(extra, list):
            raise ConversionError(f"{where}: {_EXTRA[0]} must be a list of tokens")
        extra = [_token(value, f"a special token in {where}") for value in extra]
    names = {token.content for token in named.values()}
    return Declared(
        {i: _as_special(token, names) for i, token in listed.items()},
        {role: _as_special(token, names) for role, token in named.items()},
        extra,
    )


def _as_special(token: AddedToken, names: set[str]) -> AddedToken:
    return _copy(token, special=token.special or token.content in names)


def _copy(token: AddedToken, **flags: bool) -> AddedToken:
    return AddedToken(
        token.content, **{name: getattr(token, name) for name in _FLAGS} | flags
    )


def _listed(decoder: Any, where: str) -> dict[int, AddedToken]:
    if decoder is None:
        return {}
    if not isinstance(decoder, dict) or not all(
        key.isdecimal() and len(key) < _DIGITS and isinstance(value, dict)
        for key, value in decoder.items()
    ):
        raise ConversionError(
            f"{where}: added_tokens_decoder must give a token for each id"
        )
    return {
        int(key): _token(value, f"token {key} in {where}", special=False)
        for key, value in sorted(decoder.items(), key=lambda item: int(item[0]))
    }


def _older(path: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """The list of added_tokens.json, which says of none whether it is special."""
    special = {_text(value) for key, value in settings.items() if key in _ROLES}
    for key in _EXTRA:
        if isinstance(settings.get(key), list):
            special |= {_text(value) for value in settings[key]}
    tokens = {}
    for text, i in sorted(read_json(path).items(), key=lambda item: str(item[1])):
        if type(i) is not int or i < 0:
            raise ConversionError(f"{path} gives {text!r} the id {i!r}")
        is_special = text in special
        tokens[i] = AddedToken(text, normalized=not is_special, special=is_special)
    return dict(sorted(tokens.items()))


def _text(value: Any) -> Any:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _token(value: Any, what: str, special: bool = True) -> AddedToken:
    """A token of a JSON file: a text, or a record with flags."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    flags = value if isinstance(value, dict) else {}
    text = flags.get("content")
    given = {name: flags[name] for name in _FLAGS if name in flags}
    if not isinstance(text, str) or not all(type(v) is bool for v in given.values()):
        raise ConversionError(f"{what} must be a text with flags, not {value!r}")
    given.setdefault("special", special)
    return AddedToken(text, **given)


def add(tokenizer: Tokenizer, declared: Declared) -> None:
    """Make the tokens match in a text; those that the vocabulary lacks come behind it.

    Args:
      tokenizer: to change.
      declared: the tokens.

    Raises:
      NoTextError: if one does not get the id that it is said to have.
    """
    tokens = list(declared.listed.values())
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    known |= {token.content for token in tokens}
    # Of two with the same text and other flags, the later one counts.
    tokens += [token for token in declared.special() if token.content not in known]
    tokenizer.add_tokens(tokens)
    for i, token in declared.listed.items():
        if (got := tokenizer.token_to_id(token.content)) != i:
            raise NoTextError(
                f"the added token {token.content!r} is said to have the id {i}, but "
                f"the vocabulary gives it {got}"
            )


def surround(tokenizer: Tokenizer, first: str | None, last: str | None) -> None:
    """Put these tokens around every text.

    Args:
      tokenizer: to change.
      first: before a text; None for nothing.
      last: behind it; None for nothing.

    Raises:
      ConversionError: if the tokenizer has not got one of them.
    """
    around = [token for token in (first, last) if token is not None]
    ids = []
    for token in dict.fromkeys(around):
        i = tokenizer.token_to_id(token)
        if i is None:
            raise ConversionError(f"the tokenizer has no token {token!r}")
        ids.append((token, i))
    if ids:
        single = [*around[: first is not None], "$A", *around[first is not None :]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=ids
        )
