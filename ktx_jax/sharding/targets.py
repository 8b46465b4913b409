# SPDX-License-Identifier: Apache-2.0
"""Descriptions of devices that need not be here: memory, bandwidths and peak rates."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ktx_jax.errors import KtxError
from ktx_jax.resources import configs
from ktx_jax.sharding.problems import did_you_mean


@dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
      name: for people.
      platform: "gpu" or "cpu".
      memory: bytes; reserved: those that the driver and libraries take.
      bandwidth: of memory; link_bandwidth: to another device; host_bandwidth: to the host. Bytes a second, one way.
      peak: operations a second by number type.
    """

    name: str
    platform: str
    memory: int
    reserved: int
    bandwidth: float
    link_bandwidth: float
    host_bandwidth: float
    peak: Mapping[str, float]

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
    known = {field.name: field for field in fields(Target)}
    if not isinstance(values, dict) or set(values) != set(known):
        raise KtxError(f"{path}: a target is a mapping with just the keys {', '.join(known)}")
    for key in ("memory", "reserved", "bandwidth", "link_bandwidth", "host_bandwidth"):
        if isinstance(values[key], bool) or not isinstance(values[key], int | float) or values[key] < 0:
            raise KtxError(f"{path}: {key} should be a number, 0 or more; found {values[key]!r}")
    if values["platform"] not in ("gpu", "cpu") or not isinstance(values["peak"], dict):
        raise KtxError(f"{path}: platform should be gpu or cpu, and peak a mapping from number types to operations/s")
    if values["reserved"] >= values["memory"]:
        raise KtxError(f"{path}: reserved is not less than memory")
    return Target(**values)
