# SPDX-License-Identifier: Apache-2.0
"""The process: a listening socket, the model loading beside it, and a clean end."""

import asyncio
import json
import logging
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ktx_jax.errors import KtxError
from ktx_jax.server.app import create_app
from ktx_jax.server.errors import ApiError
from ktx_jax.server.guard import Guard
from ktx_jax.server.hosted import Hosted
from ktx_jax.server.metrics import Metrics
from ktx_jax.server.settings import Settings

log = logging.getLogger("ktx_jax.server")
_MAX_HEAD = 2**16  # bytes of a request's first line and headers
_LAST_WORDS = 5.0  # seconds that connections have after the grace, to be told that their replies were cut


def serve(hosted: Hosted, settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT, and for the grace time after it.

    Raises:
      KtxError: the address cannot be listened on, the model cannot be loaded, or the engine failed.
    """
    metrics = Metrics(hosted)
    config = uvicorn.Config(
        Guard(create_app(hosted, settings, metrics), settings, metrics),
        http=_protocol(settings),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=_MAX_HEAD,
        timeout_graceful_shutdown=round(settings.grace + _LAST_WORDS),
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )
    listener = _listen(settings)
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        listener.close()
        raise KtxError(f"{settings.tls_cert}, {settings.tls_key}: cannot be used for TLS: {error}") from error
    scheme = "http" if settings.tls_cert is None else "https"
    host, port = listener.getsockname()[:2]
    log.info("listening on %s://%s:%s", scheme, f"[{host}]" if ":" in host else host, port)
    asyncio.run(_Server(config, hosted, settings).serve_until_stopped(listener))
    if hosted.error is not None:
        raise hosted.error


class _Server(uvicorn.Server):
    """uvicorn's server, that loads the model and lets running replies end."""

    def __init__(self, config: uvicorn.Config, hosted: Hosted, settings: Settings):
        super().__init__(config)
        self._hosted, self._settings = hosted, settings

    async def serve_until_stopped(self, listener: socket.socket) -> None:
        loading = asyncio.create_task(self._load())
        await self.serve(sockets=[listener])
        loading.cancel()

    async def _load(self) -> None:
        await self._hosted.load()
        if self._hosted.error is not None:
            self.should_exit = True
        elif self._hosted.state == "ready":
            log.info("%s is ready", self._hosted.name)

    async def on_tick(self, counter: int) -> bool:
        return self._hosted.failed or await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("stopping; running replies have %g s", self._settings.grace)
        closing = asyncio.create_task(self._hosted.close(self._settings.grace))
        await super().shutdown(sockets)
        await closing

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.force_exit = self.should_exit  # asked twice
        self.should_exit = True


def _listen(settings: Settings) -> socket.socket:
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(settings.max_connections)
    except OSError as error:
        raise KtxError(f"cannot listen on {settings.host}, port {settings.port}: {error.strerror or error}") from error
    return listener


def _protocol(settings: Settings) -> type[H11Protocol]:
    """uvicorn's HTTP, with a bound on connections and on the time until a request's head is there."""

    class Bounded(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                self._refuse(ApiError(503, "too many connections", code="busy", retry_after=1))
            else:
                self._head_timer = self.loop.call_later(settings.receive_timeout, self._too_slow)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._stop_timer()
            elif self._head_timer is None:  # a further request on this connection
                self._head_timer = self.loop.call_later(settings.receive_timeout, self._too_slow)

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _too_slow(self) -> None:
            self._refuse(ApiError(408, f"no request came in {settings.receive_timeout:g} s", code="slow_head"))

        def _refuse(self, error: ApiError) -> None:
            """Answers before any request was read, and closes."""
            body = json.dumps(error.body()).encode()
            reason = {408: "Request Timeout", 503: "Service Unavailable"}[error.status]
            fields = {
                "Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close",
                **error.headers,
            }  # fmt: skip
            head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
            self.transport.write(f"HTTP/1.1 {error.status} {reason}\r\n{head}\r\n".encode() + body)
            self.transport.close()

    return Bounded
