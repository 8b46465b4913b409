# SPDX-License-Identifier: Apache-2.0
"""What the tests of the GPU kernels share: JAX's CPU interpreter of Mosaic kernels, and random packed weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import FORMATS
from pallas_kernels.pack import pack


@contextmanager
def interpreter() -> Iterator[None]:
    """A pretended GPU of two multiprocessors, with the interpreter in its initial state."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    interpret_pallas_call.gpu_callbacks.reset_gpu_interpret_mode_state()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=2)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield


def random_blocks(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Blocks of any bits, but for scales: those are finite and small. BF16: normal values."""
    fmt = FORMATS[name]
    *lead, n, k = shape
    if name == "BF16":
        return rng.standard_normal(shape).astype(jnp.bfloat16)[..., None].view(np.uint8)
    blocks = rng.integers(0, 256, (*lead, n, k // fmt.block, fmt.block_bytes), dtype=np.uint8)
    for at in (0, 2) if fmt.minima else (208,) if name == "Q6_K" else (0,):
        scales = rng.uniform(0.001, 0.01, blocks.shape[:-1]).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks


def random_records(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> jax.Array:
    """Records of a random weight."""
    return pack(random_blocks(name, shape, rng), name)


def random_rows(shape: tuple[int, ...], rng: np.random.Generator) -> jax.Array:
    """Normal bfloat16 values."""
    return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)


def relative_error(out: jax.Array, reference: jax.Array) -> float:
    """The largest error over the largest value."""
    a, b = np.asarray(out, np.float64), np.asarray(reference, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def attention_case(heads, page, blocks, tile, positions, seed, *, bits=True):
    """Sequences in order, a run of `tile` tokens each; all beyond their last positions is NaN, as are unused pages."""
    rng = np.random.default_rng(seed)
    tokens, batch = len(positions), len(positions) // tile
    pages = np.full((batch * blocks + 1, page, 576), np.nan, jnp.bfloat16)
    table = rng.permutation(batch * blocks + 1)[: batch * blocks].reshape(batch, blocks).astype(np.int32)
    sequence = np.repeat(np.arange(batch, dtype=np.int32), tile)
    for row in range(batch):
        length = max(positions[row * tile : (row + 1) * tile]) + 1
        for at in range(length):
            pages[table[row, at // page], at % page] = rng.standard_normal(576)
    queries = [random_rows((tokens, heads, width), rng) * jnp.bfloat16(0.3) for width in (512, 64)]
    cache = jnp.asarray(pages)
    if bits:
        cache = jax.lax.bitcast_convert_type(cache, jnp.uint16)
    return *queries, cache, jnp.asarray(table), jnp.asarray(sequence), jnp.asarray(positions, jnp.int32)


def experts_case(tokens, experts, k, d, width, names, seed):
    """Operands of `grouped_mlp`; a tenth of the pairs has no expert."""
    rng = np.random.default_rng(seed)
    gate, up = (random_records(names[0], (experts, width, d), rng) for _ in range(2))
    down = random_records(names[1], (experts, d, width), rng)
    ids = np.stack([rng.choice(experts, k, replace=False) for _ in range(tokens)]).astype(np.int32)
    ids[rng.random(ids.shape) < 0.1] = -1
    weights = rng.uniform(0.1, 1, (tokens, k)).astype(np.float32)
    x = random_rows((tokens, d), rng) * jnp.bfloat16(0.1)
    return x, jnp.asarray(ids), jnp.asarray(weights), gate, up, down, names


PROMPT_TYPES = ("Q5_0", "Q4_K")
"""Of k_b and v_b."""


def head_weights(heads, names=PROMPT_TYPES, seed=0):
    """k_b and v_b."""
    rng = np.random.default_rng(seed)
    return tuple(random_records(n, (heads, *s), rng) for n, s in zip(names, ((512, 128), (128, 512)), strict=True))


def cached_pages(lengths, page, seed=1, blocks=None):
    """Pages of sequences so long, in any order; all beyond their ends is NaN, as are pages that nobody uses."""
    rng = np.random.default_rng(seed)
    blocks = blocks or max(-(-max(lengths) // page), 1)
    pages = np.full((len(lengths) * blocks + 1, page, 576), np.nan, jnp.bfloat16)
    table = rng.permutation(len(pages))[:-1].reshape(len(lengths), blocks).astype(np.int32)
    for row, length in enumerate(lengths):
        for at in range(length):
            pages[table[row, at // page], at % page] = rng.standard_normal(576)
    return jax.lax.bitcast_convert_type(jnp.asarray(pages), jnp.uint16), jnp.asarray(table)


def prompt_tokens(spans, tile, padding=0):
    """Tokens start .. stop - 1 of each sequence, padded to tiles, and whole tiles of padding after them."""
    sequence, positions = [], []
    for row, (start, stop) in enumerate(spans):
        share = [*range(start, stop), *[-1] * (-(stop - start) % tile)]
        positions += share
        sequence += [row] * len(share)
    positions += [-1] * padding
    sequence += [0] * padding
    return jnp.asarray(sequence, jnp.int32), jnp.asarray(positions, jnp.int32)


def prompt_case(spans, page, heads, tile=16, padding=0, seed=2):
    """Operands of `mla_prefill`, but for where its plan is the table, the sequences and the positions."""
    rng = np.random.default_rng(seed)
    sequence, positions = prompt_tokens(spans, tile, padding)
    dead = (positions < 0)[:, None, None]
    queries = [jnp.where(dead, jnp.nan, random_rows((len(positions), heads, n), rng)) for n in (128, 64)]
    queries[0] = jnp.pad(queries[0], ((0, 0), (0, 0), (0, 64)), constant_values=jnp.nan)  # where q was rotated
    into = jnp.full((len(positions), heads, 128), 7, jnp.bfloat16)
    return (
        *queries,
        *head_weights(heads),
        PROMPT_TYPES,
        *cached_pages([stop for _, stop in spans], page),
        sequence,
        positions,
        into,
    )
