# SPDX-License-Identifier: Apache-2.0
"""Binds the logical devices of a plan to JAX's, and makes a mesh of each stage."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ktx_jax.errors import KtxError
from ktx_jax.sharding.choices import AXES
from ktx_jax.sharding.devices import HOST, device_number
from ktx_jax.sharding.plan import Plan

Binding = Mapping[str, jax.Device]
"""JAX's device for each name in a plan."""


def bind(plan: Plan, devices: Sequence[jax.Device] | None = None) -> Binding:
    """`gpu:N` is the N-th of `devices` (JAX's default ones if None), `cpu` is the host.

    Where `devices` are CPUs, virtual ones, the one after the last that the plan numbers stands for the host if there is
    one more.

    Raises:
      KtxError: the plan names more devices than there are.
    """
    found = list(jax.devices() if devices is None else devices)
    numbers = {name: device_number(name) for name in plan.devices if name != HOST}
    needed = max(numbers.values(), default=-1) + 1
    if needed > len(found):
        hint = f"; for virtual ones set XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
        there = f"there {'is' if len(found) == 1 else 'are'} {len(found)} ({found[0].platform})"
        raise KtxError(
            f"{plan.name}: the rules name {needed} devices, but {there}{hint if found[0].platform == 'cpu' else ''}"
        )
    spare = found[needed] if found[0].platform == "cpu" and needed < len(found) else None
    return {name: found[number] for name, number in numbers.items()} | {HOST: spare or jax.devices("cpu")[0]}


def stage_mesh(plan: Plan, index: int, bound: Binding) -> Mesh:
    """The devices of a stage as a grid: the axes that the rules name, in their order, and the others at size 1."""
    names = plan.stages[index].devices
    axes = (*plan.mesh, *(axis for axis in AXES if axis not in plan.mesh))
    sizes = [plan.mesh.get(axis, 1) if len(names) > 1 else 1 for axis in axes]
    grid = np.array([bound[name] for name in names], dtype=object).reshape(sizes)
    return Mesh(grid, axes, axis_types=(AxisType.Auto,) * len(axes))


def one_device_mesh(device: jax.Device) -> Mesh:
    """A mesh of one device, with all axes."""
    return Mesh(np.array([device], dtype=object).reshape((1,) * len(AXES)), AXES)
