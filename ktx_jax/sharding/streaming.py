# SPDX-License-Identifier: Apache-2.0
"""Routed experts that live on the host, and are brought to their layer's device while a long prompt is prefilled."""

from dataclasses import dataclass
from typing import Any

from flax import nnx

from ktx_jax.model.config import Config
from ktx_jax.model.modules import Experts
from ktx_jax.sharding.layout import Layout
from ktx_jax.sharding.reader import Reader
from ktx_jax.sharding.sources import Source

NAMES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, eq=False)
class StreamedExperts:
    """One layer's experts as they are on the device: their graph, and where the file has them."""

    graphdef: Any
    state: Any  # abstract
    items: dict[str, tuple[Layout, Source]]
    reader: Reader

    def read(self) -> Any:
        """The experts' state, straight from the mapped file: the device has it as long as the caller does."""
        leaves = {name: self.reader.read(*self.items[name]) for name in NAMES}
        filled = [(key, leaf.replace(leaves[str(key[0])])) for key, leaf in nnx.to_flat_state(self.state)]
        return nnx.from_flat_state(filled)


def streamed_experts(config: Config, items: dict[str, tuple[Layout, Source]], reader: Reader) -> StreamedExperts:
    """What streams a layer's experts; `items` has the layout and the source of gate_proj, up_proj and down_proj."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Experts(config, nnx.Rngs(0))))
    return StreamedExperts(graphdef, state, items, reader)
