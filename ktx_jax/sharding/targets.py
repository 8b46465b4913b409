# SPDX-License-Identifier: Apache-2.0
"""Descriptions of devices that need not be here: memory, bandwidths and peak rates."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ktx_jax.errors import KtxError
from ktx_jax.resources import configs
from ktx_jax.sharding.problems import did_you_mean

HOST_TARGET = "cpu"
"""What stands for the host, where nothing else is said."""


@dataclass(frozen=True)
class Cuda:
    """What XLA's compiler must know of a CUDA GPU, as its driver would report it.

    Attributes:
      capability: compute capability, "9.0a" with the features of that architecture alone.
      cores: streaming multiprocessors; fpus_per_core: float32 units of one.
      threads_per_core, shared_memory_per_core (bytes): the most of one; shared_memory_per_block: of a block that asks.
      l2_cache: bytes; clock_ghz: the highest.
    """

    capability: str
    cores: int
    fpus_per_core: int
    threads_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block: int
    l2_cache: int
    clock_ghz: float


@dataclass(frozen=True)
class Target:
    """A kind of device, and how such devices are connected.

    Attributes:
      name: for people.
      platform: "gpu" or "cpu".
      memory: bytes; reserved: those that the driver and libraries take.
      bandwidth: of memory; link_bandwidth: to another device of the host; host_bandwidth: to the host;
        network_bandwidth: a device's share of its host's network. Bytes a second, one way.
      link_latency, network_latency: seconds for a hop to another device of the host; to another host.
      devices_per_host: the devices that the links connect.
      peak: operations a second by number type.
      cuda: for compiling; None where no compiler for absent devices is at hand.
    """

    name: str
    platform: str
    memory: int
    reserved: int
    bandwidth: float
    link_bandwidth: float
    host_bandwidth: float
    network_bandwidth: float
    link_latency: float
    network_latency: float
    devices_per_host: int
    peak: Mapping[str, float]
    cuda: Cuda | None = None

    @property
    def capability(self) -> str | None:
        """Its CUDA compute capability, None where it has none."""
        return None if self.cuda is None else self.cuda.capability

    @property
    def usable(self) -> int:
        """Bytes that a model can have."""
        return self.memory - self.reserved


def target_names() -> list[str]:
    """The targets that come with the package."""
    return sorted(path.stem for path in (configs() / "targets").glob("*.yaml"))


def load_target(name: str) -> Target:
    """A target by its name, or from a YAML file of one's own.

    Raises:
      KtxError: there is no such target, or the file is not one.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if name not in target_names():
            raise KtxError(f"no target named {name!r}{did_you_mean(name, target_names())}; "
                           f"there are {', '.join(target_names())}, or give a YAML file")  # fmt: skip
        path = configs() / "targets" / f"{name}.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise KtxError(f"{path}: the target cannot be read: {' '.join(str(error).split())}") from error
    return _target(path, values)


def _target(path: Path, values: Any) -> Target:
    values = _checked(path, "a target", Target, values)
    if values["platform"] not in ("gpu", "cpu"):
        raise KtxError(f"{path}: platform should be gpu or cpu; found {values['platform']!r}")
    if values["reserved"] >= values["memory"]:
        raise KtxError(f"{path}: reserved is not less than memory")
    if missing := {"bfloat16", "float32"} - set(values["peak"]):
        raise KtxError(f"{path}: peak lacks {' and '.join(sorted(missing))}")
    for size in ("bandwidth", "link_bandwidth", "host_bandwidth", "network_bandwidth", "devices_per_host"):
        if not values[size]:
            raise KtxError(f"{path}: {size} should be more than 0")
    if values.get("cuda") is not None:
        values["cuda"] = Cuda(**_checked(path, "cuda", Cuda, values["cuda"]))
        if not re.fullmatch(r"\d+\.\da?", values["cuda"].capability):
            raise KtxError(f'{path}: capability should be as "9.0a"; found {values["cuda"].capability!r}')
    return Target(**values)


def _checked(path: Path, what: str, kind: type, values: Any) -> dict[str, Any]:
    """The values of a mapping, if it has the fields of the dataclass `kind` and they look like their types."""
    known = {field.name: field for field in fields(kind)}
    needed = {name for name, field in known.items() if field.default is MISSING}
    if not isinstance(values, dict) or not needed <= set(values) <= set(known):
        keys = ", ".join(sorted(needed))
        raise KtxError(f"{path}: {what} is a mapping with the keys {keys}{' and perhaps cuda' * (kind is Target)}")
    for name, value in values.items():
        numbers = value.values() if name == "peak" and isinstance(value, dict) else [value]
        if known[name].type in (int, float) or name == "peak":
            if any(isinstance(v, bool) or not isinstance(v, int | float) or v < 0 for v in numbers):
                raise KtxError(f"{path}: {name} should be {'numbers by type' if name == 'peak' else 'a number'}, "
                               f"0 or more; found {value!r}")  # fmt: skip
        elif known[name].type is str and not isinstance(value, str):
            raise KtxError(f"{path}: {name} should be text; found {value!r}")
    return dict(values)
