# SPDX-License-Identifier: Apache-2.0
"""JAX's CUDA plugin on machines without a GPU."""

import ctypes
import sys
from importlib.util import find_spec
from types import ModuleType

_VERSIONS = (12, 13)


def leave_out_cuda() -> None:
    """Keeps JAX from starting an installed CUDA plugin where there is no NVIDIA driver.

    It is there to compile for GPUs that are elsewhere (extra `aot`), which a process of its own does. Started here, it
    would find no GPU and say so in a page of traceback each time. To be called before JAX looks for devices, and best
    before it is imported; does nothing where there is a driver or no plugin.
    """
    installed = [version for version in _VERSIONS if find_spec(f"jax_cuda{version}_plugin")]
    if not installed or _driver():
        return
    for version in installed:
        sys.modules.setdefault(f"jax_plugins.xla_cuda{version}", _nothing())
        sys.modules.setdefault(f"jax_cuda{version}_plugin", None)  # type: ignore[arg-type]  # its import fails


def _driver() -> bool:
    """Whether the library that talks to NVIDIA's driver can be loaded, as the plugin would."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _nothing() -> ModuleType:
    """A JAX plugin that registers no platform."""
    module = ModuleType("nothing", "Stands in for a plugin without a driver.")
    module.initialize = lambda: None  # type: ignore[attr-defined]
    return module
