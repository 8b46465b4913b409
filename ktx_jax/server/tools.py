# SPDX-License-Identifier: Apache-2.0
"""Functions that a model may call, in DeepSeek-V2.5's own markup.

The markup, as the model's chat template writes the calls of earlier turns:

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME
    ```json
    ARGUMENTS
    ```<｜tool▁call▁end｜>
    <｜tool▁call▁begin｜>...<｜tool▁call▁end｜><｜tool▁calls▁end｜>

In V2.5's vocabulary the marks are tokens of their own; where a vocabulary lacks them, they are ordinary text.
"""

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktx_jax.tokenizer import Tokenizer

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
MARKS = (BEGIN, END, CALL, SEPARATOR, CALL_END)
_FENCE, _FENCE_END = "\n```json\n", "\n```"
_HEAD = re.compile(rf"[^<\n]{{0,64}}{SEPARATOR}([^<\n]{{1,128}}?)[ \t]{{0,8}}\n```json[ \t]{{0,8}}\n")
_LONGEST_HEAD = 256  # characters, more than a head can have; then the call is malformed


@dataclass(frozen=True)
class CallStart:
    """A call begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of a call's arguments, as JSON text."""

    index: int
    text: str


Part = str | CallStart | CallArguments
"""What a reply is made of: text, and calls."""


def described(tools: Sequence[Mapping[str, Any]]) -> str:
    """The text that tells the model of its tools, for templates that do not; as DeepSeek-V2.5 is told of them."""
    listed = (
        f"- `{tool['function']['name']}`:\n```json\n{json.dumps(tool['function'], indent=4, ensure_ascii=False)}\n```"
        for tool in tools
    )
    return "## Tools\n\n### Function\n\nYou have the following functions available:\n\n" + "\n\n".join(listed)


def told(messages: Sequence[Mapping[str, Any]], text: str) -> list[Mapping[str, Any]]:
    """`messages` with `text` at the end of the last system message, or in a new one."""
    told = list(messages)
    places = [i for i, message in enumerate(told) if message["role"] == "system"]
    if not places:
        return [{"role": "system", "content": text}, *told]
    last = told[places[-1]]
    told[places[-1]] = {**last, "content": f"{last['content']}\n\n{text}"}
    return told


class MarkupDecoder:
    """Token ids to text, with the marks of calls but no other control tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._marks = mark_ids(tokenizer)
        self._stream = tokenizer.stream()

    def push(self, token: int) -> str:
        """The characters that `token` completes."""
        return self._stream.flush() + self._marks[token] if token in self._marks else self._stream.push(token)

    def flush(self) -> str:
        """What is left at the end."""
        return self._stream.flush()


def mark_ids(tokenizer: Tokenizer) -> dict[int, str]:
    """The marks that are tokens of their own."""
    names = ((i, tokenizer.token_bytes(i).decode()) for i in tokenizer.special_ids)
    return {i: name for i, name in names if name in MARKS}


class CallParser:
    """Finds calls in text that comes in pieces. What is no well-formed call comes out as text, nothing is lost."""

    def __init__(self) -> None:
        self._state: Callable[[], list[Part] | None] = self._text
        self._held = ""
        self.calls = 0  # begun
        self.ended = 0  # complete

    def push(self, text: str) -> list[Part]:
        """The parts that are now certain."""
        self._held += text
        parts: list[Part] = []
        while (come := self._state()) is not None:
            parts += come
        return [part for part in parts if part]

    def flush(self) -> list[Part]:
        """What is left at the end of the reply."""
        held, self._held = self._held, ""
        if self._state == self._arguments:
            return [CallArguments(self.calls - 1, rest)] if (rest := _without_fence(held)) else []
        if self._state == self._head:
            held = CALL + held
        return [held] if held and self._state != self._between else []

    # Each state takes what it can from `_held`, and gives None when it needs more text.

    def _text(self) -> list[Part] | None:
        found = [at for mark in (BEGIN, CALL) if (at := self._held.find(mark)) >= 0]
        if found:
            text = self._take(min(found))
            if self._held.startswith(BEGIN):
                self._take(len(BEGIN))
            self._state = self._between
            return [text]
        text = self._take(len(self._held) - _overlap(self._held, BEGIN, CALL))
        return [text] if text else None

    def _between(self) -> list[Part] | None:
        self._held = self._held.lstrip()
        for mark, state in ((CALL, self._head), (END, self._text)):
            if self._held.startswith(mark):
                self._take(len(mark))
                self._state = state
                return []
        if _overlap(self._held, CALL, END) == len(self._held):
            return None
        self._state = self._text
        return []

    def _head(self) -> list[Part] | None:
        match = _HEAD.match(self._held)
        if match:
            self._take(match.end())
            self.calls += 1
            self._state = self._arguments
            return [CallStart(self.calls - 1, f"call_{secrets.token_hex(12)}", match[1])]
        if len(self._held) > _LONGEST_HEAD or CALL_END in self._held:
            self._state = self._text
            return [CALL]
        return None

    def _arguments(self) -> list[Part] | None:
        at = self._held.find(CALL_END)
        if at >= 0:
            rest = _without_fence(self._take(at))
            self._take(len(CALL_END))
            self.ended += 1
            self._state = self._between
            return [CallArguments(self.calls - 1, rest)] if rest else []
        text = self._take(len(self._held) - _overlap(self._held, _FENCE_END + CALL_END, CALL_END))
        return [CallArguments(self.calls - 1, text)] if text else None

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken


def _overlap(text: str, *marks: str) -> int:
    """The length of the longest end of `text` that is the beginning of a mark."""
    return max(
        next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0) for mark in marks
    )


def _without_fence(text: str) -> str:
    return (
        text.removesuffix(_FENCE_END) if text.endswith(_FENCE_END) else text[: len(text) - _overlap(text, _FENCE_END)]
    )


def call_grammar(tools: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, required: bool, parallel: bool) -> str:
    """The grammar, in llguidance's dialect of Lark, of replies whose calls fit the tools' schemas.

    Args:
      tools: those that may be called.
      tokenizer: decides which marks are tokens.
      required: the reply is calls, one at least; otherwise it may be text, or text and then calls.
      parallel: more than one call.
    """
    ids = {name: f"<[{i}]>" for i, name in mark_ids(tokenizer).items()}
    mark = {name: ids.get(name, _quoted(name)) for name in MARKS}
    lines = []
    if required:
        lines.append(f"start: {mark[BEGIN]} calls")
    elif BEGIN in ids:  # text cannot hold the token
        lines.append(f"start: TEXT ({mark[BEGIN]} calls)?")
    else:
        lines += ["start: TEXT | lead calls", f"lead[lazy]: TEXT {mark[BEGIN]}"]
    lines.append("TEXT: /(?s:.*)/")
    lines.append(f"calls: call {_repeated(parallel)} {mark[END]}")
    choice = " | ".join(f"tool_{i}" for i in range(len(tools)))
    lines.append(f'call: {mark[CALL]} "function" {mark[SEPARATOR]} ({choice}) {_quoted(_FENCE_END)} {mark[CALL_END]}')
    for i, tool in enumerate(tools):
        schema = tool["function"].get("parameters") or {
            "type": "object",
            "properties": {},
            "additionalProperties": False,
        }
        lines.append(f"tool_{i}: {_quoted(tool['function']['name'] + _FENCE)} arguments_{i}")
        lines.append(f"arguments_{i}: %json {json.dumps({**schema, 'x-guidance': {'whitespace_flexible': False}})}")
    return "\n".join(lines) + "\n"


def _repeated(parallel: bool) -> str:
    return '("\\n" call)*' if parallel else ""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
