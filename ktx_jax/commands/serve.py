# SPDX-License-Identifier: Apache-2.0
"""`ktx-jax serve`: a model behind an OpenAI API."""

import logging
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from ktx_jax.commands.common import ModelOptions, load_llm
from ktx_jax.errors import KtxError

log = logging.getLogger("ktx_jax.server")


def serve(options: ModelOptions, name: str | None, max_queue: int, settings: dict[str, Any]) -> int:
    """Serves a model until it is told to stop; returns the exit code."""
    from ktx_jax.server.settings import Settings

    checked = Settings(**settings)
    try:
        import fastapi  # noqa: F401
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise KtxError(f"serving needs {error.name}: pip install 'ktx-jax[serve]'") from error
    from ktx_jax.llm import load_config
    from ktx_jax.server.hosted import Hosted, Loaded
    from ktx_jax.server.run import serve

    if not options.leads():
        for number in (signal.SIGINT, signal.SIGTERM):  # which launchers send to all
            signal.signal(number, signal.SIG_IGN)  # process 0 obeys, and tells when it is done
        load_llm(options)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("ktx_jax").setLevel(logging.INFO)
    load_config(options.model, options.override)  # a file that cannot be served is said before the port is open

    def load(progress: Callable[[int, int], None]) -> Loaded:
        from ktx_jax.async_engine import AsyncEngine

        llm = load_llm(options, progress)
        if llm.chat_template is None:
            log.warning("no chat template: chats are refused (--chat-template FILE)")
        engine, begun = AsyncEngine(llm, max_queue=max_queue), time.perf_counter()
        count = engine.warm_up()
        log.info("loaded in %.1f s, %d programs compiled in %.1f", llm.load_seconds, count, time.perf_counter() - begun)
        return Loaded(llm, engine)

    serve(Hosted(name or options.model.resolve().stem, load), checked)
    return 0
