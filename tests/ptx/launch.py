# SPDX-License-Identifier: Apache-2.0
"""What the compiler makes of a kernel for an H200 that is not there: its PTX, and how the host would start it.

The host's part is read from the last form that Mosaic's dump of its passes has of it, in which every number is a
constant.
"""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ktx_jax.aot.target_config import target_config
from ktx_jax.sharding.targets import load_target

from .tensors import Tensor
from .warp import MAP_BYTES

_ITEM = {"bf16": 2, "i32": 4, "f32": 4}
_NO_SWIZZLE = 16
# Of an array, and its address; none of them moves where it begins.
_VIEWS = (
    "memref.transpose",
    "memref.reinterpret_cast",
    "memref.extract_aligned_pointer_as_index",
    "builtin.unrealized_conversion_cast",
    "llvm.inttoptr",
)


class Launch(NamedTuple):
    """A compiled kernel.

    Attributes:
      parameters: which of the kernel's arrays, operands before results, each parameter is; None for tensor maps.
    """

    ptx: str
    grid: tuple[int, ...]
    threads: int
    shared_bytes: int
    parameters: tuple[int | None, ...]
    tensors: tuple[Tensor, ...]


@cache
def _sharding() -> NamedSharding:
    target = target_config(load_target("h200"))
    devices = topologies.get_topology_desc("", platform="cuda", topology="1x1x1", target_config=target).devices
    return NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec())


_launches: dict[str, Launch] = {}


def compiled(function: Callable, operands: list[np.ndarray], dump: Path) -> Launch:
    """The one kernel in `function`. `dump`: where Mosaic has been told to put what it makes (`MOSAIC_GPU_DUMP_TO`)."""
    shapes = [jax.ShapeDtypeStruct(o.shape, o.dtype, sharding=_sharding()) for o in operands]
    lowered = jax.jit(function, out_shardings=_sharding()).lower(*shapes)
    key = lowered.as_text()
    if key not in _launches:
        lowered.compile()
        ([ptx], [passes]) = (list(dump.glob(pattern)) for pattern in ("*.ptx", "*.mlir-passes.log"))
        _launches[key] = _launch(ptx.read_text(), passes.read_text())
        for made in dump.iterdir():
            made.unlink()
    return _launches[key]


def _launch(ptx: str, passes: str) -> Launch:
    host = passes.split("// -----// IR Dump Before GpuLaunchLoweringPass", 1)[1].split("gpu.binary", 1)[0]
    values = _Host(host)
    call = re.search(
        r"gpu\.launch_func .* blocks in \((.*?)\) threads in \((\S+),.*? "
        r"dynamic_shared_memory_size (\S+) args\((.*)\) loc",
        host,
    )
    assert call is not None, "the dump has no launch"
    blocks, threads, shared_bytes, arguments = call.groups()
    parameters = tuple(
        values.buffers[name] if kind == "!llvm.ptr" else None
        for name, kind in re.findall(r"(%\w+) : (!llvm\.\w+)", arguments)
    )
    grid = tuple(values.numbers[n] for n in blocks.split(", "))
    return Launch(ptx, grid, values.numbers[threads], values.numbers[shared_bytes], parameters, tuple(values.tensors()))


class _Host:
    """The host's function: `numbers` that its values are, `buffers` that its pointers and views are of."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.numbers = {n: int(v) for n, v in re.findall(r"(%\w+) = llvm\.mlir\.constant\((-?\d+) :", text)}
        pointers = {"%arg1": 0}  # to the array of buffers' addresses
        pointers |= {n: int(k) for n, k in re.findall(r"(%\w+) = llvm\.getelementptr %arg1\[(\d+)\]", text)}
        self.buffers: dict[str, int] = {}
        self._items: dict[str, int] = {}
        for name, of in re.findall(r"(%\w+) = llvm\.load (%\w+) : !llvm\.ptr -> !llvm\.ptr", text):
            self.buffers[name] = pointers[of]
        for name, index in re.findall(r"(%\w+) = builtin.* to memref<.*mosaic_gpu\.from_kernel_arg_idx = (\d+)", text):
            self.buffers[name] = int(index)
        for name, how, of, rest in re.findall(rf"(%\w+) = ({'|'.join(_VIEWS)}) (%\w+) (.*)", text):
            if of not in self.buffers or name in self.buffers:
                continue
            assert how != "memref.reinterpret_cast" or "offset: [0]" in rest, rest
            self.buffers[name] = self.buffers[of]
            kind = re.search(r"memref<(?:\d+x)+(\w+)", rest)
            self._items[name] = _ITEM[kind[1]] if kind else self._items[of]

    def _array(self, pointer: str) -> tuple[int, ...]:
        """What has been stored behind a pointer."""
        pointers = {pointer: 0} | {
            n: int(k) for n, k in re.findall(rf"(%\w+) = llvm\.getelementptr {pointer}\[(\d+)\]", self._text)
        }
        stores = re.findall(r"llvm\.store (%\w+), (%\w+) : i64", self._text)
        found = {pointers[to]: self.numbers[value] for value, to in stores if to in pointers}
        return tuple(found[k] for k in range(len(found)))

    def tensors(self) -> list[Tensor]:
        """In the order in which their maps lie."""
        out = []
        for arguments in re.findall(r"call @mosaic_gpu_init_tma_desc\((.*?)\) :", self._text):
            at, base, _, rank, shape, strides, swizzle, box = arguments.split(", ")
            place = re.search(rf"{at} = llvm\.getelementptr %\w+\[(\d+)\]", self._text)
            assert int(place[1] if place else 0) == MAP_BYTES * len(out)
            width = self.numbers[swizzle]
            arrays = [self._array(pointer) for pointer in (shape, strides, box)]
            assert {len(a) for a in arrays} == {self.numbers[rank]}
            out.append(Tensor(self.buffers[base], *arrays, self._items[base], 0 if width == _NO_SWIZZLE else width))
        return out
