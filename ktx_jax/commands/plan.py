# SPDX-License-Identifier: Apache-2.0
"""`ktx-jax plan`: what goes where under a rule file, and whether it fits on devices that need not be here."""

from dataclasses import dataclass
from html import escape
from pathlib import Path

from ktx_jax.aot.compile import Compilation, compile_plan
from ktx_jax.commands.common import notes, print_json
from ktx_jax.commands.model_shape import ModelShape, model_shape
from ktx_jax.commands.plan_costs import compiled_json, compiled_text, roofline_json, roofline_text
from ktx_jax.commands.rules import say_problems
from ktx_jax.errors import KtxError
from ktx_jax.sharding.auto import Sizes, choose_rules
from ktx_jax.sharding.devices import HOST
from ktx_jax.sharding.fit import capacities
from ktx_jax.sharding.gpu_kernels import default_implementation
from ktx_jax.sharding.plan import Plan
from ktx_jax.sharding.roofline import Roofline, pipelined, roofline
from ktx_jax.sharding.rules import Rules
from ktx_jax.sharding.step_size import PHASES, step_size
from ktx_jax.sharding.targets import HOST_TARGET, Target, load_target

_GB = 10**9


@dataclass(frozen=True)
class PlanOptions:
    """What `ktx-jax plan` was asked for."""

    model: Path | None
    preset: str | None
    quant: str
    rules: Path | None
    auto: Path | None
    devices: int | None
    target: str | None
    memory: str | None
    host_memory: float | None
    context: int
    batch: int
    dtype: str
    compile: bool
    whole: bool
    as_json: bool
    html: Path | None
    png: Path | None


def plan(options: PlanOptions) -> int:
    """Prints or draws the plan; returns 0, or 1 where it does not fit or the rules are wrong."""
    return say_problems(lambda: _plan(options))


def _plan(options: PlanOptions) -> int:
    shape = model_shape(options.model, options.preset, options.quant)
    target = None if options.target is None else load_target(options.target)
    sizes = _memory(options, target)
    made = Plan.for_target(
        shape.config,
        _rules(options, shape, sizes, target),
        target,
        devices=options.devices or (len(sizes) if isinstance(sizes, list) else None),
        types=shape.types,
        context=options.context,
        batch=options.batch,
        dtype=options.dtype,
    )
    room = _room(made, sizes, options.host_memory)
    fit = made.check(room) if room else None
    rooflines = {} if target is None else _rooflines(made, target)
    compiled = _compile(options, made, target)
    texts = [made.summary(room)]
    texts += [f"{fit}\n"] if fit is not None else []
    texts += [roofline_text(list(rooflines.values()))] if rooflines else []
    texts += [compiled_text(made, compiled)] if compiled is not None else []
    if options.as_json:
        said = made.to_json() | {"model": shape.name}
        if fit is not None:
            short = {s.device: {"needed": s.needed, "capacity": s.capacity} for s in fit.shortfalls}
            said["fit"] = {"ok": fit.ok, "shortfalls": short, "changes": list(fit.changes)}
        if rooflines:
            said["roofline"] = {phase: roofline_json(*both) for phase, both in rooflines.items()}
        if compiled is not None:
            said["compiled"] = compiled_json(made, compiled)
        print_json(said)
    else:
        print(f"{shape.name}, on {target.name}" if target else shape.name)
        print("\n".join(texts), end="")
    _draw(options, shape, made, room, texts)
    return int((fit is not None and not fit.ok) or (compiled is not None and compiled.failed))


def _rooflines(made: Plan, target: Target) -> dict[str, tuple[Roofline, Roofline]]:
    """Of each kind of step the least time, of a lone one and with all stages busy."""
    host = load_target(HOST_TARGET)
    sizes = [step_size(made, phase) for phase in PHASES]
    return {s.phase: (roofline(made, target, s, host=host), pipelined(made, target, s, host=host)) for s in sizes}


def _compile(options: PlanOptions, made: Plan, target: Target | None) -> Compilation | None:
    if not options.compile:
        if options.whole:
            raise KtxError("--whole says how to --compile: give both")
        return None
    if target is None:
        raise KtxError("--compile needs to know for what: give --target")
    with notes.status(f"Compiling for {target.name}"):
        return compile_plan(made, target, whole=options.whole)


def _memory(options: PlanOptions, target: Target | None) -> list[int] | int | None:
    """Usable bytes: of each device, of every device, or None where nothing was said."""
    if options.memory is None:
        return None if target is None else target.usable
    try:
        sizes = [round(float(part) * _GB) for part in options.memory.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) <= 0:
        raise KtxError(f"--memory should be sizes in GB, as 80,80,24; found {options.memory!r}")
    if len(sizes) == 1 and options.devices != 1:
        return sizes * options.devices if options.devices else sizes[0]
    if options.devices is not None and len(sizes) != options.devices:
        raise KtxError(f"--memory has {len(sizes)} sizes for {options.devices} devices")
    return sizes


def _rules(options: PlanOptions, shape: ModelShape, sizes: list[int] | int | None, target: Target | None) -> Rules:
    if options.auto is None:
        return Rules.from_text("rules: []", "one device") if options.rules is None else Rules.from_file(options.rules)
    if options.rules is not None:
        raise KtxError("--rules gives rules, --auto chooses them: give one of them")
    if sizes is None:
        raise KtxError("--auto needs to know the devices: give --memory 80,80,24 (GB), or --target and --devices")
    if options.auto.exists():
        raise KtxError(f"{options.auto} is there already: choose another name for the rules")
    memory = sizes if isinstance(sizes, list) else [sizes] * (options.devices or 1)
    host = None if options.host_memory is None else round(options.host_memory * _GB)
    wanted = Sizes(options.context, options.batch, options.dtype)
    op = default_implementation(None if target is None else target.capability, options.dtype)
    text = choose_rules(shape.config, shape.types, memory, wanted, host, implementation=op)
    options.auto.write_text(text, encoding="utf-8")
    notes.print(f"rules written to {options.auto}", markup=False)
    return Rules.from_text(text, str(options.auto))


def _room(made: Plan, sizes: list[int] | int | None, host_memory: float | None) -> dict[str, int]:
    """Usable bytes by device name, of those that something is known about."""
    room = {} if sizes is None else capacities(made, sizes)
    if host_memory is not None and HOST in made.devices:
        room[HOST] = round(host_memory * _GB)
    return room


def _draw(options: PlanOptions, shape: ModelShape, made: Plan, room: dict[str, int], texts: list[str]) -> None:
    if options.html is None and options.png is None:
        return
    figure = made.figure(room)
    if options.html is not None:
        options.html.write_text(_page(shape, made, figure.svg(), texts), encoding="utf-8")
        notes.print(f"drawn in {options.html}", markup=False)
    if options.png is not None:
        figure.png(options.png)
        notes.print(f"drawn in {options.png}", markup=False)


def _page(shape: ModelShape, made: Plan, svg: str, texts: list[str]) -> str:
    """One HTML file with the picture and the tables; it refers to nothing outside."""
    title = escape(f"{shape.name}: {made.name}")
    tables = "\n".join(f"<pre>{escape(text)}</pre>" for text in texts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>\n'
        f'<body style="font-family: sans-serif; margin: 2em"><h1 style="font-size: 1.3em">{title}</h1>\n'
        f"{svg}{tables}\n</body></html>\n"
    )
