# SPDX-License-Identifier: Apache-2.0
"""What stands before every route: who may ask, how much, and in what time."""

import asyncio
import base64
import binascii
import contextlib
import hmac
import ipaddress
import logging
import secrets
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ktx_jax.server.errors import ApiError
from ktx_jax.server.metrics import Metrics
from ktx_jax.server.settings import Settings
from ktx_jax.server.stream import ClientGone

log = logging.getLogger("ktx_jax.server")
_DRAIN_SECONDS = 2.0
_PROBES = frozenset(("/health", "/ready", "/metrics"))
OPEN_ROUTES = frozenset(("/health",))


class Guard:
    """Checks key, origin, size and time of each request, gives it a number, and logs its outcome.

    The key may come as a bearer token, or as the password of HTTP's basic authentication, which browsers ask for.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics):
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, number, status = time.perf_counter(), secrets.token_hex(8), 0
        scope.setdefault("state", {})["request_id"] = number

        async def numbered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = number
                headers["X-Content-Type-Options"] = "nosniff"
                for name, value in self._cors(Headers(scope=scope)).items():
                    headers[name] = value
            await send(message)

        try:
            if scope["method"] == "OPTIONS" and self._cors(Headers(scope=scope)):
                await _preflight(numbered)
                return
            self._admit(scope)
            body = await self._body(receive)
            # `curl -d` names another type, and Ollama's examples use it; every body here is JSON.
            MutableHeaders(scope=scope)["Content-Type"] = "application/json"
            await self._app(scope, _replayed(body, receive), numbered)
        except ClientGone:
            pass  # nobody is left to be told
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, numbered)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            seconds = time.perf_counter() - begun
            level = logging.DEBUG if scope["path"] in _PROBES else logging.INFO
            log.log(level, "%s %s %s: %s in %.3f s", number, scope["method"], scope["path"], status or "gone", seconds)

    def _admit(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        self._check_origin(headers)
        if self._settings.api_key is not None and scope["path"] not in OPEN_ROUTES:
            self._check_key(headers.get("authorization", ""), self._settings.api_key)

    def _check_key(self, shown: str, key: str) -> None:
        kind, _, value = shown.partition(" ")
        if kind.lower() == "basic":
            try:
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                value = ""
        elif kind.lower() != "bearer":
            raise ApiError(401, "no API key: send it as `Authorization: Bearer KEY`", code="missing_api_key")
        if not hmac.compare_digest(value.strip().encode(), key.encode()):
            raise ApiError(401, "wrong API key", code="invalid_api_key")

    def _check_origin(self, headers: Headers) -> None:
        """Keeps web pages from elsewhere from using the server through a visitor's browser."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host and not self._cors(headers):
            raise ApiError(403, f"pages of {origin} may not ask here (--cors-origin lets them)", code="cross_origin")
        # A name that an attacker lets point to this machine would make his page "the same origin".
        if self._settings.local and self._settings.api_key is None and not _is_own(host):
            raise ApiError(403, f"{host!r} is not a name of this machine (--api-key lifts this)", code="wrong_host")

    async def _body(self, receive: Receive) -> bytes:
        """The body, whole: all that is known of a request is checked before a route sees it."""
        limit, seconds = self._settings.max_body, self._settings.receive_timeout
        body = bytearray()
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += message.get("body", b"")
                    if len(body) > limit:
                        await _drain(receive)
                        raise _too_large(limit)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive in {seconds:g} s", code="slow_body", close=True) from None

    def _cors(self, headers: Headers) -> dict[str, str]:
        """The headers that let a page named with --cors-origin read the answer."""
        origin, allowed = headers.get("origin"), self._settings.cors_origins
        if origin is None or not (origin in allowed or "*" in allowed):
            return {}
        return {
            "Access-Control-Allow-Origin": "*" if "*" in allowed else origin,
            "Access-Control-Expose-Headers": "X-Request-Id, X-Ignored-Parameters, Retry-After",
            "Vary": "Origin",
        }


async def _preflight(send: Send) -> None:
    headers = [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", b"Authorization, Content-Type, X-Requested-With, *"),
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _is_own(host: str) -> bool:
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body has more than {limit} bytes (--max-body)", code="body_too_large", close=True)


async def _drain(receive: Receive) -> None:
    """Reads on for a moment: a client that is still sending would not see an answer before a closed connection."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            while (await receive()).get("more_body", False):
                pass


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` as if the body had not been read yet."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
