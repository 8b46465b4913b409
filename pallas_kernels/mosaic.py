# SPDX-License-Identifier: Apache-2.0
"""What the kernels need of Pallas on Mosaic GPU, the same under every JAX from 0.10.2 on, on a GPU or interpreted.

Interpreted, a kernel runs in the Mosaic CPU interpreter of JAX. That one knows no register layouts, no wgmma from
registers and no inline PTX, so here each such operation has a plain equivalent, used when `interpret` is true.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.heuristics import THREADS

_NEW_REFS = jax.__version_info__ >= (0, 11)
_INDEX = () if _NEW_REFS else ((),)  # of a load of a whole reference

Ref = Any
"""A reference to memory inside a kernel."""

ACCUMULATOR = plgpu.Layout.WGMMA
"""A matrix spread over a warpgroup as wgmma leaves it."""

BY_ROW = plgpu.Layout.WGMMA.reduce(1)
"""A value for each row of such a matrix, in the threads that hold the row."""


def spread(size: int) -> Any:
    """How a row of `size` values, a multiple of `THREADS`, lies in a warpgroup: up to four neighbours a thread."""
    each = size // THREADS
    return plgpu.Layout.WG_STRIDED((size,), vec_size=next(n for n in (4, 2, 1) if each % n == 0))


def kernel(
    body: Callable,
    *,
    interpret: bool,
    out_type: Any,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    scratch_types: Any,
    warpgroups: int = 1,
    reduction_scratch_bytes: int = 0,
) -> Callable:
    """A Mosaic GPU kernel in lane semantics whose barriers are all written out; axis "wg" names its warpgroups.

    An operand may be a reference (`mutable`): the kernel may write to it. (`plgpu.kernel` takes none.)
    """
    threads = {"num_threads": warpgroups, "thread_name": "wg"} if warpgroups > 1 else {}
    mesh = plgpu.Mesh(grid=grid, grid_names=grid_names, **threads)
    params = plgpu.CompilerParams(
        approx_math=True,
        unsafe_no_auto_barriers=True,
        reduction_scratch_bytes=reduction_scratch_bytes,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
    )

    def with_scratch(*refs: Ref) -> None:
        together = {"collective_axes": "wg"} if threads else {}
        pl.run_scoped(lambda *scratch: body(*refs, *scratch), *scratch_types, **together)

    outs = tuple(out_type) if isinstance(out_type, list | tuple) else (out_type,)
    call: Any = pl.kernel(
        with_scratch,
        out_type=outs,
        mesh=mesh,
        compiler_params=params,
        interpret=interpreter_params() if interpret else False,
    )
    return call if isinstance(out_type, list | tuple) else lambda *operands: call(*operands)[0]


def mutable(x: jax.Array) -> Ref:
    """A reference to what x holds, for a kernel to change; `jax.freeze` gives what it holds in the end.

    XLA lets it lie where x does, if x is not used afterwards.
    """
    return jax.new_ref(x, memory_space=plgpu.GMEM)


def interpreter_params() -> Any:
    """Parameters that make a kernel run in the CPU interpreter.

    Raises `NotImplementedError` where this JAX has no such interpreter.
    """
    try:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    except ImportError as error:
        raise NotImplementedError(f"JAX {jax.__version__} has no interpreter for Mosaic GPU kernels") from error
    return InterpretGPUParams()


def tiling(columns: int) -> tuple[Any, ...]:
    """Shared memory transforms of bfloat16 rows that wgmma reads `columns` at a time: 16, 32 or 64."""
    return (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns))


def staging(dtype: Any) -> tuple[Any, ...]:
    """Shared memory transforms of rows for `store_transposed`, without bank conflicts."""
    return (plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128))


def load(ref: Ref, layout: Any, interpret: bool) -> jax.Array:
    """A shared memory reference as registers in `layout`."""
    if interpret:
        return ref[...]
    read: Any = plgpu.load
    return read(ref, *_INDEX, layout=layout, optimized=False)


def laid_out(x: jax.Array, layout: Any, interpret: bool) -> jax.Array:
    """x in `layout`."""
    return x if interpret else plgpu.layout_cast(x, layout)


def along_rows(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """A value a row (`BY_ROW`), against a matrix."""
    return lax.broadcast_in_dim(x, shape, (0,))


def zeros(shape: tuple[int, int], interpret: bool) -> jax.Array:
    """A float32 accumulator of zeros."""
    return laid_out(jnp.zeros(shape, jnp.float32), ACCUMULATOR, interpret)


def ones(shape: tuple[int, int], interpret: bool) -> jax.Array:
    """A matrix of ones, bfloat16."""
    return laid_out(jnp.ones(shape, jnp.bfloat16), ACCUMULATOR, interpret)


def indices(size: int, layout: Any, interpret: bool) -> jax.Array:
    """0, 1, ..., int32 `[size]` in `layout`."""
    if interpret:
        return lax.iota(jnp.int32, size)
    return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)


def columns(shape: tuple[int, int], interpret: bool) -> jax.Array:
    """The column of each element of a matrix, int32."""
    if interpret:
        return lax.broadcasted_iota(jnp.int32, shape, 1)
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=ACCUMULATOR)


def rows(shape: tuple[int, int], interpret: bool) -> jax.Array:
    """The row of each element of a matrix, int32."""
    if interpret:
        return lax.broadcasted_iota(jnp.int32, shape, 0)
    return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=ACCUMULATOR)


def transposed(ref: Ref) -> Ref:
    """A matrix in shared memory, seen with its axes exchanged."""
    return ref.T if _NEW_REFS else plgpu.transpose_ref(ref, (1, 0))


def products(pairs: Sequence[tuple[Any, Any]], columns: int, interpret: bool) -> tuple[jax.Array, ...]:
    """a · bᵀ for each pair, float32 `[64, columns]`; a in registers or shared memory, b in shared memory."""
    if interpret:
        return tuple(jnp.dot(a[...], b[...].T, preferred_element_type=jnp.float32) for a, b in pairs)

    def start(*sums: Any) -> tuple[jax.Array, ...]:
        for total, (a, b) in zip(sums, pairs, strict=True):
            plgpu.wgmma(total, a, transposed(b))
        plgpu.wgmma_wait(0)
        return tuple(total[...] for total in sums)

    return pl.run_scoped(start, *[plgpu.WGMMAAccumulatorRef((64, columns), jnp.float32)] * len(pairs))


def sum_of_products(pairs: Sequence[tuple[Any, Any]], columns: int, interpret: bool) -> jax.Array:
    """The sum of a · bᵀ over the pairs, float32 `[64, columns]`; both in shared memory."""
    if interpret:
        parts = products(pairs, columns, interpret)
        return sum(parts[1:], parts[0])

    def start(total: Any) -> jax.Array:
        for a, b in pairs:
            plgpu.wgmma(total, a, transposed(b))
        plgpu.wgmma_wait(0)
        return total[...]

    return pl.run_scoped(start, plgpu.WGMMAAccumulatorRef((64, columns), jnp.float32))


def accumulate(total: Any, a: jax.Array, b: Any, interpret: bool) -> Any:
    """Starts total += a · bᵀ; a bfloat16 `[64, K]` in registers, b in shared memory. Wait with `wgmma_wait`."""
    if interpret:
        return total + jnp.dot(a, b[...].T, preferred_element_type=jnp.float32)
    plgpu.wgmma(total, a, transposed(b))
    return total


def accumulate_onto(total: Any, a: Any, b: Any, interpret: bool) -> Any:
    """Starts total += a · b, both bfloat16 in shared memory. Wait with `wgmma_wait`."""
    if interpret:
        return total + jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)
    plgpu.wgmma(total, a, b)
    return total


def accumulated(total: jax.Array, a: Any, b: Any, interpret: bool) -> jax.Array:
    """total + a · b; a in registers or shared memory, b in shared memory."""
    if interpret:
        return total + jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)
    sums: Any = plgpu.WGMMAAccumulatorRef.init(total)
    return pl.run_state(lambda sums: plgpu.wgmma(sums, a, b))(sums)


def keep_registers(count: int, more: bool, interpret: bool) -> None:
    """Gives up or asks for registers, so that a thread of this warpgroup has `count`."""
    if not interpret:
        plgpu.set_max_registers(count, action="increase" if more else "decrease")


def wgmma_wait(pending: int, interpret: bool) -> None:
    """Waits until at most `pending` products started by this warpgroup are under way."""
    if not interpret:
        plgpu.wgmma_wait(pending)


def with_sums(run: Callable, finish: Callable, shape: tuple[int, int], count: int, interpret: bool) -> None:
    """Runs a pipeline whose carry is `count` accumulators for `accumulate`, then `finish` of their values."""
    if interpret:
        finish(*run(tuple(jnp.zeros(shape, jnp.float32) for _ in range(count))))
        return

    def scope(*sums: Any) -> tuple[jax.Array, ...]:
        run(sums)
        return tuple(total[...] for total in sums)

    finish(*pl.run_scoped(scope, *[plgpu.WGMMAAccumulatorRef(shape, jnp.float32)] * count))


def store_transposed(ref: Ref, x: jax.Array, interpret: bool) -> None:
    """Stores an accumulator's values `[64, M]` as `[M, 64]`."""
    if interpret:
        ref[...] = x.T
    else:
        ref.T[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)


