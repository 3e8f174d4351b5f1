"""Chat templates, rendered as `transformers`' `apply_chat_template` renders them."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from polarjax.storage.quoted import quoted

DEFAULT, WITH_TOOLS = "default", "tool_use"

# What a message's reasoning is called; templates read one or another.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Put behind a message that is to be continued, to find its end in the rendered text.
# The space tells whether the template kept what stands at the message's end.
_MARK = "<<the answer goes on here>> "


def choose(templates: str | Mapping[str, str] | None, tools: bool) -> str:
    """The template to render.

    Args:
      templates: jinja text, or several by name, or None.
      tools: whether tools are to be offered.

    Raises:
      ValueError: if there is none, or several of which none is the default.
    """
    if templates is None:
        raise ValueError("this checkpoint has no chat template")
    if isinstance(templates, str):
        return templates
    for name in (*([WITH_TOOLS] if tools else []), DEFAULT):
        if name in templates:
            return templates[name]
    raise ValueError(
        f"this checkpoint's chat templates are {', '.join(sorted(templates))}: none "
        f"of them is called {DEFAULT!r}"
    )


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """Render a conversation.

    Args:
      template: jinja text.
      messages: each with "role", "content" and what else the template reads; values
        are what JSON knows.
      variables: further ones of the template: special tokens, and what a user sets.
      tools: JSON schemas of functions that the model may call.
      documents: what the model may cite.
      add_generation_prompt: whether the answer's beginning is to be written.
      continue_final_message: whether the last message is the beginning of the answer:
        nothing stands behind it.

    Raises:
      ValueError: if the messages are none, the two wishes contradict each other, or
        the template fails.
    """
    if add_generation_prompt and continue_final_message:
        raise ValueError(
            "add_generation_prompt begins a new answer, continue_final_message goes on "
            "with the last one: choose one of them"
        )
    chat = _plain(list(messages), "messages")
    for i, message in enumerate(chat):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{i}] must be a dict, got {quoted(message)}")
    if not chat:
        raise ValueError("the conversation is empty: pass at least one message")
    chat = [_readable(message) for message in chat]
    final = _mark_end(chat[-1]) if continue_final_message else ""
    common = {
        "tools": _plain(tools, "tools"),
        "documents": _plain(documents, "documents"),
        **_plain(dict(variables), "variables"),
    }
    try:
        text = _compile(template).render(
            messages=chat, add_generation_prompt=add_generation_prompt, **common
        )
    except Exception as error:  # a template's code may raise anything
        raise ValueError(f"the chat template failed: {error}") from error
    return _cut_at_mark(text, final) if continue_final_message else text


def _readable(message: dict[str, Any]) -> dict[str, Any]:
    """A message without empty fields, its reasoning under the names that are read."""
    message = {key: value for key, value in message.items() if value is not None}
    thought = next((message[key] for key in _REASONING if key in message), None)
    if thought is None:
        return message
    return {"thinking": thought, **message, "reasoning_content": thought}


def _mark_end(message: dict[str, Any]) -> str:
    """Put the mark behind a message's last text; returns that text."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _MARK
        return content
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text = part["text"]
            part["text"] = text + _MARK
            return text
    raise ValueError("the last message has no text to be continued")


def _cut_at_mark(text: str, final: str) -> str:
    at = text.rfind(_MARK.strip())
    if at < 0 or final.strip() not in text:
        raise ValueError(
            "the chat template does not show the last message: it cannot be continued"
        )
    kept = text[:at]
    return kept if text.startswith(_MARK, at) else kept.rstrip()


def _plain(value: Any, where: str) -> Any:
    """A copy of JSON values: a template, which is foreign code, gets no other objects.

    Raises:
      ValueError: naming what is none, or no Unicode text.
    """
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str):
        check_text(value, where)
        return str(value)
    if isinstance(value, Mapping):
        return {
            _plain(key, where): _plain(item, f"{where}[{key!r}]")
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(
        f"{where} must be text, a number, a list or a dict, got {type(value).__name__}"
    )


def check_text(text: str, what: str) -> None:
    """Raise if a str is no Unicode text, as what was read with surrogates may be.

    Args:
      text: any.
      what: it is, for the message.

    Raises:
      ValueError: naming the character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} is no Unicode text: its character {error.start} is the lone "
            f"surrogate {text[error.start]!a}, which stands for no character (a byte "
            "that is not UTF-8 becomes one, and so does half of a \\u pair in JSON)"
        ) from None


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _complain
    environment.globals["strftime_now"] = _now
    return environment.from_string(template)


class _Generation(Extension):
    """`{% generation %}` marks what the model says, for training: all of it is text."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """What stands between the tags, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja's own filter escapes for HTML, and sorts."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _complain(message: str) -> None:
    raise jinja2.TemplateError(message)
