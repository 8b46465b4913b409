# SPDX-License-Identifier: Apache-2.0
"""Stands in for `pallas_kernels.mosaic.kernel`: kernels are compiled for an H200, and their PTX is executed."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import mosaic

from .block import Block, Schedule
from .launch import Launch, compiled
from .tensors import Global
from .text import parse


class Machine:
    """Every block of every kernel, one after another.

    Attributes:
      schedule: in what order things happen.
      edit: of a kernel's PTX, before it is executed.
      launches: of the kernels executed so far.
    """

    def __init__(self, dump: Path) -> None:
        self.schedule = Schedule()
        self.edit: Callable[[str], str] = lambda ptx: ptx
        self.launches: list[Launch] = []
        self._dump, self._kernel, self._mutable = dump, mosaic.kernel, mosaic.mutable

    def kernel(self, body: Callable, *, interpret: bool, out_type: Any, **options: Any) -> Callable:
        """As `mosaic.kernel`; operands that are references are written to."""
        assert not interpret
        call = self._kernel(body, interpret=False, out_type=out_type, **options)
        outs = list(out_type) if isinstance(out_type, list | tuple) else [out_type]

        def run(*operands: Any) -> Any:
            written = [n for n, o in enumerate(operands) if isinstance(o, jax.Ref)]

            def whole(*arrays: jax.Array) -> Any:
                given = [self._mutable(a) if n in written else a for n, a in enumerate(arrays)]
                return call(*given), [jax.freeze(given[n]) for n in written]

            arrays = [np.asarray(o[...] if isinstance(o, jax.Ref) else o) for o in operands]
            empty = [np.empty(o.shape, o.dtype) for o in outs]
            found = self._execute(compiled(whole, arrays, self._dump), arrays, empty)
            for n in written:
                operands[n][...] = jnp.asarray(found[n])
            results = tuple(jnp.asarray(a) for a in found[len(arrays) :])
            return results if isinstance(out_type, list | tuple) else results[0]

        return run

    def _execute(self, launch: Launch, operands: list[np.ndarray], outs: list[np.ndarray]) -> list[np.ndarray]:
        """All arrays as they are in the end; results that no block writes are NaN."""
        self.launches.append(launch)
        host = launch.host
        memory = Global([*operands, *[np.frombuffer(b"\xff" * o.nbytes, o.dtype).reshape(o.shape) for o in outs]])
        parameters = [0 if p is None else int(memory.bases[p]) for p in host.parameters]
        program = parse(self.edit(launch.ptx))
        with np.errstate(all="ignore"):
            for index in itertools.product(*map(range, host.grid)):
                Block(
                    program, host.threads // 32, host.shared_bytes, index, memory, parameters, host.tensors,
                    self.schedule,
                ).run()  # fmt: skip
        return [memory.array(n, like) for n, like in enumerate([*operands, *outs])]
