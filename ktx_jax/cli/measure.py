# SPDX-License-Identifier: Apache-2.0
"""Commands that measure a model: its speed, its answers, and what they cost."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from ktx_jax.cli.options import (
    Arithmetic,
    AsJson,
    Batch,
    Context,
    Kept,
    Loading,
    Model,
    Resume,
    Several,
    TextFile,
    Window,
    model_options,
)


def bench(
    *,
    model: Model,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    decode: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 32,
    context: Context = None,
    arithmetic: Arithmetic,
    loading: Loading,
    several: Several,
    as_json: AsJson = False,
) -> int:
    """Measure loading, compilation, prefill and decode."""
    from ktx_jax.commands.bench import bench

    return bench(model_options(model, loading, arithmetic, several, context=context), prompt, decode, as_json)


def eval_(
    *,
    model: Model,
    tasks: Annotated[str, typer.Option(help="Names of lm-eval's tasks, groups or YAML files, between commas.")],
    include_path: Annotated[Path | None, typer.Option(help="A folder of your own tasks (YAML).")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question. [default: the task's]")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(min=0, help="Only so many questions of a task, or below 1 a share.")
    ] = None,
    apply_chat_template: Annotated[bool, typer.Option("--chat", help="Ask through the chat template.")] = False,
    out: Annotated[Path, typer.Option(help="The folder for results, as lm-eval writes them.")] = Path("results"),
    resume: Resume = False,
    context: Context = None,
    batch: Batch = 8,
    arithmetic: Arithmetic,
    loading: Loading,
    several: Several,
    as_json: AsJson = False,
) -> int:
    """Run tasks of lm-evaluation-harness (extra `eval`).

    Answers are kept as they come: a run that was stopped goes on with --resume.
    """
    from ktx_jax.commands.eval import EvalOptions, eval_

    options = model_options(model, loading, arithmetic, several, context=context, batch=batch)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter("names no task", param_hint="--tasks")
    wanted = EvalOptions(names, include_path, num_fewshot, limit, apply_chat_template, out, resume, as_json)
    return eval_(options, wanted)


def perplexity(
    *,
    model: Model,
    file: TextFile,
    window: Window = 512,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Slide windows by so many tokens, and score every token. [default: second halves]"),
    ] = None,
    out: Kept = None,
    resume: Resume = False,
    arithmetic: Arithmetic,
    loading: Loading,
    several: Several,
    as_json: AsJson = False,
) -> int:
    """Measure how surprised a model is by a text.

    By default the figure that llama.cpp gives: windows side by side, their second halves scored.
    """
    from ktx_jax.commands.perplexity import perplexity

    options = model_options(model, loading, arithmetic, several, context=window)
    return perplexity(options, file, window, stride, out, resume, as_json)


def compare(
    *,
    a: Annotated[Path, typer.Argument(help="The model to measure from.")],
    b: Annotated[Path, typer.Argument(help="The model to measure; may be the same file.")],
    file: TextFile,
    window: Window = 512,
    arithmetic: Arithmetic,
    b_dtype: Annotated[Literal["bfloat16", "float32"] | None, typer.Option(help="Of B. [default: A's]")] = None,
    b_implementation: Annotated[
        Literal["xla", "pallas", "ffi"] | None, typer.Option(help="Of B. [default: A's]")
    ] = None,
    loading: Loading,
    several: Several,
    out: Kept = None,
    resume: Resume = False,
    plot: Annotated[Path | None, typer.Option(metavar="OUT", help="Draw it (extra `plot`): .png, .svg, ....")] = None,
    as_json: AsJson = False,
) -> int:
    """Measure what a quantization or an implementation costs.

    KL from A's to B's next-token distributions over a text, how often both find the same token likeliest, and both
    perplexities. Both models are in memory.
    """
    from ktx_jax.commands.compare import compare

    of_b = replace(
        arithmetic,
        dtype=b_dtype or arithmetic.dtype,
        implementation=b_implementation or arithmetic.implementation,
    )
    first = model_options(a, loading, arithmetic, several, context=window)
    second = model_options(b, loading, of_b, several, context=window)
    return compare(first, second, file, window, out, resume, plot, as_json)


def verify(
    *,
    model: Model,
    text: Annotated[
        Path | None, typer.Option(help="A text for the perplexity; wikitext-2's test part has published figures.")
    ] = None,
    loading: Loading,
    several: Several,
) -> int:
    """Check that a file is a published model, computed right.

    Its shape against DeepSeek-V2-Lite's, V2's and V2.5's, its perplexity against published figures, and the fast path
    against the exact one. Exit code 1: something differs.
    """
    from ktx_jax.commands.verify import verify

    return verify(model_options(model, loading, several=several), text)
