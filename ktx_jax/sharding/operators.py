# SPDX-License-Identifier: Apache-2.0
"""Whether an implementation that a rule asks for can run where the parameter is."""

from dataclasses import replace

from ktx_jax.sharding.choices import Choice, Ops
from ktx_jax.sharding.devices import HOST
from ktx_jax.sharding.parameters import Parameter
from ktx_jax.sharding.placement import Place
from ktx_jax.sharding.problems import Findings

_RUNS_ON = {"pallas": ("gpu", "GPUs"), "ffi": ("cpu", "CPUs")}


def runnable_ops(choice: Choice, home: Place, platform: str) -> Ops:
    """The choice's implementations, less those that what `gpu:N` stands for cannot run."""
    bad = _misplaced(choice, home, platform)
    return replace(choice.ops, **{phase: None for phase, (_, device) in bad.items() if device != HOST})


def check_operators(parameter: Parameter, choice: Choice, home: Place, platform: str, findings: Findings) -> None:
    """`pallas` runs on GPUs and `ffi` on CPUs; `platform` is what `gpu:N` stands for."""
    for phase, (op, device) in _misplaced(choice, home, platform).items():
        kind = "the host" if device == HOST else f"{device}, a {platform.upper()}"
        message = f"{op!r} computes on {_RUNS_ON[op][1]}, but {{path}} is on {kind}"
        alike = choice.ops.decode == choice.ops.prefill and home.prefill is None
        if not alike:
            message += f" at {phase}"
        elif phase == "prefill":
            continue  # said of decode
        findings.add_path(choice.ops_mark, message, parameter.path)


def yielded_notice(names: set[str | None]) -> tuple[str, ...]:
    """What to say of implementations that gave way."""
    return tuple(
        f"{name!r} computes on {_RUNS_ON[name][1]}: operators that stand for it are left to the run elsewhere"
        for name in sorted(filter(None, names))
    )


def _misplaced(choice: Choice, home: Place, platform: str) -> dict[str, tuple[str, str]]:
    """The implementation and the device of each phase in which it cannot run there."""
    wanted = {
        "decode": (choice.ops.decode, home.devices[0]),
        "prefill": (choice.ops.prefill, home.prefill or home.devices[0]),
    }
    return {
        phase: (op, device)
        for phase, (op, device) in wanted.items()
        if op in _RUNS_ON and (HOST if device == HOST else platform) != _RUNS_ON[op][0]
    }
