# SPDX-License-Identifier: Apache-2.0
"""What `gpu.py` runs: each kernel against its reference, and at the sizes of models. Imported after its settings."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import gpu_prompts as prompts
import jax
import jax.numpy as jnp
import numpy as np
from gpu_model import random_weight

from pallas_kernels.formats import FORMATS
from pallas_kernels.grouped_matmul import gated_matmul, grouped_mlp, grouped_mlp_reference
from pallas_kernels.latents import write_latents, write_latents_reference
from pallas_kernels.mla_attention import mla_attention, mla_attention_reference
from pallas_kernels.parts import total_of
from pallas_kernels.quantized_matmul import (
    batched_matmul,
    quantized_matmul,
    quantized_matmul_reference,
)
from pallas_kernels.rms_norm import add_rms_norm, add_rms_norm_reference
from pallas_kernels.router import choose_experts, choose_experts_reference

# Runs of a kernel that must agree to the bit: what is read before it is there, or written too early, differs.
RUNS_ALIKE = 20


@dataclass(frozen=True)
class Check:
    """A kernel against the reference. `make` gives operands from a key."""

    name: str
    kernel: Callable
    reference: Callable
    make: Callable[[jax.Array], tuple]
    tolerance: float

    def error(self) -> float:
        """The largest error over the largest value; infinite where runs differ."""
        operands, kernel = self.make(jax.random.key(1)), jax.jit(self.kernel)
        first = kernel(*operands)
        if not all(bool(jnp.array_equal(first, kernel(*operands))) for _ in range(RUNS_ALIKE - 1)):
            return float("inf")
        got, want = (np.asarray(a, np.float64) for a in (first, jax.jit(self.reference)(*operands)))
        return float(np.abs(got - want).max() / np.abs(want).max())


@dataclass(frozen=True)
class Timing:
    """A kernel at a model's size: the bytes it must read and write, the operations it must do."""

    name: str
    kernel: Callable
    make: Callable[[jax.Array], tuple]
    read: float
    operations: float


def _rows(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def _matmul_operands(name: str, rows: int, n: int, k: int, key: jax.Array) -> tuple:
    keys = jax.random.split(key)
    return _rows(keys[0], rows, k), random_weight(keys[1], name, (n, k))


def _experts_operands(names: tuple[str, str], tokens: int, e: int, width: int, d: int, k: int, key: jax.Array) -> tuple:
    keys = jax.random.split(key, 6)
    ids = jax.vmap(lambda key: jax.random.permutation(key, e)[:k])(jax.random.split(keys[0], tokens))
    weights = jax.random.uniform(keys[1], (tokens, k))
    gate, up = (random_weight(key, names[0], (e, width, d)) for key in keys[2:4])
    down = random_weight(keys[4], names[1], (e, d, width))
    return _rows(keys[5], tokens, d) * jnp.bfloat16(0.1), ids.astype(jnp.int32), weights, gate, up, down


def _attention_operands(tokens: int, tile: int, heads: int, positions: int, page: int, key: jax.Array) -> tuple:
    batch, each = tokens // tile, positions // page
    keys = jax.random.split(key, 4)
    pages = jax.lax.bitcast_convert_type(_rows(keys[0], batch * each, page, 576), jnp.uint16)
    table = jax.random.permutation(keys[1], batch * each).reshape(batch, each).astype(jnp.int32)
    sequence = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), tile)
    at = positions - tile + jnp.tile(jnp.arange(tile, dtype=jnp.int32), batch)
    queries = [_rows(keys[2], tokens, heads, 512) * 0.3, _rows(keys[3], tokens, heads, 64) * 0.3]
    return *(q.astype(jnp.bfloat16) for q in queries), pages, table, sequence, at


def _one_hot_operands(name: str, rows: int, n: int, k: int, key: jax.Array) -> tuple:
    x, weight = _matmul_operands(name, rows, n, k, key)
    return jax.nn.one_hot(jax.random.permutation(key, k)[:rows], k, dtype=x.dtype), weight


def _head_operands(name: str, tokens: int, heads: int, n: int, k: int, key: jax.Array) -> tuple:
    return _rows(key, tokens, heads, k), random_weight(key, name, (heads, n, k))


def _gated_operands(name: str, tokens: int, width: int, d: int, key: jax.Array) -> tuple:
    keys = jax.random.split(key, 3)
    gate, up = (random_weight(key, name, (width, d)) for key in keys[:2])
    return _rows(keys[2], tokens, d), gate, up


