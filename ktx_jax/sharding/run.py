# SPDX-License-Identifier: Apache-2.0
"""The plan of a run: rules as a user gives them, held against a file and the devices that are here."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import jax

from ktx_jax.errors import KtxError
from ktx_jax.gguf.reader import GGUF
from ktx_jax.model.config import Config
from ktx_jax.sharding.auto import Sizes, choose_rules
from ktx_jax.sharding.devices import HOST, device_number
from ktx_jax.sharding.gpu_kernels import XLA, why_not_on
from ktx_jax.sharding.parameters import file_types
from ktx_jax.sharding.plan import Plan
from ktx_jax.sharding.rules import Rules

log = logging.getLogger("ktx_jax")

AUTO = "auto"
_ROOM = 0.95  # of free memory: the rest is for fragments and XLA's own buffers


def plan_run(
    gguf: GGUF,
    config: Config,
    rules: str | os.PathLike[str] | Rules | None,
    devices: Sequence[jax.Device],
    sizes: Sizes,
    *,
    implementation: str = XLA,
) -> Plan:
    """The plan to load by.

    Args:
      rules: a file, `Rules`, "auto", or None for the first device alone.
      implementation: what computes where rules leave it open; "pallas" is named in the plan.

    Raises:
      RulesError: the rules do not suit the model or the devices.
      KtxError: the model does not fit, as far as the devices tell their memory.
    """
    types = file_types(gguf, config)
    if rules == AUTO:
        if any(device.process_index != devices[0].process_index for device in devices):
            raise KtxError("rules 'auto' are for one process: give a rule file whose mesh spans the devices of all")
        text = choose_rules(
            config,
            types,
            [free_memory(device, len(devices)) for device in devices],
            sizes,
            implementation=implementation,
        )
        log.info("rules chosen for the devices:\n%s", text)
        rules = Rules.from_text(text, "the rules chosen for these devices")
    elif rules is None:
        rules = Rules.from_text("rules: []", "one device")
    elif not isinstance(rules, Rules):
        rules = Rules.from_file(rules)
    platform = "cpu" if devices[0].platform == "cpu" else "gpu"
    plan = Plan.from_rules(
        config, rules, devices=len(devices), types=types,
        context=sizes.context, batch=sizes.batch, dtype=sizes.dtype, platform=platform,
        implementation=implementation, no_kernels=None if platform == "cpu" else why_not_on(capability(devices)),
    )  # fmt: skip
    for notice in plan.notices:
        log.warning("%s", notice)
    _check_memory(plan, devices)
    return plan


def capability(devices: Sequence[jax.Device]) -> str | None:
    """The CUDA compute capability that all of the devices have, as "9.0"; None if they are no such GPUs or differ."""
    found = {getattr(device, "compute_capability", None) for device in devices}
    return found.pop() if len(found) == 1 else None


def free_memory(device: jax.Device, count: int) -> int:
    """Bytes that a device has free: of a CPU device, its share, one of `count`, of what the system has available."""
    if (stats := device.memory_stats()) is not None and "bytes_limit" in stats:
        return round(_ROOM * (stats["bytes_limit"] - stats["bytes_in_use"]))
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError) as error:  # not Linux
        raise KtxError(f"the memory of {device} is not known: give a rule file in place of 'auto'") from error
    return round(_ROOM * available / count)


def _check_memory(plan: Plan, devices: Sequence[jax.Device]) -> None:
    """Before anything is read; CPU devices do not tell, and share their memory with the mapped file.

    Each process looks at its own devices, and takes those of others to have enough.
    """
    named = {name: devices[device_number(name)] for name in plan.devices if name != HOST}
    here = {name: device for name, device in named.items() if device.process_index == jax.process_index()}
    room = {name: free_memory(device, 1) for name, device in here.items() if device.memory_stats() is not None}
    if not room:
        return
    elsewhere = {name: plan.needs[name].total for name in named if name not in here}
    if not (fit := plan.check(room | elsewhere)).ok:
        raise KtxError(f"{plan.name}: {fit}")