def joined(parts: Sequence[jax.Array], interpret: bool) -> jax.Array:
    """Matrices side by side, each in the layout of an accumulator."""
    if len(parts) == 1:
        return parts[0]
    if interpret:
        return jnp.concatenate(parts, axis=1)

    from pallas_kernels.ptx import joined as inline

    return inline(parts)


def plane_layout(rows: int) -> Any:
    """How a warpgroup loads a tile's plane of `rows` x 64 words: vectors of up to four words a thread."""
    return plgpu.Layout.WG_STRIDED((rows, 64), vec_size=min(rows // 2, 4))


def warpgroup_barrier(interpret: bool) -> None:
    """Waits until every thread of this warpgroup is here: after reads of a buffer that a copy will overwrite."""
    if not interpret:

        @plgpu.inline_mgpu()
        def barrier(_: Any) -> None:
            mgpu.utils.warpgroup_barrier()

        barrier()  # type: ignore[call-arg]  # the context is given by what decorates it


def pairs_swapped(x: jax.Array, interpret: bool) -> jax.Array:
    """A `spread` row with values 2i and 2i + 1 exchanged."""
    if interpret:
        return x.reshape(-1, 2)[:, ::-1].reshape(-1)

    from pallas_kernels.ptx import pairs_swapped as inline

    return inline(x)


def float16_field(words: jax.Array, half: int, interpret: bool) -> jax.Array:
    """The low (0) or high (1) 16 bits of int32 words `BY_ROW`, as a float16 number, in float32."""
    if interpret:
        bits = lax.shift_right_logical(words, 16 * half) & 0xFFFF
        return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16).astype(jnp.float32)

    from pallas_kernels.ptx import float16_field as inline

    return inline(words, half)
