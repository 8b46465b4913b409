# SPDX-License-Identifier: Apache-2.0
"""What a stage is made of: the embedding, each layer, the last norm, the head, in the order in which they compute."""

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from ktx_jax.sharding.parameters import Inventory, Parameter


@dataclass(frozen=True)
class Unit:
    """Parameters that one stage computes with, all together.

    Attributes:
      path: the module path.
      layer: its number, or None outside the layers.
    """

    path: str
    layer: int | None
    parameters: tuple[Parameter, ...]

    @cached_property
    def main(self) -> tuple[Parameter, ...]:
        """All but the routed experts, which may lie elsewhere."""
        return tuple(parameter for parameter in self.parameters if not parameter.is_expert)

    @cached_property
    def experts(self) -> tuple[Parameter, ...]:
        return tuple(parameter for parameter in self.parameters if parameter.is_expert)

    @cached_property
    def anchor(self) -> Parameter:
        """The parameter whose place is the unit's: of a layer, the attention's output."""
        return next((p for p in self.parameters if p.kind == "self_attn.o_proj"), self.parameters[0])

    @property
    def name(self) -> str:
        return self.path if self.layer is None else f"layer {self.layer}"

    @property
    def kind(self) -> str:
        return self.path if self.layer is None else "its layer"


def units(inventory: Inventory) -> list[Unit]:
    """The model's units in order."""
    found = []
    for _, group in groupby(inventory.parameters, key=lambda p: p.path if p.layer is None else p.layer):
        parameters = tuple(group)
        layer = parameters[0].layer
        path = parameters[0].path if layer is None else f"model.layers.{layer}"
        found.append(Unit(path, layer, parameters))
    return found
