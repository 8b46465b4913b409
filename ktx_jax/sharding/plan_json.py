# SPDX-License-Identifier: Apache-2.0
"""A plan as JSON values."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktx_jax.sharding.plan import PlacedParameter, Plan


def plan_json(plan: "Plan") -> dict[str, Any]:
    """Everything in the plan: sizes, stages, bytes by device, and every parameter."""
    return {
        "rules": plan.name,
        "layers": plan.config.num_hidden_layers,
        "context": plan.context,
        "batch": plan.batch,
        "dtype": plan.dtype,
        "mesh": dict(plan.mesh),
        "prefill_threshold": plan.prefill_threshold,
        "stages": [
            {"devices": list(stage.devices), "layers": list(stage.layers), "others": list(stage.others)}
            for stage in plan.stages
        ],
        "devices": {
            name: {
                "weights": need.weights,
                "cache": need.cache,
                "workspace": need.workspace,
                "streamed": need.streamed,
                "total": need.total,
            }
            for name, need in plan.needs.items()
        },
        "parameters": {parameter.path: parameter_json(parameter) for parameter in plan.parameters},
        "notices": list(plan.notices),
    }


def parameter_json(parameter: "PlacedParameter") -> dict[str, Any]:
    """A parameter's entry, its path left out."""
    return {
        "shape": list(parameter.shape),
        "type": parameter.ggml_type.name,
        "stored_type": parameter.stored_type.name,
        "stage": parameter.stage,
        "devices": list(parameter.devices),
        "spec": [None if not axes else axes[0] if len(axes) == 1 else list(axes) for axes in parameter.spec],
        "bytes": parameter.nbytes,
        "op": {"prefill": parameter.ops.prefill, "decode": parameter.ops.decode},
        "prefill_device": parameter.prefill_device,
    }
