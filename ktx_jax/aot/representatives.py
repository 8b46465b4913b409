# SPDX-License-Identifier: Apache-2.0
"""Layers that differ in nothing but their number need to be compiled once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ktx_jax.sharding.folding import split_layer
from ktx_jax.sharding.plan import PlacedParameter, Plan


@dataclass(frozen=True)
class Representatives:
    """A plan of which only some layers are left, and what they stand for.

    Attributes:
      stands_for: how many layers of the whole plan each layer of this one stands for, itself included.
    """

    plan: Plan
    stands_for: Mapping[int, int]

    @classmethod
    def whole(cls, plan: Plan) -> "Representatives":
        """The plan itself: every layer stands for itself alone."""
        return cls(plan, dict.fromkeys(range(plan.config.num_hidden_layers), 1))

    @classmethod
    def of(cls, plan: Plan) -> "Representatives":
        """The first layer of each kind in each stage."""
        by_layer: dict[int, list[PlacedParameter]] = {}
        for p in plan.parameters:
            layer, _ = split_layer(p.path)
            if layer is not None:
                by_layer.setdefault(layer, []).append(p)
        first: dict[Any, int] = {}
        stands_for: dict[int, int] = {}
        for stage in plan.stages:
            for layer in stage.layers:
                chosen = first.setdefault(_signature(by_layer[layer]), layer)
                stands_for[chosen] = stands_for.get(chosen, 0) + 1
        return cls(_cut(plan, stands_for), stands_for)


def _signature(parameters: list[PlacedParameter]) -> Any:
    """All of a layer that its program follows from."""
    return tuple(
        (split_layer(p.path)[1], p.shape, p.stored_type, p.stage, p.devices, p.spec, p.ops, p.prefill_device)
        for p in parameters
    )


def _cut(plan: Plan, layers: Mapping[int, int]) -> Plan:
    kept = tuple(p for p in plan.parameters if (layer := split_layer(p.path)[0]) is None or layer in layers)
    stages = tuple(replace(s, layers=tuple(layer for layer in s.layers if layer in layers)) for s in plan.stages)
    return replace(plan, parameters=kept, stages=stages)
