# SPDX-License-Identifier: Apache-2.0
"""Answers that come piece by piece, and clients that go before the end."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
COMMENT = b": keep-alive\n\n"


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


def event(data: Mapping[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def line(data: Mapping[str, Any]) -> bytes:
    """One line of newline-delimited JSON, as Ollama streams it."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; cancels it at once when the client goes.

    Raises:
      ClientGone: it went.
    """
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Pieces(Response):
    """A response of pieces as they come; when the client goes, their source is closed at once.

    Args:
      pieces: none is empty; closed at the end, whatever ends it.
      media_type: sent as it is, without a charset.
      keepalive: seconds without a piece after which `idle` is sent.
      idle: what clients skip; empty for nothing.
      failure: the piece that tells of an error once the status has been sent.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        *,
        media_type: str,
        headers: Mapping[str, str],
        keepalive: float,
        idle: bytes,
        failure: Callable[[Exception], bytes],
    ):
        super().__init__(headers=headers)
        del self.headers["Content-Length"]
        # nginx would wait for more before it passes anything on.
        self.headers.update({"Content-Type": media_type, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._pieces, self._keepalive, self._idle, self._failure = pieces, keepalive, idle, failure
        self._coming: asyncio.Future[bytes] | None = None

    async def begin(self) -> None:
        """Waits for the first piece, at most `keepalive`: an error until then still gets its own status.

        Raises:
          Exception: whatever the source of the pieces raises.
        """
        try:
            if await self._arrived():
                self._come().result()
        except BaseException:
            await self._stop()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await while_connected(receive, self._send(send))
        except ClientGone:
            pass  # nobody is left to be told
        finally:
            await self._stop()

    async def _send(self, send: Send) -> None:
        try:
            while True:
                while not await self._arrived():
                    await send({"type": "http.response.body", "body": self._idle, "more_body": True})
                piece, self._coming = self._come().result(), None
                if not piece:
                    break
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except Exception as error:  # the status has gone out: the error becomes part of the stream
            await send({"type": "http.response.body", "body": self._failure(error), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _come(self) -> "asyncio.Future[bytes]":
        if self._coming is None:
            self._coming = asyncio.ensure_future(_next(self._pieces))
        return self._coming

    async def _arrived(self) -> bool:
        done, _ = await asyncio.wait((self._come(),), timeout=self._keepalive)
        return bool(done)

    async def _stop(self) -> None:
        if self._coming is not None:
            self._coming.cancel()
            await asyncio.gather(self._coming, return_exceptions=True)
        await self._pieces.aclose()


async def _next(pieces: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(pieces, b"")