def _gated_reference(x: jax.Array, gate: jax.Array, up: jax.Array, name: str) -> jax.Array:
    return jax.nn.silu(quantized_matmul_reference(x, gate, name)) * quantized_matmul_reference(x, up, name)


def _of_other_devices(make: Callable[[jax.Array], tuple]) -> Callable[[jax.Array], tuple]:
    """Routed experts of which some are not here."""

    def operands(key: jax.Array) -> tuple:
        x, ids, *rest = make(key)
        return x, ids - 1, *rest

    return operands


def _ragged_operands(tokens: int, heads: int, positions: int, page: int, key: jax.Array) -> tuple:
    """Sequences of any length, one of none, with NaN beyond their last positions."""
    *queries, pages, table, sequence, _ = _attention_operands(tokens, 1, heads, positions, page, key)
    last = jax.random.randint(key, tokens, 0, positions).at[-1].set(-1)
    beyond = (jnp.arange(positions) > last[:, None]).reshape(*table.shape, page, 1)
    return *queries, pages.at[table].set(jnp.where(beyond, jnp.uint16(0x7FFF), pages[table])), table, sequence, last


def checks() -> Iterator[Check]:
    for name in FORMATS:
        for rows, dtype, tolerance in ((5, jnp.float32, 1e-5), (16, jnp.float32, 1e-5), (300, jnp.bfloat16, 1e-2)):
            yield Check(
                f"matmul {name}, {rows} rows",
                partial(quantized_matmul, name=name, dtype=dtype),
                partial(quantized_matmul_reference, name=name),
                partial(_matmul_operands, name, rows, 1472, 2816),
                tolerance,
            )
    for names in (("Q4_K", "Q6_K"), ("Q4_K", "Q5_0"), ("IQ4_XS", "IQ4_XS")):
        for tokens in (1, 13, 200):
            yield Check(
                f"experts {'/'.join(names)}, {tokens} tokens",
                partial(grouped_mlp, names=names),
                partial(grouped_mlp_reference, names=names),
                partial(_experts_operands, names, tokens, 8, 512, 768, 3),
                2e-2,
            )
    for tokens, tile, heads, positions, page in ((3, 1, 16, 1000, 8), (4, 1, 128, 2048, 64), (64, 16, 16, 1024, 16)):
        yield Check(
            f"attention, {tokens} tokens by {tile}, {heads} heads",
            partial(mla_attention, scale=0.1, tile=tile),
            partial(mla_attention_reference, scale=0.1),
            partial(_attention_operands, tokens, tile, heads, positions, page),
            1e-2,
        )
    for tokens, positions, heads in ((144, 144, 16), (304, 2400, 4)):
        make = prompts.make(tokens, positions, heads)
        name = f"attention of prompts, {tokens} tokens of {positions}, {heads} heads"
        yield Check(name, prompts.expanded, prompts.reference, make, 2e-2)
    yield from _harder_checks()
    yield from row_checks()


