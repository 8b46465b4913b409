# SPDX-License-Identifier: Apache-2.0
"""Commands that compute nothing: they read, plan, check and write files."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ktx_jax.cli.options import AsJson, Batch, Dtype, Model, OptionalModel, Preset, Seed


def inspect(model: Model, as_json: AsJson = False) -> int:
    """Show a file's metadata, types and bytes by part.

    Reads headers only.
    """
    from ktx_jax.commands.inspect import inspect

    return inspect(model, as_json)


def synth(
    out: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    shape: Annotated[Literal["v2-lite", "v2.5", "v2"], typer.Option(help="Whose shapes.")],
    quant: Annotated[str, typer.Option(help="q4_k_m, q8_0, ...: the mix of types, as in files that people download.")],
    layers: Annotated[int | None, typer.Option(min=1, help="Only the first layers. [default: all]")] = None,
    seed: Seed = 0,
) -> int:
    """Write a file of true shapes with random weights.

    For sizing, speed and sharding work without a download; its text is noise.
    """
    from ktx_jax.commands.synth import synth

    return synth(shape, layers, quant, out, seed)


def plan(
    model: OptionalModel = None,
    preset: Preset = None,
    quant: Annotated[str, typer.Option(help="With --preset: the mix of types, q4_k_m, q8_0, ...")] = "q4_k_m",
    rules: Annotated[Path | None, typer.Option(help="A rule file, in either dialect. [default: one device]")] = None,
    auto: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Choose rules for the devices, and write them to this file.")
    ] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="How many. [default: those that the rules name]")] = None,
    target: Annotated[
        str | None, typer.Option(help="Their kind: h200, h100, a100-80g, rtx4090, cpu, or a YAML file.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="GB,...", help="Usable memory of each, in place of the target's.")
    ] = None,
    host_memory: Annotated[float | None, typer.Option(min=0, metavar="GB", help="Usable memory of the host.")] = None,
    context: Annotated[int, typer.Option(min=2, help="Most tokens of prompt and reply together.")] = 4096,
    batch: Batch = 8,
    dtype: Dtype = "bfloat16",
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile its steps for the target, which need not be here (extra `aot`).")
    ] = False,
    whole: Annotated[
        bool, typer.Option("--whole", help="With --compile: every layer, not one of each kind. Takes minutes.")
    ] = False,
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(metavar="OUT", help="Draw the plan in an HTML file.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="OUT", help="Draw it as PNG (extra `plot`).")] = None,
) -> int:
    """Show what goes where under a rule file, and whether it fits.

    The devices need not be here, and of the model only headers are read. Exit code 1: it does not fit, or compile.
    """
    from ktx_jax.commands.plan import PlanOptions, plan

    options = PlanOptions(
        model, preset, quant, rules, auto, devices, target, memory, host_memory, context, batch, dtype,
        compile_, whole, as_json, html, png,
    )  # fmt: skip
    return plan(options)


RuleFile = Annotated[Path, typer.Argument(help="A rule file.")]


def rules_check(
    file: RuleFile,
    model: OptionalModel = None,
    preset: Preset = None,
    quant: Annotated[str, typer.Option(help="With --preset: the mix of types.")] = "q4_k_m",
) -> int:
    """Say all that is wrong with a rule file for a model."""
    from ktx_jax.commands.rules import check

    return check(file, model, preset, quant)


def rules_convert(file: RuleFile, model: OptionalModel = None, preset: Preset = None) -> int:
    """Print a ktransformers rule file in the native dialect."""
    from ktx_jax.commands.rules import convert

    return convert(file, model, preset)
