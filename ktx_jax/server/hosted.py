# SPDX-License-Identifier: Apache-2.0
"""The model that a server has: loading, ready, or closing."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ktx_jax.server.errors import ApiError

State = Literal["loading", "ready", "closing", "failed"]


@dataclass(frozen=True)
class Loaded:
    """A model ready to be asked: the `LLM`, and the `AsyncEngine` on it."""

    llm: Any
    engine: Any


class Hosted:
    """One model under one name.

    Args:
      name: what clients call it.
      load: makes it, in a thread; is given a function of bytes done and bytes in all.
    """

    def __init__(self, name: str, load: Callable[[Callable[[int, int], None]], Loaded]):
        self.name, self.created = name, int(time.time())
        self.state: State = "loading"
        self.error: BaseException | None = None
        self.progress = 0.0  # 0 to 1, of bytes loaded
        self._load = load
        self._loaded: Loaded | None = None

    async def load(self) -> None:
        """Loads the model. What goes wrong is in `error`."""
        try:
            self._loaded = await asyncio.to_thread(self._load, self._follow)
        except Exception as error:
            self.fail(error)
            return
        self.progress = 1.0
        if self.state == "loading":
            self.state = "ready"

    def get(self, name: str | None = None) -> Loaded:
        """The model, if it is ready and `name` is its name.

        Raises:
          ApiError: 404 another name; 503 not ready.
        """
        if name is not None and name not in (self.name, f"{self.name}:latest"):
            raise ApiError(
                404, f"there is no model {name!r} here; this server has {self.name!r}", param="model",
                code="model_not_found",
            )  # fmt: skip
        if self.state == "ready" and self._loaded is not None:
            return self._loaded
        if self.state == "loading":
            raise ApiError(503, f"the model is loading ({self.progress:.0%})", code="loading", retry_after=2)
        raise ApiError(503, "the server is stopping", code="closing", retry_after=10)

    def fail(self, error: BaseException) -> None:
        """The engine cannot go on; the server stops."""
        self.state, self.error = "failed", self.error or error

    @property
    def failed(self) -> bool:
        """Whether the model cannot be served, now or ever."""
        return self.state == "failed"

    @property
    def loaded(self) -> Loaded | None:
        """The model whatever its state, for those who only look at it."""
        return self._loaded

    async def close(self, grace: float) -> None:
        """Takes no more requests; those that run have `grace` seconds."""
        if not self.failed:
            self.state = "closing"
        if self._loaded is not None:
            await self._loaded.engine.close(grace)

    def _follow(self, done: int, total: int) -> None:
        self.progress = done / total if total else 0.0
