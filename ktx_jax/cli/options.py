# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share: each once, and together those that always go together.

A command takes a bundle as one argument, `loading: Loading`; `as_command` makes of it the bundle's fields, each an
option.
"""

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

if TYPE_CHECKING:
    from ktx_jax.commands.common import ModelOptions, Processes

Model = Annotated[Path, typer.Argument(help="A GGUF file, any part of a split one, or a directory with one model.")]
OptionalModel = Annotated[Path | None, typer.Argument(help="A GGUF file, any part of a split one, or a directory.")]
Preset = Annotated[str | None, typer.Option(help="A published model in place of a file: deepseek-v2.5, -v2, -v2-lite.")]
Context = Annotated[
    int | None, typer.Option(min=2, help="Most tokens of prompt and reply together. [default: 4096 or the model's]")
]
Batch = Annotated[int, typer.Option(min=1, help="Most texts that run at once.")]
Dtype = Annotated[
    Literal["bfloat16", "float32"],
    typer.Option(help="Of activations and cache; CPU kernels take activations with 8 bits, or with float32 15."),
]
CpuThreads = Annotated[
    int | None,
    typer.Option("--cpu-threads", "--cpu-infer", "--cpu_infer", min=1, help="CPU threads. [default: all]"),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]
Seed = Annotated[int, typer.Option(min=0, help="Makes the draw repeatable.")]
ChatTemplate = Annotated[Path | None, typer.Option(help="A Jinja file, in place of the model's own template.")]
TextFile = Annotated[Path, typer.Argument(help="A text file, UTF-8.")]
Window = Annotated[int, typer.Option(min=2, help="Tokens of a window.")]
Kept = Annotated[Path | None, typer.Option(help="A file that keeps results as they come, for --resume.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where a run that was stopped left off.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True)
class Arithmetic:
    """In what numbers a model computes, and by which code."""

    dtype: Dtype = "bfloat16"
    implementation: Annotated[
        Literal["xla", "pallas", "ffi"] | None,
        typer.Option(help="Of the heavy operations: xla is exact, ffi fast on CPUs. [default: the fast one that runs]"),
    ] = None


@dataclass(frozen=True)
class Loading:
    """What is made of a file, and where it goes."""

    override: Annotated[
        list[str], typer.Option(metavar="KEY=VALUE", help="Metadata to lay over the file's, e.g. expert_group_count=4.")
    ] = field(default_factory=list)
    rules: Annotated[
        str | None,
        typer.Option(metavar="FILE|auto", help="What lies on which device, and how it is cut. [default: one]"),
    ] = None
    cpu_threads: CpuThreads = None
    no_repack: Annotated[
        bool,
        typer.Option("--no-repack", help="CPU kernels read the file as it is: starts at once, computes more slowly."),
    ] = False


@dataclass(frozen=True)
class Several:
    """Which one of several processes this is, if it is."""

    coordinator: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT|auto", help="Of several processes: where process 0 is; auto under a launcher."),
    ] = None
    num_processes: Annotated[int | None, typer.Option(min=1, help="How many processes there are.")] = None
    process_id: Annotated[
        int | None, typer.Option(min=0, help="This process's number; process 0 takes the requests.")
    ] = None


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn, and what ends a reply."""

    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.3
    top_p: Annotated[
        float, typer.Option(max=1.0, help="Draw among the likeliest tokens that reach this probability.")
    ] = 0.95
    top_k: Annotated[int, typer.Option(min=0, help="Draw among this many likeliest tokens; 0 for all.")] = 0
    seed: Seed = 0
    stop: Annotated[list[str], typer.Option(help="A text that ends the reply; may be given several times.")] = field(
        default_factory=list
    )


class Tracebacks:
    """Whether an error shows where it came from."""

    shown = False


def _show_tracebacks(value: bool) -> bool:
    Tracebacks.shown = Tracebacks.shown or value
    return value


Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show tracebacks.", callback=_show_tracebacks, is_eager=True, expose_value=False),
]


def as_command(function: Callable[..., int]) -> Callable[..., int]:
    """The function as typer takes it: its bundles spread into options, and `--debug` beside them."""
    signature = inspect.signature(function, eval_str=True)
    spread: list[inspect.Parameter] = []
    bundles: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        if is_dataclass(parameter.annotation):
            bundles[parameter.name] = parameter.annotation
            hints = get_type_hints(parameter.annotation, include_extras=True)
            spread += [_parameter(one.name, hints[one.name], _default(one)) for one in fields(parameter.annotation)]
        else:
            spread.append(_parameter(parameter.name, parameter.annotation, parameter.default))
    spread.append(_parameter("debug", Debug, False))

    @functools.wraps(function)
    def command(debug: bool = False, **values: Any) -> int:  # its callback has seen to `debug`
        for name, bundle in bundles.items():
            values[name] = bundle(**{one.name: values.pop(one.name) for one in fields(bundle)})
        return function(**values)

    command.__signature__ = signature.replace(parameters=spread)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in spread}
    return command


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _default(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def model_options(
    model: Path,
    loading: Loading,
    arithmetic: Arithmetic = Arithmetic(),
    several: Several = Several(),
    *,
    context: int | None = None,
    batch: int = 1,
    chat_template: Path | None = None,
) -> "ModelOptions":
    """What the options say about loading a model."""
    from ktx_jax.commands.common import ModelOptions

    return ModelOptions(
        model, context, batch, arithmetic.dtype, arithmetic.implementation, dict(map(_override, loading.override)),
        loading.rules, loading.cpu_threads, not loading.no_repack, chat_template, _processes(several),
    )  # fmt: skip


def _processes(several: Several) -> "Processes | None":
    from ktx_jax.commands.common import Processes

    coordinator, count, index = several.coordinator, several.num_processes, several.process_id
    if coordinator is None and count is None and index is None:
        return None
    if coordinator is None or (coordinator == "auto") != (count is None) or (count is None) != (index is None):
        raise typer.BadParameter(
            "give HOST:PORT with --num-processes and --process-id, or auto alone", param_hint="--coordinator"
        )
    return Processes(coordinator, count, index)


def _override(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value as JSON if it is that, else as text."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise typer.BadParameter(f"expected KEY=VALUE, found {text!r}", param_hint="--override")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
