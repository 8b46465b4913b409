# SPDX-License-Identifier: Apache-2.0
"""What a plan needs of each device's memory."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ktx_jax.model.config import Config

PAGE = 64
"""Positions in a page of the cache."""
_CHUNK, _STREAMED_CHUNK = 512, 2048
CACHE_BYTES = {"bfloat16": 2, "float32": 4}
_TILES = 64 << 20  # tiles of dequantized weights and of scores, of any model


def chunk_tokens(streams: bool) -> int:
    """The most tokens of prompts in a step: more where weights are streamed for it, as they come once a step."""
    return _STREAMED_CHUNK if streams else _CHUNK


@dataclass(frozen=True)
class Need:
    """Bytes on one device.

    Attributes:
      weights: parameters that live there.
      cache: latents of all sequences.
      workspace: temporaries of the largest step; an estimate.
      streamed: room for weights that pass through while a long prompt is prefilled: two layers', one computing and one
        arriving.
    """

    weights: int = 0
    cache: int = 0
    workspace: int = 0
    streamed: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace + self.streamed

    def __add__(self, other: "Need") -> "Need":
        """Both on one device: one step runs at a time, so temporaries share their room."""
        return Need(
            self.weights + other.weights,
            self.cache + other.cache,
            max(self.workspace, other.workspace),
            max(self.streamed, other.streamed),
        )


def cache_bytes(config: Config, layers: int, context: int, batch: int, dtype: str, data: int = 1) -> int:
    """Bytes of the latent cache of `layers` layers on one device: `batch` sequences split over `data`, in whole pages.

    The latent is one for all heads, so it is repeated over the other axes.
    """
    pages = -(-batch // data) * -(-context // PAGE)
    return layers * pages * PAGE * config.latent_dim * CACHE_BYTES[dtype]


def workspace_bytes(config: Config, heads: int, context: int, batch: int, head_rows: int, chunk: int) -> int:
    """An estimate of a stage's temporaries: the activations of one layer, and the logits, in float32.

    Args:
      heads: attention heads on a device.
      head_rows: rows of the head on a device, 0 where it is another stage's.
      chunk: the most tokens of a step.
    """
    tokens = min(chunk, context * batch)
    widest = max(config.intermediate_size, config.num_experts_per_tok * config.moe_intermediate_size)
    values = 6 * config.hidden_size + 3 * heads * config.latent_dim + 2 * widest
    return 4 * (tokens * values + 2 * batch * head_rows) + _TILES


def host_workspace_bytes(config: Config, context: int, batch: int, chunk: int) -> int:
    """Activations that go to the host and come back, and what its experts compute in between."""
    tokens = min(chunk, context * batch)
    return 4 * tokens * (2 * config.hidden_size + 3 * config.num_experts_per_tok * config.moe_intermediate_size)


def sum_needs(parts: Iterable[tuple[str, Need]]) -> dict[str, Need]:
    """Needs by device; a device that several stages use has the sum."""
    needs: dict[str, Need] = {}
    for device, need in parts:
        needs[device] = needs.get(device, Need()) + need
    return needs


def show_bytes(count: int | float) -> str:
    """Bytes in decimal units, as memory makers and file sizes count them."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def mesh_size(mesh: Mapping[str, int]) -> int:
    return math.prod(mesh.values())
