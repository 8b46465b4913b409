# SPDX-License-Identifier: Apache-2.0
"""Attention of prompts on a GPU in its two forms: what `gpu.py` calls, and its table of which one pays.

`pallas_kernels.crossover.expanded_pays` chooses by counted operations and bytes. The table puts measured times of both
forms beside the counted ones, so that whoever has a GPU can set it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from gpu_model import random_weight

from pallas_kernels.crossover import attention_seconds, expanded_pays
from pallas_kernels.heuristics import LEAST_EXPANDED
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.mla_expand import expand
from pallas_kernels.mla_prefill import mla_prefill, mla_prefill_reference
from pallas_kernels.prefill_plan import POSITIONS, prefill_plan
from pallas_kernels.quantized_matmul import batched_matmul

NAMES = ("Q5_0", "Q5_0")
TILE, PAGE, SCALE = 16, 64, 0.1
HEADS = 128
GRID = tuple((c, s) for c in (128, 192, 512) for s in (c, 1024, 8192))
"""Tokens of a sequence in a step, and all of its positions."""


def prompt_operands(tokens: int, positions: int, heads: int, key: jax.Array) -> tuple:
    """The last `tokens` of a sequence of `positions`: queries, weights, pages, table, sequence, positions."""
    each = -(-positions // PAGE)
    keys = jax.random.split(key, 6)
    nope, rope = (jax.random.normal(k, (tokens, heads, n), jnp.bfloat16) for k, n in zip(keys, (128, 64), strict=False))
    k_b, v_b = (random_weight(keys[2 + i], NAMES[i], (heads, *s)) for i, s in enumerate(((512, 128), (128, 512))))
    pages = jax.random.normal(keys[4], (each, PAGE, 576), jnp.bfloat16)
    table = jax.random.permutation(keys[5], each).reshape(1, each).astype(jnp.int32)
    at = positions - tokens + jnp.arange(tokens, dtype=jnp.int32)
    pages = jax.lax.bitcast_convert_type(pages, jnp.uint16)
    return nope, rope, k_b, v_b, pages, table, jnp.zeros(tokens, jnp.int32), at


def expanded(nope: jax.Array, rope: jax.Array, k_b: jax.Array, v_b: jax.Array, pages: jax.Array, *where: Any) -> Any:
    plan = prefill_plan(*where, page=PAGE, tile=TILE, least=LEAST_EXPANDED)
    into = jnp.zeros((*nope.shape[:2], 128), jnp.bfloat16)
    return mla_prefill(nope, rope, k_b, v_b, NAMES, pages, plan, into, scale=SCALE)


def absorbed(nope: jax.Array, rope: jax.Array, k_b: jax.Array, v_b: jax.Array, *where: Any) -> jax.Array:
    mixed = mla_attention(batched_matmul(nope, k_b, NAMES[0]), rope, *where, scale=SCALE, tile=TILE)
    return batched_matmul(mixed.astype(jnp.bfloat16), v_b, NAMES[1])


def reference(nope: jax.Array, rope: jax.Array, k_b: jax.Array, v_b: jax.Array, *where: Any) -> jax.Array:
    return mla_prefill_reference(nope, rope, k_b, v_b, NAMES, *where, SCALE)


def expand_operands(positions: int, heads: int, key: jax.Array) -> tuple:
    """Latents in tiles, and weights."""
    _, _, k_b, v_b, pages, *_ = prompt_operands(TILE, positions, heads, key)
    latents = jax.lax.bitcast_convert_type(pages[..., :512], jnp.bfloat16)
    return latents.reshape(-1, POSITIONS, 512), k_b, v_b


def expand_all(latents: jax.Array, k_b: jax.Array, v_b: jax.Array) -> tuple:
    return expand(latents, jnp.zeros(latents.shape[0], jnp.int32), k_b, v_b, NAMES)


def run_crossover(words: list[str], median_seconds: Callable, say: Callable[..., None] = print) -> list[dict[str, Any]]:
    """Counted and measured times of both forms over the grid."""
    results = []
    for tokens, positions in GRID:
        name = f"crossover, {tokens} tokens of {positions}, {HEADS} heads"
        if not all(word in name for word in words):
            continue
        if not results:
            say(f"\n{'attention of prompts, microseconds':50} {'absorbed':>17} {'expanded':>17}  which pays")
            say(f"{'':50} {'counted':>8} {'took':>8} {'counted':>8} {'took':>8}  {'counted':8} took")
        sets = [prompt_operands(tokens, positions, HEADS, jax.random.key(i)) for i in range(4)]
        counted = [HEADS * float(seconds) for seconds in attention_seconds(tokens, positions)]
        took = [median_seconds(form, sets) for form in (absorbed, expanded)]
        chosen = "expanded" if expanded_pays(tokens, positions) else "absorbed"
        faster = "expanded" if took[1] < took[0] else "absorbed"
        results.append({"name": name, "counted": counted, "took": took, "chosen": chosen, "faster": faster})
        shown = [f"{1e6 * x:8.1f}" for pair in zip(counted, took, strict=True) for x in pair]
        say(f"{name:50} {' '.join(shown)}  {chosen:8} {faster}")
    return results


def make(tokens: int, positions: int, heads: int) -> Callable[[jax.Array], tuple]:
    """`prompt_operands` from a key."""
    return partial(prompt_operands, tokens, positions, heads)
