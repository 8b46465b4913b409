# SPDX-License-Identifier: Apache-2.0
"""What the compiler makes of a kernel for an H200 that is not there: its PTX, and how the host would start it."""

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

from .host import Host


class Launch(NamedTuple):
    """A compiled kernel, and how the host starts it."""

    ptx: str
    host: Host


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
        _launches[key] = Launch(ptx.read_text(), _host(passes.read_text()))
        for made in dump.iterdir():
            made.unlink()
    return _launches[key]


def _host(passes: str) -> Host:
    """From the last form that Mosaic's dump of its passes has of the host's function."""
    function = passes.split("// -----// IR Dump Before GpuLaunchLoweringPass", 1)[1].split("gpu.binary", 1)[0]
    return Host(re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", function))