def _harder_checks() -> Iterator[Check]:
    """What the ones before do not see: weights one by one, other tiles, what must be left out, many blocks at once."""
    for name in FORMATS:
        yield Check(
            f"matmul {name}, its weights to the bit",
            partial(quantized_matmul, name=name),
            partial(quantized_matmul_reference, name=name, dtype=jnp.bfloat16),
            partial(_one_hot_operands, name, 256, 1472, 2816),
            0.0,
        )
    for name, rows, n, k in (("Q4_K", 40, 192, 2816), ("Q6_K", 100, 192, 2816), ("Q4_K", 2048, 12288, 5120)):
        yield Check(
            f"matmul {name} {n} x {k}, {rows} rows",
            partial(quantized_matmul, name=name),
            partial(quantized_matmul_reference, name=name),
            partial(_matmul_operands, name, rows, n, k),
            1e-2,
        )
    yield Check(
        "matmul Q4_K 12288 x 5120, 16 rows",
        partial(quantized_matmul, name="Q4_K", dtype=jnp.float32),
        partial(quantized_matmul_reference, name="Q4_K"),
        partial(_matmul_operands, "Q4_K", 16, 12288, 5120),
        1e-5,
    )
    for tokens in (3, 40):
        yield Check(
            f"a matmul a head Q5_0, {tokens} rows",
            partial(batched_matmul, name="Q5_0"),
            lambda x, w: jax.vmap(partial(quantized_matmul_reference, name="Q5_0"), (1, 0), 1)(x, w),
            partial(_head_operands, "Q5_0", tokens, 16, 512, 128),
            1e-2,
        )
        yield Check(
            f"gated matmul Q4_K, {tokens} rows",
            partial(gated_matmul, name="Q4_K"),
            partial(_gated_reference, name="Q4_K"),
            partial(_gated_operands, "Q4_K", tokens, 1472, 2816),
            1e-2,
        )
    names = ("Q4_K", "Q6_K")
    for tokens, e, width, d in ((1, 8, 512, 768), (13, 8, 512, 768), (200, 8, 512, 768), (64, 32, 1536, 5120)):
        yield Check(
            f"experts {'/'.join(names)}, some elsewhere, {tokens} tokens",
            partial(grouped_mlp, names=names),
            partial(grouped_mlp_reference, names=names),
            _of_other_devices(partial(_experts_operands, names, tokens, e, width, d, 3)),
            2e-2,
        )
    for what, operands in (
        ("12 sequences of any length", partial(_ragged_operands, 12, 128, 1000, 8)),
        ("160 tokens, one range", partial(_attention_operands, 160, 1, 128, 1024, 64)),
    ):
        yield Check(
            f"attention, {what}",
            partial(mla_attention, scale=0.1),
            partial(mla_attention_reference, scale=0.1),
            operands,
            1e-2,
        )


def _norm_operands(rows: int, width: int, splits: int, key: jax.Array) -> tuple:
    keys = jax.random.split(key, 3)
    summands = jax.random.normal(keys[1], (splits, rows, width), jnp.float32)
    return _rows(keys[0], rows, width), summands, jax.random.uniform(keys[2], (width,), jnp.float32, 0.5, 2.0)


def _norm(add: Callable, x: jax.Array, summands: jax.Array, weight: jax.Array) -> jax.Array:
    """The sum of x and a product in parts, and its norm, side by side."""
    return jnp.concatenate(add(x, total_of(summands), weight, 1e-6), axis=1)


