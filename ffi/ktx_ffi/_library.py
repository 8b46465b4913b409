# SPDX-License-Identifier: Apache-2.0
"""The compiled library: whether it is there, and its settings."""

from types import ModuleType

import jax.ffi


def _load() -> tuple[ModuleType | None, str]:
    try:
        from ktx_ffi import _ktx_ffi as module
    except ImportError as error:
        return None, (
            "the CPU kernels were not built: a C++17 compiler was missing when the package was installed, or its "
            f"build failed; install one and reinstall ({error})"
        )
    try:
        module.isa()
    except RuntimeError as error:  # KTX_ISA names what this CPU does not have
        return None, str(error)
    for name, handler in module.HANDLERS.items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return module, ""


_module, _reason = _load()


def library() -> ModuleType:
    """The extension module, its FFI targets registered; raises RuntimeError with the reason if it is not there."""
    if _module is None:
        raise RuntimeError(f"ktx_ffi is not available: {_reason}")
    return _module


def available() -> bool:
    """Whether the compiled kernels can be used."""
    return _module is not None


def why_unavailable() -> str:
    """Why they cannot; empty if they can."""
    return _reason


def isa() -> str:
    """The instruction set in use: `avx512`, `avx2` or `portable` (KTX_ISA forces one)."""
    return library().isa()


def threads() -> int:
    """Threads a call may use, the caller included."""
    return library().threads()


def set_threads(n: int) -> None:
    """Sets the number of threads; raises ValueError if it is less than one."""
    library().set_threads(n)


def measure_limits(read_bytes: int = 1 << 30) -> dict[str, float]:
    """What the machine can do at most on `threads()` threads, measured now.

    Bytes read a second (`read`), and products a second of int8 (`int8`) and bfloat16 (`bf16`) from registers, 0 where
    the instruction set has none.
    """
    module = library()
    return {
        "read": module.measure_read_bandwidth(read_bytes),
        "int8": module.measure_int8_peak(),
        "bf16": module.measure_bf16_peak(),
    }
