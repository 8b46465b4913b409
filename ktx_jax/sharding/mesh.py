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
      KtxError: the plan names more devices than there are, or asks of several processes what they cannot do together.
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
    named = {name: found[number] for name, number in numbers.items()}
    if jax.process_count() > 1:
        _check_processes(plan, named)
    spare = found[needed] if found[0].platform == "cpu" and needed < len(found) else None
    return named | {HOST: spare or jax.local_devices(backend="cpu")[0]}


def _check_processes(plan: Plan, named: Binding) -> None:
    """All processes compute each step together: one stage over the devices of all of them, and nothing beside it."""
    count = len(jax.devices())
    advice = f"give one stage a mesh over all {count} devices, such as `mesh: {{tensor: {count}}}`"
    if len(plan.stages) > 1:
        raise KtxError(f"{plan.name}: a run of several processes has one stage, not {len(plan.stages)}: {advice}")
    if HOST in plan.devices:
        raise KtxError(f"{plan.name}: nothing can lie on the host apart in a run of several processes: {advice}")
    if idle := set(range(jax.process_count())) - {device.process_index for device in named.values()}:
        raise KtxError(f"{plan.name}: no device of process {min(idle)} has a part in the plan: {advice}")


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
