# SPDX-License-Identifier: Apache-2.0
"""Commands that ask a model, or let others ask it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from ktx_jax.cli.options import (
    Arithmetic,
    AsJson,
    Batch,
    ChatTemplate,
    Context,
    CpuThreads,
    Drawing,
    Loading,
    MaxTokens,
    Model,
    Several,
    model_options,
)


def demo(cpu_threads: CpuThreads = None) -> int:
    """See the embedded model complete texts and answer."""
    from ktx_jax.commands.demo import demo

    return demo(cpu_threads)


def generate(
    *,
    model: Model,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="A text; several run together.")],
    max_tokens: MaxTokens = 64,
    drawing: Drawing,
    context: Context = None,
    batch: Batch = 1,
    arithmetic: Arithmetic,
    loading: Loading,
    several: Several,
    as_json: AsJson = False,
) -> int:
    """Complete a text, printed as it comes."""
    from ktx_jax.commands.generate import generate

    options = model_options(model, loading, arithmetic, several, context=context, batch=batch)
    return generate(options, prompt, {"max_tokens": max_tokens, **asdict(drawing)}, as_json)


def chat(
    *,
    model: Model,
    system: Annotated[str | None, typer.Option(help="A system message, said first.")] = None,
    chat_template: ChatTemplate = None,
    max_tokens: MaxTokens = 512,
    drawing: Drawing,
    context: Context = None,
    arithmetic: Arithmetic,
    loading: Loading,
    several: Several,
) -> int:
    """Talk with a model.

    It remembers the conversation. /help lists the commands; Ctrl-C stops a reply.
    """
    from ktx_jax.commands.chat import chat

    options = model_options(model, loading, arithmetic, several, context=context, chat_template=chat_template)
    return chat(options, system, {"max_tokens": max_tokens, **asdict(drawing)})


@dataclass(frozen=True)
class Serving:
    """How a server behaves: what `ktx_jax.server.settings.Settings` takes."""

    host: Annotated[
        str, typer.Option(help="The address to listen on; another than this machine's own needs a key.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000
    api_key: Annotated[
        str | None, typer.Option(envvar="KTX_JAX_API_KEY", help="What clients have to show.", show_envvar=True)
    ] = None
    open: Annotated[bool, typer.Option("--open", help="Serve a network without a key.")] = False
    cors_origins: Annotated[
        list[str],
        typer.Option("--cors-origin", metavar="ORIGIN", help="A web page's origin that may ask; * for all."),
    ] = field(default_factory=list)
    tls_cert: Annotated[Path | None, typer.Option(help="A PEM file: serve HTTPS.")] = None
    tls_key: Annotated[Path | None, typer.Option(help="Its key, a PEM file.")] = None
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take, waiting included.")] = 600.0
    grace: Annotated[float, typer.Option(min=0, help="Seconds that running replies have at the end.")] = 30.0
    max_connections: Annotated[int, typer.Option(min=1, help="Most open connections.")] = 512
    max_body: Annotated[int, typer.Option(min=1024, help="Most bytes of a request.")] = 8 * 2**20
    log_prompts: Annotated[bool, typer.Option(help="Write prompts and replies to the log.")] = False


def serve(
    *,
    model: Model,
    name: Annotated[str | None, typer.Option(help="What clients call the model. [default: the file's name]")] = None,
    serving: Serving,
    max_queue: Annotated[int, typer.Option(min=1, help="Most replies that wait to run.")] = 256,
    chat_template: ChatTemplate = None,
    context: Context = None,
    batch: Batch = 8,
    arithmetic: Arithmetic,
    loading: Loading,
    several: Several,
) -> int:
    """Serve a model over OpenAI's API and Ollama's, with a chat page (extra `serve`).

    Answers at once; until the model is loaded, with 503. Ctrl-C or SIGTERM lets running replies end.
    """
    from ktx_jax.commands.serve import serve

    options = model_options(
        model, loading, arithmetic, several, context=context, batch=batch, chat_template=chat_template
    )
    return serve(options, name, max_queue, asdict(serving) | {"cors_origins": tuple(serving.cors_origins)})
