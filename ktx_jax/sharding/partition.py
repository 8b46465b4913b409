# SPDX-License-Identifier: Apache-2.0
"""How a parameter is cut over its stage's mesh, whether that can be done, and the bytes of a piece."""

import math
from collections.abc import Mapping

from ktx_jax.model.config import Config
from ktx_jax.sharding.choices import Choice, Spec
from ktx_jax.sharding.granules import GRANULES, stored_bytes
from ktx_jax.sharding.parameters import Parameter
from ktx_jax.sharding.problems import START, Findings

_BY_HEAD = ("self_attn.k_b_proj", "self_attn.v_b_proj")

BIG = 10**6
"""Bytes from which a parameter is repeated only where a rule says `replicate`."""


def whole(parameter: Parameter) -> Spec:
    """The spec of a parameter that nothing cuts."""
    return ((),) * len(parameter.shape)


def partition(
    parameter: Parameter, choice: Choice, mesh: Mapping[str, int], config: Config, covered: bool, findings: Findings
) -> Spec:
    """The parameter's spec over `mesh`, one entry a dimension. What cannot be goes to `findings`.

    `covered`: whether a parameter without a `shard` rule is an error.
    """
    shard = choice.shard
    if shard is None:
        if covered:
            findings.add_path(
                START, "no rule says how {path} is cut: a rule that sets `shard` must match it", parameter.path
            )
        return whole(parameter)
    if shard.spec is None:
        return whole(parameter)
    if len(shard.spec) > len(parameter.shape):
        findings.add_path(
            choice.shard_mark,
            f"`shard` has {len(shard.spec)} entries, but {{path}} has {len(parameter.shape)} dimensions: "
            f"{_show(parameter)}",
            parameter.path,
        )
        return whole(parameter)
    spec = shard.spec + ((),) * (len(parameter.shape) - len(shard.spec))
    if not _check_cuts(parameter, spec, choice, mesh, config, findings):
        return whole(parameter)
    _check_repeated(parameter, spec, choice, mesh, findings)
    return spec


def cuts(spec: Spec, mesh: Mapping[str, int]) -> tuple[int, ...]:
    """Into how many parts each dimension is cut."""
    return tuple(math.prod(mesh[axis] for axis in axes) for axes in spec)


def _check_cuts(
    parameter: Parameter, spec: Spec, choice: Choice, mesh: Mapping[str, int], config: Config, findings: Findings
) -> bool:
    last, good = len(parameter.shape) - 1, True
    if any("data" in axes for axes in spec):
        findings.add_path(
            choice.shard_mark,
            "{path} would be cut over `data`, which splits requests, not weights: cut it over `expert` or `tensor`",
            parameter.path,
        )
        return False
    if parameter.kind in _BY_HEAD and any(spec[1:]):
        findings.add_path(
            choice.shard_mark,
            f"{{path}} can be cut by heads alone, its dimension 0; {_show(parameter)}",
            parameter.path,
        )
        return False
    for axis, (size, parts) in enumerate(zip(parameter.shape, cuts(spec, mesh), strict=True)):
        if parts == 1:
            continue
        over = f"{' x '.join(spec[axis])} ({parts} parts)"
        granule, why = _granule(parameter, axis, config) if size % parts == 0 else (1, "")
        if size % parts:
            message = (
                f"{{path}} cannot be cut: its dimension {axis} of {size} is not divisible by {over}; {_show(parameter)}"
            )
        elif size // parts % granule:
            message = (
                f"{{path}} cannot be cut over {over}: {size} / {parts} = {size // parts} {why}; {_show(parameter)}"
            )
        else:
            continue
        findings.add_path(choice.shard_mark, message + _advice(parameter, axis == last), parameter.path)
        good = False
    return good


def _granule(parameter: Parameter, axis: int, config: Config) -> tuple[int, str]:
    """What must stay together along an axis, and how to say so."""
    if axis == 0 and parameter.kind in ("self_attn.q_proj", "self_attn.q_b_proj"):
        return config.qk_head_dim, f"would cut a head, whose queries are {config.qk_head_dim} wide"
    if axis < len(parameter.shape) - 1:
        return 1, ""
    granule, kind = GRANULES[parameter.stored_type], parameter.stored_type.name
    if parameter.kind == "self_attn.o_proj":
        return math.lcm(granule, config.v_head_dim), f"would cut a head, whose values are {config.v_head_dim} wide"
    return granule, f"would cut a granule: {kind} can be cut every {granule} values along its input dimension"


def _advice(parameter: Parameter, along_k: bool) -> str:
    if parameter.is_expert:
        return ": cut the experts (dimension 0) instead" if along_k else ""
    return ": cut another dimension, or `replicate` it" if along_k else ""


def _check_repeated(
    parameter: Parameter, spec: Spec, choice: Choice, mesh: Mapping[str, int], findings: Findings
) -> None:
    """No big parameter is repeated by oversight. Over `data` all are, unless cut: it splits requests, not weights."""
    if choice.shard is None or stored_bytes(parameter.shape, parameter.stored_type) < BIG:
        return
    used = {axis for axes in spec for axis in axes} | set(choice.shard.replicate) | {"data"}
    idle = [axis for axis, size in mesh.items() if size > 1 and axis not in used]
    if not idle:
        return
    size = stored_bytes(parameter.shape, parameter.stored_type)
    cut = any(spec)
    say = f"add `replicate: [{', '.join(idle)}]`" if cut else "write `shard: replicate`"
    findings.add_path(
        choice.shard_mark,
        f"{{path}} ({size / 1e6:.1f} MB) would be repeated over {' and '.join(idle)}: "
        f"cut it along {'that axis' if len(idle) == 1 else 'those axes'} too, or {say} if that is meant",
        parameter.path,
    )


def _show(parameter: Parameter) -> str:
    return f"its shape is {' x '.join(map(str, parameter.shape))}, {parameter.stored_type.name}"
