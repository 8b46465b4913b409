# SPDX-License-Identifier: Apache-2.0
"""Conversations to text and token ids, through the chat template that a model file carries.

Templates are Jinja, as Hugging Face defined them for `tokenizer_config.json`: they get `messages`, `tools`,
`add_generation_prompt`, `bos_token` and `eos_token`, and may call `raise_exception` and `strftime_now`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes

from ktx_jax.errors import KtxError
from ktx_jax.template_sandbox import MAX_WEIGHT, BoundedEnvironment, LimitExceeded, limits
from ktx_jax.tokenizer import Tokenizer

MAX_TEMPLATE = 2**16  # characters: several times the longest that models are published with

Message = Mapping[str, Any]


class ChatTemplateError(KtxError):
    """A chat template is broken, asks too much, or refuses the messages; the message names the template's line."""


class _Refusal(TemplateError):
    """The template called `raise_exception`."""


def render_chat(
    template: str | None,
    messages: Sequence[Message],
    *,
    bos_token: str,
    eos_token: str,
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The text of a conversation, as `template` writes it.

    Args:
        template: Jinja source, from `tokenizer.chat_template` or from the user.
        messages: each with a "role" and usually a "content"; a missing "content" is none.
        bos_token: the text of the beginning-of-text token.
        eos_token: the text of the end-of-text token.
        tools: descriptions of functions, in the form that the template expects.
        add_generation_prompt: end with what makes the model answer.

    Raises:
        ChatTemplateError: no template; one that is broken, refuses the messages or exceeds the limits.
        KtxError: messages that are not a list of mappings with a role.
    """
    if not isinstance(template, str):  # a file may hold anything under that key
        raise ChatTemplateError(
            "the model file has no chat template (text under tokenizer.chat_template): pass one, chat_template=... "
            "in Python or --chat-template FILE on the command line"
        )
    variables = {
        "messages": [_checked(message, i) for i, message in enumerate(messages)],
        "bos_token": bos_token,
        "eos_token": eos_token,
        "tools": tools,
        "add_generation_prompt": add_generation_prompt,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    if not variables["messages"]:
        raise KtxError("there are no messages to answer")
    compiled = _compile(template)
    return _reporting_lines(lambda: _render(compiled, variables))


def encode_chat(
    tokenizer: Tokenizer,
    template: str | None,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The token ids of a conversation. Only the template writes control tokens.

    `<｜Assistant｜>` and the like inside a message or a tool description stay ordinary text, whatever the template
    does with it: nobody can speak in another's turn.

    Raises:
        ChatTemplateError, KtxError: as `render_chat`.
    """
    bos, eos = ("" if i is None else tokenizer.token_bytes(i).decode() for i in (tokenizer.bos_id, tokenizer.eos_id))
    names = {tokenizer.token_bytes(i).decode(): i for i in sorted(tokenizer.special_ids, reverse=True)}
    control = re.compile("|".join(map(re.escape, sorted(filter(None, names), key=len, reverse=True))) or r"(?!)")
    veil = _Veil(control.pattern)
    text = render_chat(
        template,
        veil.over(messages),
        bos_token=bos,
        eos_token=eos,
        tools=veil.over(tools),
        add_generation_prompt=add_generation_prompt,
    )
    ids: list[int] = []
    start = 0
    for match in (*control.finditer(text), None):
        piece = veil.lift(text[start : match.start() if match else len(text)])
        ids += tokenizer.encode(piece, add_special_tokens=False, parse_special=False)
        if match:
            ids.append(names[match[0]])
            start = match.end()
    return ids


@lru_cache(maxsize=16)
def template_names(template: str | None) -> frozenset[str]:
    """All variables, attributes, keys and texts that a template names: whether it knows of `tools`, say.

    Raises:
        ChatTemplateError: it is broken.
    """
    tree = _reporting_lines(lambda: BoundedEnvironment().parse(template or ""))
    kinds = ((nodes.Name, "name"), (nodes.Getattr, "attr"), (nodes.Const, "value"))
    found = (getattr(node, name) for kind, name in kinds for node in tree.find_all(kind))
    return frozenset(name for name in found if isinstance(name, str))


class _Veil:
    """Hides some words in strings behind marks that a template carries along, and brings them back."""

    _MARK = "\ufdd0"  # a noncharacter; where a text holds it, it is hidden too

    def __init__(self, words: str):
        self._words = re.compile(f"{words}|{self._MARK}")
        self._hidden: list[str] = []

    def over(self, value: Any) -> Any:
        """`value` with the words hidden in every string in it."""
        if isinstance(value, str):
            return self._words.sub(self._hide, value)
        if isinstance(value, Mapping):
            return {self.over(key): self.over(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.over(item) for item in value]
        return value

    def lift(self, text: str) -> str:
        """`text` with the words back in place."""
        return re.sub(f"{self._MARK}([0-9]+);", self._show, text)

    def _hide(self, match: re.Match[str]) -> str:
        self._hidden.append(match[0])
        return f"{self._MARK}{len(self._hidden) - 1};"

    def _show(self, match: re.Match[str]) -> str:
        index = int(match[1])  # beyond the list only if the template made a mark of pieces
        return self._hidden[index] if index < len(self._hidden) else match[0]


def _checked(message: Any, position: int) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise KtxError(f'message {position}: expected {{"role": ..., "content": ...}}, found {type(message).__name__}')
    return message if "content" in message else {**message, "content": None}


@lru_cache(maxsize=16)
def _compile(source: str) -> Any:
    if len(source) > MAX_TEMPLATE:
        raise ChatTemplateError(f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE} are read")
    return _reporting_lines(lambda: BoundedEnvironment().compile_bounded(source))


def _render(template: Any, variables: Mapping[str, Any]) -> str:
    pieces, length = [], 0
    with limits():
        for piece in template.generate(variables):
            length += len(piece)
            if length > MAX_WEIGHT:
                raise LimitExceeded(f"it writes more than {MAX_WEIGHT} characters")
            pieces.append(piece)
    return "".join(pieces)


def _reporting_lines(run: Callable[[], Any]) -> Any:
    """`run()`, its errors told by the template's line."""
    try:
        return run()
    except KtxError:
        raise
    except _Refusal as error:
        raise ChatTemplateError(f"the chat template refuses these messages: {error}") from error
    except RecursionError as error:
        raise ChatTemplateError("the chat template calls itself, or is nested, too deeply") from error
    except Exception as error:  # a template may fail in any way; whatever it is, it is the template's
        line = error.lineno if isinstance(error, TemplateSyntaxError) else _template_line(error)
        where = f", line {line}" if line else ""
        raise ChatTemplateError(f"the chat template{where}: {error or type(error).__name__}") from error


def _template_line(error: BaseException) -> int | None:
    """The line of the template that raised `error`: jinja2 puts template lines into the traceback."""
    line, frame = None, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "<template>":
            line = frame.tb_lineno
        frame = frame.tb_next
    return line


def _raise_exception(message: Any) -> None:
    raise _Refusal(str(message)[:1000])


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 256 or re.search(r"%[^a-zA-Z%]", pattern):
        raise TemplateError("strftime_now takes plain directives such as %Y-%m-%d")
    return datetime.now().strftime(pattern)
