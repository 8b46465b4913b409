# SPDX-License-Identifier: Apache-2.0
"""From generated tokens to text: whole characters, stop texts, and why a reply ended."""

from collections.abc import Iterator
from dataclasses import dataclass

from ktx_jax.engine.engine import Engine
from ktx_jax.engine.requests import FinishReason, Request, TokenLogprob
from ktx_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Chunk:
    """A piece of a reply.

    Attributes:
      text: whole characters only; empty while a character or a possible stop text is incomplete.
      token_ids: the tokens that came since the last piece (an end token included).
      logprobs: one for each of them, if asked for.
      finish_reason: set on the last piece: "stop" (end token or stop text), "length", or "abort".
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


class StopTexts:
    """Passes text on up to the first stop text, holding back what may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]):
        self._stops, self._held = stops, ""
        self.met = False

    def push(self, text: str) -> str:
        """The text that is now certain to come before any stop text."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.met, passed, self._held = True, self._held[: min(found)], ""
            return passed
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        passed, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return passed

    def flush(self) -> str:
        passed, self._held = self._held, ""
        return passed

    def _overlap(self, stop: str) -> int:
        """The length of the longest beginning of `stop` that the held text ends with."""
        most = min(len(stop) - 1, len(self._held))
        return next((n for n in range(most, 0, -1) if self._held.endswith(stop[:n])), 0)


class Reader:
    """Reads a request's reply piece by piece, one a token, and ends the request when a stop text is met."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, request: Request):
        self._engine, self._request = engine, request
        self._decoder, self._stops = tokenizer.stream(), StopTexts(tuple(request.params.stop))

    @property
    def ready(self) -> bool:
        return bool(self._request.unread) or self._request.finish_reason is not None

    def read(self) -> Chunk:
        """The next piece of a reply that is `ready`; not to be called after the last one.

        Raises:
          KtxError: the reply cannot go on, as its grammar grew beyond bounds.
        """
        request, stops = self._request, self._stops
        if request.error is not None and not request.unread:
            raise request.error
        # A request that another thread ends has no token left for its last piece.
        come = (request.unread.popleft(),) if request.unread else ()
        text = "".join(stops.push(self._decoder.push(token)) for token, _ in come)
        last = request.finish_reason is not None and not request.unread
        if last and not stops.met:
            text += stops.push(self._decoder.flush())
            text += stops.flush()
        ids = tuple(token for token, _ in come)
        logprobs = tuple(logprob for _, logprob in come if logprob is not None)
        if stops.met:
            self._engine.end(request)
            return Chunk(text, ids, logprobs, "stop")
        return Chunk(text, ids, logprobs, request.finish_reason if last else None)


def follow(engine: Engine, tokenizer: Tokenizer, request: Request) -> Iterator[Chunk]:
    """Steps the engine until `request` ends, giving its reply piece by piece.

    A caller that stops early (closes the iterator) aborts the request.
    """
    reader = Reader(engine, tokenizer, request)
    try:
        while True:
            while not reader.ready:
                engine.step()
            chunk = reader.read()
            yield chunk
            if chunk.finish_reason is not None:
                return
    finally:
        engine.abort(request)
