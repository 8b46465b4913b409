# SPDX-License-Identifier: Apache-2.0
"""What no single parameter shows: combinations inside a layer that the program cannot run."""

from collections.abc import Mapping

from ktx_jax.sharding.choices import Choices, Spec
from ktx_jax.sharding.parameters import EXPERTS, Inventory, Parameter
from ktx_jax.sharding.placement import Placement
from ktx_jax.sharding.problems import Findings
from ktx_jax.sharding.units import units


def check_layers(
    model: Inventory, placement: Placement, specs: Mapping[str, Spec], choices: Choices, findings: Findings
) -> None:
    """That each layer's routed experts are cut and computed alike, and that nothing else is streamed."""
    for unit in units(model):
        for parameter in unit.experts:
            _check_operators(parameter, f"{unit.path}.{EXPERTS}", choices, findings)
            _check_experts(parameter, f"{unit.path}.{EXPERTS}", specs, choices, findings)
        for parameter in unit.main:
            streamed = placement.by_path[parameter.path].prefill
            if streamed is not None:
                findings.add_path(
                    choices.by_path[parameter.path].where_mark,
                    f"{{path}} would be streamed to {streamed}: only routed experts are, to the device of their layer",
                    parameter.path,
                )


def _check_experts(
    parameter: Parameter, experts: str, specs: Mapping[str, Spec], choices: Choices, findings: Findings
) -> None:
    """gate and up [E, F, D] are cut by experts and rows, down [E, D, F] by the same axes of experts and inputs."""
    by_expert, by_input, by_width = specs[f"{experts}.down_proj"]
    expected = (by_expert, (), by_width) if parameter.path.endswith("down_proj") else (by_expert, by_width, ())
    if specs[parameter.path] == expected and not by_input:
        return
    findings.add_path(
        choices.by_path[parameter.path].shard_mark,
        f"{{path}} is cut {_show(specs[parameter.path])}, down_proj {_show((by_expert, by_input, by_width))}: experts "
        "are cut alike, gate and up [E, F, D] as `[e, f]`, down [E, D, F] as `[e, null, f]`",
        parameter.path,
    )


def _check_operators(parameter: Parameter, experts: str, choices: Choices, findings: Findings) -> None:
    """gate, up and down are one operation."""
    mine, down = choices.by_path[parameter.path], choices.by_path[f"{experts}.down_proj"]
    if mine.ops != down.ops:
        findings.add_path(
            mine.ops_mark,
            "{path} has another operator than down_proj: a layer's experts are one operation",
            parameter.path,
        )


def _show(spec: Spec) -> str:
    names = ("null" if not axes else axes[0] if len(axes) == 1 else f"[{', '.join(axes)}]" for axes in spec)
    return f"[{', '.join(names)}]"
