# SPDX-License-Identifier: Apache-2.0
"""Whether an implementation that a rule asks for can run where the parameter is, and which one takes what is open."""

from dataclasses import dataclass, replace

from ktx_jax.sharding.choices import Choice, Ops
from ktx_jax.sharding.devices import HOST
from ktx_jax.sharding.gpu_kernels import PALLAS, XLA
from ktx_jax.sharding.parameters import Parameter
from ktx_jax.sharding.placement import Place
from ktx_jax.sharding.problems import Findings

_RUNS_ON = {"pallas": ("gpu", "GPUs"), "ffi": ("cpu", "CPUs")}
_GPU = "gpu"


@dataclass(frozen=True)
class Accelerators:
    """What computes on the devices that `gpu:N` stands for.

    Attributes:
      platform: "gpu", or "cpu" for virtual devices.
      implementation: where rules leave it open, "xla" or "pallas".
      no_kernels: why the GPU kernels cannot run there, or None.
    """

    platform: str = _GPU
    implementation: str = XLA
    no_kernels: str | None = None


def runnable_ops(choice: Choice, home: Place, there: Accelerators) -> Ops:
    """The choice's implementations, less those that the accelerators cannot run."""
    bad = _misplaced(choice, home, there)
    return replace(choice.ops, **{phase: None for phase, (_, device) in bad.items() if device != HOST})


def filled_ops(ops: Ops, home: Place, there: Accelerators) -> Ops:
    """The implementations with `pallas` where they are open on an accelerator that takes it by default."""
    if there.implementation != PALLAS:
        return ops
    on = _devices(home)
    return Ops(**{phase: getattr(ops, phase) or (None if on[phase] == HOST else PALLAS) for phase in on})


def check_operators(parameter: Parameter, choice: Choice, home: Place, there: Accelerators, findings: Findings) -> None:
    """`pallas` runs on GPUs, if they are such as it is made for, and `ffi` on CPUs."""
    for phase, (op, device) in _misplaced(choice, home, there).items():
        kind = "the host" if device == HOST else f"{device}, a {there.platform.upper()}"
        message = f"{op!r} computes on {_RUNS_ON[op][1]}, but {{path}} is on {kind}"
        if op == PALLAS and device != HOST and there.platform == _GPU:
            message = f"'pallas' cannot compute with {{path}} on {device}: {there.no_kernels}"
        alike = choice.ops.decode == choice.ops.prefill and home.prefill is None
        if not alike:
            message += f" at {phase}"
        elif phase == "prefill":
            continue  # said of decode
        findings.add_path(choice.ops_mark, message, parameter.path)


def yielded_notice(names: set[str | None], there: Accelerators) -> tuple[str, ...]:
    """What to say of implementations that gave way."""
    return tuple(
        f"{there.no_kernels}: operators that stand for 'pallas' are left to the run"
        if name == PALLAS and there.platform == _GPU
        else f"{name!r} computes on {_RUNS_ON[name][1]}: operators that stand for it are left to the run elsewhere"
        for name in sorted(filter(None, names))
    )


def _devices(home: Place) -> dict[str, str]:
    """Where each phase computes."""
    return {"decode": home.devices[0], "prefill": home.prefill or home.devices[0]}


def _misplaced(choice: Choice, home: Place, there: Accelerators) -> dict[str, tuple[str, str]]:
    """The implementation and the device of each phase in which it cannot run there."""
    on = _devices(home)
    wanted = {phase: (getattr(choice.ops, phase), on[phase]) for phase in on}
    return {
        phase: (op, device)
        for phase, (op, device) in wanted.items()
        if op in _RUNS_ON
        and (
            (HOST if device == HOST else there.platform) != _RUNS_ON[op][0]
            or (op == PALLAS and there.no_kernels is not None)
        )
    }
