# SPDX-License-Identifier: Apache-2.0
"""Compiles the GPU kernels with the real compiler for an H200 that is not here: registers, spills, shared memory.

    python benchmarks/gpu_compile.py [--only WORD ...] [--models v2.5 lite] [--json out.json]

Needs the extra `aot`, its plugin of jax's own version; no GPU. It says nothing of speed.
"""

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path

DUMP = Path(tempfile.mkdtemp(prefix="mosaic-"))
os.environ["MOSAIC_GPU_DUMP_TO"] = str(DUMP)
os.environ["MOSAIC_GPU_DUMP_PTX"] = os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from ktx_jax.aot.target_config import target_config  # noqa: E402
from ktx_jax.sharding.targets import load_target  # noqa: E402
from pallas_kernels.formats import FORMATS  # noqa: E402
from pallas_kernels.grouped_matmul import grouped_mlp  # noqa: E402
from pallas_kernels.heuristics import LEAST_EXPANDED, SHARED_BYTES  # noqa: E402
from pallas_kernels.latents import write_latents  # noqa: E402
from pallas_kernels.mla_attention import mla_attention  # noqa: E402
from pallas_kernels.mla_prefill import mla_prefill  # noqa: E402
from pallas_kernels.parts import total_of  # noqa: E402
from pallas_kernels.prefill_plan import prefill_plan  # noqa: E402
from pallas_kernels.quantized_matmul import batched_matmul, quantized_matmul  # noqa: E402
from pallas_kernels.rms_norm import add_rms_norm, rms_norm  # noqa: E402
from pallas_kernels.router import choose_experts  # noqa: E402


@dataclass(frozen=True)
class Model:
    """The sizes that kernels see. `matrices`: name, N, K, types; `experts`: E, F, k and types of gate and down;
    `groups` of experts, and those kept; `norms`: widths, and how many parts the products in front of them come in."""

    name: str
    width: int
    heads: int
    matrices: tuple[tuple[str, int, int, tuple[str, ...]], ...]
    experts: tuple[int, int, int, tuple[tuple[str, str], ...]]
    groups: tuple[int, int]
    norms: tuple[tuple[int, int], ...]