def _latents_operands(rows: int, splits: int, key: jax.Array) -> tuple:
    keys = jax.random.split(key, 4)
    angles = jax.random.uniform(keys[0], (rows, 32), jnp.float32, 0.0, 6.0)
    pages = jax.lax.bitcast_convert_type(_rows(keys[1], 1 + rows // 64, 64, 576), jnp.uint16)
    summands = jax.random.normal(keys[2], (splits, rows, 576), jnp.float32)
    places = jax.random.permutation(keys[3], 64 * (1 + rows // 64))[:rows].astype(jnp.int32)
    places = places.at[rows // 2].set(places[0] if rows == 1 else -1)  # one is padding
    return pages, summands, jnp.ones(512), jnp.cos(angles), jnp.sin(angles), places


def _latents(write: Callable, pages: jax.Array, summands: jax.Array, weight: jax.Array, *rest: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(write(pages, total_of(summands), weight, 1e-6, *rest), jnp.bfloat16)


def _router_operands(rows: int, experts: int, key: jax.Array) -> tuple:
    """Logits in steps of a half: many are equal."""
    logits = jnp.round(jax.random.normal(key, (rows, experts), jnp.float32) * 4) / 2
    return logits, jnp.arange(rows) % 3 != 1


def _router(choose: Callable, experts: int, logits: jax.Array, live: jax.Array) -> jax.Array:
    groups, kept = (8, 3) if experts == 160 else (1, 1)
    choice = {"experts": 6, "groups": groups, "kept_groups": kept, "normalized": False, "scale": 16.0}
    ids, weights = choose(logits, live, **choice)
    return jnp.concatenate([ids.astype(jnp.float32), weights], axis=1)


def row_checks() -> Iterator[Check]:
    """Of the kernels whose blocks have a row each."""
    for width, splits in ((5120, 8), (1536, 10), (2048, 4)):
        kernel, reference = (partial(_norm, add) for add in (add_rms_norm, add_rms_norm_reference))
        yield Check(f"norm of {width}", kernel, reference, partial(_norm_operands, 5, width, splits), 1e-2)
    kernel, reference = (partial(_latents, write) for write in (write_latents, write_latents_reference))
    yield Check("latents", kernel, reference, partial(_latents_operands, 5, 10), 1e-2)
    for experts in (160, 64):
        kernel, reference = (partial(_router, f, experts) for f in (choose_experts, choose_experts_reference))
        yield Check(f"router of {experts}", kernel, reference, partial(_router_operands, 70, experts), 1e-6)


def row_timings() -> Iterator[Timing]:
    """Bytes and operations are next to nothing: what counts is how long the shortest kernel takes."""
    for rows in (1, 64, 512):
        for width, splits in ((5120, 8), (1536, 10), (2048, 4)):
            make = partial(_norm_operands, rows, width, splits)
            read = rows * width * (4 * splits + 6)
            yield Timing(f"norm of {width} in {splits} parts, {rows} rows", partial(_norm, add_rms_norm), make, read, 0)
        make = partial(_latents_operands, rows, 10)
        yield Timing(f"latents, {rows} rows", partial(_latents, write_latents), make, rows * 576 * 42, 0)
        for experts in (160, 64):
            make = partial(_router_operands, rows, experts)
            choose = partial(_router, choose_experts, experts)
            yield Timing(f"router of {experts}, {rows} rows", choose, make, rows * experts * 4, 0)


def timings() -> Iterator[Timing]:
    yield from row_timings()
    for name in FORMATS:
        for n, k in ((12288, 5120), (5120, 12288)) if name == "Q4_K" else ((12288, 5120),):
            weight = 4 * np.prod(FORMATS[name].record_shape((n, k)))
            for rows in (1, 16, 4096):
                read = weight + 2 * rows * (n + k)
                call = partial(quantized_matmul, name=name)
                make = partial(_matmul_operands, name, rows, n, k)
                yield Timing(f"matmul {name} {n} x {k}, {rows} rows", call, make, read, 2.0 * rows * n * k)
    names, e, width, d, k = ("Q4_K", "Q6_K"), 160, 1536, 5120, 6
    gate, down = (4 * np.prod(FORMATS[f].record_shape(s)) for f, s in zip(names, ((width, d), (d, width)), strict=True))
    for tokens in (1, 8, 64, 512, 4096):
        touched = e * (1 - (1 - k / e) ** tokens)  # distinct experts, on average
        read = touched * (2 * gate + down) + 2 * tokens * d * (k + 1)
        make = partial(_experts_operands, names, tokens, e, width, d, k)
        operations = 2.0 * tokens * k * 3 * width * d
        yield Timing(f"experts of V2.5, {tokens} tokens", partial(grouped_mlp, names=names), make, read, operations)
    for tokens, tile, heads, positions in (
        (1, 1, 128, 4096),
        (8, 1, 128, 32768),
        (64, 1, 128, 4096),
        (64, 1, 16, 4096),
        (512, 16, 128, 4096),
    ):
        read = tokens // tile * positions * 1152 + tokens * heads * (576 * 2 + 512 * 4)
        call = partial(mla_attention, scale=0.1, tile=tile)
        make = partial(_attention_operands, tokens, tile, heads, positions, 64)
        operations = 2.0 * tokens * heads * positions * (576 + 512)
        name = f"attention, {tokens} tokens by {tile}, {heads} heads, {positions} cached"
        yield Timing(name, call, make, read, operations)
    yield from _prompt_timings()


def _prompt_timings() -> Iterator[Timing]:
    """Expanded attention whole, and its keys and values alone."""
    product = 2.0 * 128 * 512
    for heads in (128, 16):
        weights = sum(4 * np.prod(FORMATS[f].record_shape((heads, 512, 128))) for f in prompts.NAMES)
        for tokens, positions in ((512, 512), (2048, 2048), (512, 4096)):
            seen = tokens * (positions - tokens / 2)
            operations = heads * (2 * product * positions + 2.0 * (192 + 128) * seen)
            read = weights + positions * 1152 + 2 * tokens * heads * (192 + 128) + 4 * 512 * positions * heads
            name = f"attention of prompts, {tokens} tokens of {positions}, {heads} heads"
            yield Timing(name, prompts.expanded, prompts.make(tokens, positions, heads), read, operations)
        read = weights + 2048 * 1024 + 2048 * heads * 512
        make = partial(prompts.expand_operands, 2048, heads)
        name = f"keys and values of 2048 positions, {heads} heads"
        yield Timing(name, prompts.expand_all, make, read, heads * 2 * product * 2048)
