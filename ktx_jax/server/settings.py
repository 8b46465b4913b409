# SPDX-License-Identifier: Apache-2.0
"""How a server behaves, and what it takes from a client at most."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from ktx_jax.errors import KtxError

MAX_CHOICES = 128  # replies of one HTTP request: prompts times n
MAX_STOPS = 16
MAX_STOP_LENGTH = 256  # characters
MAX_SCHEMA = 2**16  # characters of a JSON schema, or of all the tools' schemas together
MAX_TOOLS = 128
MAX_MESSAGES = 4096


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
      host, port: the address to listen on; port 0 takes a free one.
      api_key: what clients have to show, or None.
      open: serve a network without a key.
      cors_origins: web pages from elsewhere that may ask; "*" for all.
      tls_cert, tls_key: PEM files, for HTTPS.
      timeout: seconds that one request may take, its wait in the queue included.
      receive_timeout: seconds in which the head of a request, and then its body, have to arrive.
      grace: seconds that running requests have when the server stops.
      max_connections: open connections at once.
      max_body: bytes of a request.
      keepalive: seconds after which an idle stream gets a comment.
      log_prompts: write prompts and replies to the log.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    open: bool = False
    cors_origins: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    timeout: float = 600.0
    receive_timeout: float = 30.0
    grace: float = 30.0
    max_connections: int = 512
    max_body: int = 8 * 2**20
    keepalive: float = 10.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip() == self.api_key != ""):
            raise KtxError("--api-key should be ASCII characters without spaces around them")
        if not (self.local or self.api_key or self.open):
            raise KtxError(
                f"--host {self.host} can be reached by others, and there is no --api-key: give one, "
                "or --open if everyone may use this server"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise KtxError("--tls-cert and --tls-key go together")
        for path in (self.tls_cert, self.tls_key):
            if path is not None and not path.is_file():
                raise KtxError(f"{path}: no such file")

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
