# SPDX-License-Identifier: Apache-2.0
"""`ktx-jax rules`: checks rule files against a model, and converts ktransformers' to the native dialect."""

import sys
from collections.abc import Callable
from pathlib import Path

from ktx_jax.commands.common import notes, read_text
from ktx_jax.commands.model_shape import model_shape
from ktx_jax.errors import KtxError
from ktx_jax.sharding.convert import convert_ktransformers
from ktx_jax.sharding.memory import show_bytes
from ktx_jax.sharding.plan import Plan, check_rules
from ktx_jax.sharding.problems import Findings, RulesError
from ktx_jax.sharding.rules import Rules, parse_rules


def say_problems(run: Callable[[], int]) -> int:
    """What `run` returns; of a rule file that is wrong, every problem on its own line, and 1."""
    try:
        return run()
    except RulesError as error:
        count = len(error.lines)
        print(*error.lines, sep="\n", file=sys.stderr)
        print(f"ktx-jax: {count} problem{'' if count == 1 else 's'} in the rules", file=sys.stderr)
        return 1


def check(file: Path, model: Path | None, preset: str | None, quant: str) -> int:
    """Prints all that is wrong with a rule file for a model, found in one pass; returns the exit code."""
    return say_problems(lambda: _check(file, model, preset, quant))


def _check(file: Path, model: Path | None, preset: str | None, quant: str) -> int:
    shape = model_shape(model, preset, quant)
    rules, problems = parse_rules(read_text(file), str(file))
    findings = Findings()
    findings.extend(problems)
    if rules is not None:
        check_rules(rules, shape.config, shape.types, findings)
    findings.raise_if_any(str(file))
    assert rules is not None
    plan = Plan.from_rules(shape.config, rules, types=shape.types)
    for notice in plan.notices:
        notes.print(f"note: {notice}", markup=False)
    total = sum(plan.needs[name].weights for name in plan.devices)
    print(
        f"{file}: good for {shape.name}: {len(plan.parameters)} parameters, {show_bytes(total)} "
        f"in {len(plan.stages)} stage{'s' if len(plan.stages) > 1 else ''} on {', '.join(plan.devices)}"
    )
    return 0


def convert(file: Path, model: Path | None, preset: str | None) -> int:
    """Prints ktransformers' rules in the native dialect; returns the exit code."""
    return say_problems(lambda: _convert(file, model, preset))


def _convert(file: Path, model: Path | None, preset: str | None) -> int:
    if model is None and preset is None:
        preset = "deepseek-v2.5"
        notes.print(f"note: converted for {preset}; give a model or --preset for another", markup=False)
    shape = model_shape(model, preset, "q4_k_m")
    rules = Rules.from_file(file)
    if rules.dialect == "native":
        raise KtxError(f"{file}: the rules are in the native dialect already")
    print(convert_ktransformers(rules, shape.config), end="")
    return 0
