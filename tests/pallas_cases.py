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
