# SPDX-License-Identifier: Apache-2.0
"""ktransformers' rules as a native file that places the same things in the same places."""

from collections.abc import Iterable

from ktx_jax.model.config import Config
from ktx_jax.sharding.choices import Ops
from ktx_jax.sharding.devices import HOST
from ktx_jax.sharding.folding import split_layer
from ktx_jax.sharding.plan import Plan, Stage
from ktx_jax.sharding.rules import Rules
from ktx_jax.sharding.write_native import (
    kinds_pattern,
    layers_pattern,
    native_text,
    ops_value,
    rule,
    stages_line,
)


def convert_ktransformers(rules: Rules, config: Config) -> str:
    """The text of a native rule file with the placement and operators that `rules` give the model of `config`.

    Raises:
      RulesError: the rules contradict themselves, or do not suit the model.
    """
    plan = Plan.from_rules(config, rules)
    header = [stages_line([stage.devices for stage in plan.stages])]
    if plan.prefill_threshold is not None and any(p.prefill_device for p in plan.parameters):
        header.append(f"prefill_threshold: {plan.prefill_threshold}")
    comments = [f"Converted from {rules.name} for a model of {config.num_hidden_layers} layers.", *plan.notices]
    return native_text(comments, header, [*_apart(plan), *_stages(plan), *_operators(plan)])


def _device(devices: tuple[str, ...], prefill: str | None) -> object:
    return devices[0] if prefill is None else {"decode": devices[0], "prefill": prefill}


def _apart(plan: Plan) -> list[str]:
    """Experts and other modules on the host, by where they are prefilled; experts that stay but are streamed."""
    others = [p for p in plan.parameters if split_layer(p.path)[0] is None and plan.is_apart(p)]
    lines = [rule(p.path.replace(".", r"\."), device=_device((HOST,), p.prefill_device)) for p in others]
    mains = {split_layer(p.path)[0]: p for p in plan.parameters if p.path.endswith(".self_attn.o_proj")}
    experts: dict[tuple[tuple[str, ...], str | None], list[int]] = {}
    for p in plan.parameters:
        layer, kind = split_layer(p.path)
        if layer is None or not kind.startswith("mlp.experts."):
            continue
        if plan.is_apart(p) or p.prefill_device != mains[layer].prefill_device:
            experts.setdefault((p.devices, p.prefill_device), []).append(layer)
    for (devices, prefill), layers in experts.items():
        lines.append(rule(layers_pattern(layers, r"mlp\.experts\..*"), device=_device(devices, prefill)))
    return lines


def _stages(plan: Plan) -> list[str]:
    by_path = {p.path: p for p in plan.parameters}
    lines = []
    for index, stage in enumerate(plan.stages):
        others = [path.replace(".", r"\.") for path in stage.others if not plan.is_apart(by_path[path])]
        for prefill, layers in _streams(plan, stage).items():
            before = [path for path in others if path.endswith("embed_tokens")]
            after = [path for path in others if path not in before]
            if prefill is not None:
                lines.append(rule(layers_pattern(layers), device=_device(stage.devices, prefill)))
                continue
            lines.append(rule("|".join([*before, layers_pattern(layers), *after]), stage=index))
            others = []
        if others:
            lines.append(rule("|".join(others), stage=index))
    return lines


def _streams(plan: Plan, stage: Stage) -> dict[str | None, list[int]]:
    """The stage's layers by the device to which they are streamed."""
    found: dict[str | None, list[int]] = {}
    prefill = {p.path: p.prefill_device for p in plan.parameters}
    for layer in stage.layers:
        found.setdefault(prefill[f"model.layers.{layer}.self_attn.o_proj"], []).append(layer)
    return found


def _operators(plan: Plan) -> list[str]:
    """Rules for operators: one for each, and each set of layers that it has."""
    layers_of: dict[tuple[Ops, str], list[int]] = {}
    everywhere: dict[str, set[int]] = {}
    lines = []
    for p in plan.parameters:
        layer, kind = split_layer(p.path)
        if layer is not None:
            everywhere.setdefault(kind, set()).add(layer)
        if p.ops == Ops():
            continue
        if layer is None:
            lines.append(rule(p.path.replace(".", r"\."), op=ops_value(p.ops)))
        else:
            layers_of.setdefault((p.ops, kind), []).append(layer)
    groups: dict[tuple[Ops, tuple[int, ...] | None], list[str]] = {}
    for (ops, kind), layers in layers_of.items():
        everywhere_it_is = set(layers) == everywhere[kind]
        groups.setdefault((ops, None if everywhere_it_is else tuple(layers)), []).append(kind)
    for (ops, layers), kinds in groups.items():
        lines.append(rule(_pattern(layers, kinds), op=ops_value(ops)))
    return lines


def _pattern(layers: Iterable[int] | None, kinds: list[str]) -> str:
    return (
        rf"model\.layers\.\d+\.{kinds_pattern(kinds)}"
        if layers is None
        else layers_pattern(layers, kinds_pattern(kinds))
    )