_K_TYPES = ("Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "Q8_0")
MODELS = {
    "v2.5": Model(
        "v2.5",
        5120,
        128,
        (
            ("q_a", 1536, 5120, ("Q4_K",)),
            ("q_b", 24576, 1536, ("Q4_K",)),
            ("kv_a", 576, 5120, ("Q4_K", "Q8_0", "BF16")),
            ("o", 5120, 16384, ("Q4_K",)),
            ("dense gate", 12288, 5120, tuple(FORMATS)),
            ("dense down", 5120, 12288, _K_TYPES),
            ("shared gate", 3072, 5120, ("Q4_K",)),
            ("shared down", 5120, 3072, ("Q6_K",)),
            ("head", 102400, 5120, ("Q6_K",)),
        ),
        (160, 1536, 6, (("Q4_K", "Q6_K"), ("Q4_K", "Q4_K"), ("IQ4_XS", "IQ4_XS"), ("Q5_K", "Q8_0"))),
        (8, 3),
        ((5120, 8), (1536, 10)),
    ),
    "lite": Model(
        "lite",
        2048,
        16,
        (
            ("q", 3072, 2048, ("Q4_K",)),
            ("kv_a", 576, 2048, ("Q4_K",)),
            ("o", 2048, 2048, ("Q4_K",)),
            ("dense gate", 10944, 2048, ("Q4_K",)),
            ("dense down", 2048, 10944, ("Q5_0", "Q8_0")),
            ("shared gate", 2816, 2048, ("Q4_K",)),
            ("shared down", 2048, 2816, ("Q6_K",)),
            ("head", 102400, 2048, ("Q6_K",)),
        ),
        (64, 1408, 6, (("Q4_K", "Q5_0"), ("Q4_K", "Q8_0"))),
        (1, 1),
        ((2048, 4),),
    ),
}


@dataclass(frozen=True)
class Case:
    """A function to compile and the shapes of its operands."""

    name: str
    function: Callable
    operands: tuple


def _array(shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _records(name: str, *shape: int) -> jax.ShapeDtypeStruct:
    return _array(FORMATS[name].record_shape(shape), jnp.int32)


def cases(model: Model) -> Iterator[Case]:
    """Every kernel at a model's shapes."""
    for what, n, k, types in model.matrices:
        for name in types:
            for rows in (1, 12, 16, 64, 512):
                if what == "head" and rows == 512:
                    continue
                call = partial(quantized_matmul, name=name, dtype=jnp.float32 if what == "head" else jnp.bfloat16)
                operands = (_array((rows, k)), _records(name, n, k))
                yield Case(f"{model.name} {what} {name}, {rows} rows", call, operands)
    for what, n, k in (("k_b", 512, 128), ("v_b", 128, 512)):
        for rows in (1, 16, 256):
            operands = (_array((rows, model.heads, k)), _records("Q5_0", model.heads, n, k))
            yield Case(f"{model.name} {what} Q5_0, {rows} rows", partial(batched_matmul, name="Q5_0"), operands)
    experts, width, chosen, types = model.experts
    for names in types:
        for tokens in (1, 64, 256, 512, 4096):
            operands = (
                _array((tokens, model.width)),
                _array((tokens, chosen), jnp.int32),
                _array((tokens, chosen), jnp.float32),
                _records(names[0], experts, width, model.width),
                _records(names[0], experts, width, model.width),
                _records(names[1], experts, model.width, width),
            )
            call = partial(grouped_mlp, names=names)
            yield Case(f"{model.name} experts {'/'.join(names)}, {tokens} tokens", call, operands)
    for tokens, tile, page, positions in ((1, 1, 64, 4096), (8, 1, 64, 32768), (64, 1, 16, 4096), (512, 16, 64, 4096)):
        batch = tokens // tile
        operands = (
            _array((tokens, model.heads, 512)),
            _array((tokens, model.heads, 64)),
            _array((batch * positions // page + 1, page, 576), jnp.uint16),
            _array((batch, positions // page), jnp.int32),
            _array((tokens,), jnp.int32),
            _array((tokens,), jnp.int32),
        )
        name = f"{model.name} attention, {tokens} tokens by {tile}, {positions} cached in pages of {page}"
        yield Case(name, partial(mla_attention, scale=0.1, tile=tile), operands)
    yield from _prefill_cases(model)


def _attend_to_prompts(*operands: jax.Array, names: tuple[str, str]) -> jax.Array:
    nope, rope, k_b, v_b, pages, table, sequence, positions, into = operands
    plan = prefill_plan(table, sequence, positions, page=pages.shape[1], tile=16, least=LEAST_EXPANDED)
    return mla_prefill(nope, rope, k_b, v_b, names, pages, plan, into, scale=0.1)


def _prefill_cases(model: Model) -> Iterator[Case]:
    """Expanded attention: keys, values, and the attention itself."""
    for types in (("Q5_0", "Q5_0"), ("Q8_0", "Q4_K"), ("BF16", "IQ4_XS")):
        for tokens, batch, page, positions in ((512, 1, 64, 4096), (2048, 4, 16, 4096)):
            operands = (
                _array((tokens, model.heads, 128)),
                _array((tokens, model.heads, 64)),
                _records(types[0], model.heads, 512, 128),
                _records(types[1], model.heads, 128, 512),
                _array((batch * positions // page + 1, page, 576), jnp.uint16),
                _array((batch, positions // page), jnp.int32),
                _array((tokens,), jnp.int32),
                _array((tokens,), jnp.int32),
                _array((tokens, model.heads, 128)),
            )

            call = partial(_attend_to_prompts, names=types)
            name = f"{model.name} prompts {'/'.join(types)}, {tokens} tokens of {batch}, pages of {page}"
            yield Case(name, call, operands)


def row_cases(model: Model) -> Iterator[Case]:
    """The kernels whose blocks have a row each."""
    experts, _, chosen, _ = model.experts
    groups, kept = model.groups
    for rows in (1, 16, 512):
        for normalized in (False, True):
            choose = partial(
                choose_experts, experts=chosen, groups=groups, kept_groups=kept, normalized=normalized, scale=16.0
            )
            operands = (_array((rows, experts), jnp.float32), _array((rows,), jnp.bool_))
            yield Case(f"{model.name} router, {rows} rows, normalized {normalized}", choose, operands)
        for width, splits in model.norms:
            x, weight = _array((rows, width)), _array((width,), jnp.float32)
            yield Case(f"{model.name} norm of {width}, {rows} rows", partial(rms_norm, eps=1e-6), (x, weight))
            summands = _array((splits, rows, width), jnp.float32)
            yield Case(
                f"{model.name} norm of {width} in {splits} parts, {rows} rows", norm_of_parts, (x, summands, weight)
            )
        turn = _array((rows, 32), jnp.float32)
        operands = (
            _array((64, 64, 576), jnp.uint16),
            _array((model.norms[-1][1], rows, 576), jnp.float32),
            _array((512,), jnp.float32),
            turn,
            turn,
            _array((rows,), jnp.int32),
        )
        yield Case(f"{model.name} latents, {rows} rows", latents_of_parts, operands)


def norm_of_parts(x: jax.Array, summands: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    return add_rms_norm(x, total_of(summands), weight, 1e-6)


def latents_of_parts(pages: jax.Array, summands: jax.Array, weight: jax.Array, *rest: jax.Array) -> jax.Array:
    return write_latents(pages, total_of(summands), weight, 1e-6, *rest)


# Of ptxas; that it serializes wgmma, or ignores setmaxnreg, it says as "info". That a warpgroup's sum may be out of
# bounds is not meant: it does not know how long shared memory is.
_WARNINGS = "[Ww]arning|Potential Performance|wgmma|setmaxnreg"


@dataclass(frozen=True)
class Compiled:
    """What came of a case: for each of its kernels that no earlier case had, registers, bytes spilled, shared memory;
    warnings of ptxas; bytes of temporaries of the whole program."""

    name: str
    registers: tuple[int, ...]
    spilled: int
    shared: tuple[int, ...]
    warnings: tuple[str, ...]
    temporaries: int
    seconds: float


class Compiler:
    """Compiles for one H200."""

    def __init__(self) -> None:
        target = target_config(load_target("h200"))
        devices = topologies.get_topology_desc("", platform="cuda", topology="1x1x1", target_config=target).devices
        self._sharding = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec())

    def compile(self, case: Case) -> Compiled:
        """Raises what the compiler raises."""
        for old in DUMP.iterdir():
            old.unlink()
        begun = time.perf_counter()
        operands = [jax.ShapeDtypeStruct(o.shape, o.dtype, sharding=self._sharding) for o in case.operands]
        compiled = jax.jit(case.function, out_shardings=self._sharding).lower(*operands).compile()
        ptxas = [path.read_text(errors="replace") for path in sorted(DUMP.glob("*.ptxas"))]
        passes = [path.read_text(errors="replace") for path in sorted(DUMP.glob("*.mlir-passes.log"))]
        memory = compiled.memory_analysis()
        return Compiled(
            case.name,
            tuple(int(n) for text in ptxas for n in re.findall(r"Used (\d+) registers", text)),
            sum(int(n) for text in ptxas for n in re.findall(r"(\d+) bytes spill", text)),
            tuple(int(re.findall(r"dynamic_shared_memory_size %c(\d+)", text)[0]) for text in passes),
            tuple(line.strip() for text in ptxas for line in text.splitlines() if re.search(_WARNINGS, line)),
            memory.temp_size_in_bytes,
            time.perf_counter() - begun,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="cases whose names contain each of these words")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    compiler, results = Compiler(), []
    print(f"jax {jax.__version__}; of {SHARED_BYTES:,} bytes of shared memory a block; kernels in order")
    for model in options.models:
        for case in chain(cases(MODELS[model]), row_cases(MODELS[model])):
            if all(word in case.name for word in options.only):
                done = compiler.compile(case)
                results.append(done)
                shared = " ".join(f"{n:,}" for n in done.shared)
                print(
                    f"{done.name}: registers {' '.join(map(str, done.registers))}, spilled {done.spilled}, "
                    f"shared {shared}, temporaries {done.temporaries:,}",
                    *done.warnings,
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps({"jax": jax.__version__, "cases": [asdict(r) for r in results]}, indent=1))


if __name__ == "__main__":
    main()
