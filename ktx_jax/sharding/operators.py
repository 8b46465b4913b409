# SPDX-License-Identifier: Apache-2.0
"""Whether an implementation that a rule asks for can run where the parameter is."""

from ktx_jax.sharding.choices import Choice
from ktx_jax.sharding.devices import HOST
from ktx_jax.sharding.parameters import Parameter
from ktx_jax.sharding.placement import Place
from ktx_jax.sharding.problems import Findings

_RUNS_ON = {"pallas": ("gpu", "GPUs"), "ffi": ("cpu", "CPUs")}


def check_operators(parameter: Parameter, choice: Choice, home: Place, platform: str, findings: Findings) -> None:
    """`pallas` runs on GPUs and `ffi` on CPUs; `platform` is what `gpu:N` stands for."""
    ops = {"decode": choice.ops.decode, "prefill": choice.ops.prefill}
    where = {"decode": home.devices[0], "prefill": home.prefill or home.devices[0]}
    alike = ops["decode"] == ops["prefill"] and where["decode"] == where["prefill"]
    for phase in ("decode",) if alike else ("decode", "prefill"):
        op, device = ops[phase], where[phase]
        if op not in _RUNS_ON:
            continue
        wanted, plural = _RUNS_ON[op]
        if (HOST if device == HOST else platform) != wanted:
            kind = "the host" if device == HOST else f"{device}, a {platform.upper()}"
            when = "" if alike else f" at {phase}"
            message = f"{op!r} computes on {plural}, but {{path}} is on {kind}{when}"
            findings.add_path(choice.ops_mark, message, parameter.path)
