# SPDX-License-Identifier: Apache-2.0
"""Plans in a form to keep: what lies alike in several layers is one line."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from ktx_jax.model.config import Config
from ktx_jax.presets import preset_config
from ktx_jax.sharding.folding import fold_numbers, split_layer
from ktx_jax.sharding.plan import Plan
from ktx_jax.sharding.plan_json import parameter_json
from ktx_jax.sharding.rules import Rules

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).with_name("golden") / "plans"
PRESETS = {"deepseek-v2.5": "v2.5", "deepseek-v2-lite": "v2-lite"}
CONFIGS = sorted(path for name in PRESETS for path in (ROOT / "configs" / name).glob("*.yaml"))
ONE_HOST = [path for path in CONFIGS if path.stem not in ("16gpu", "64gpu")]
"""Those with eight devices or fewer."""


@cache
def preset(name: str) -> Config:
    return preset_config(name)


def config_plan(path: Path) -> Plan:
    """The plan of a file of `configs` for the model whose folder it is in, Q4_K_M."""
    rules = Rules.from_text(path.read_text(encoding="utf-8"), f"{path.parent.name}/{path.name}")
    return Plan.from_rules(preset(PRESETS[path.parent.name]), rules)


def golden_path(path: Path) -> Path:
    return GOLDEN / f"{path.parent.name}-{path.stem}.json"


def folded(plan: Plan) -> str:
    """The resolved plan as JSON, a line for each parameter and all layers in which it lies alike."""
    layers: dict[str, list[int]] = {}
    for parameter in plan.parameters:
        layer, kind = split_layer(parameter.path)
        key = json.dumps([kind, parameter_json(parameter)])
        layers.setdefault(key, []).extend([] if layer is None else [layer])
    lines = []
    for key, numbers in layers.items():
        kind, entry = json.loads(key)
        path = f"model.layers.{fold_numbers(numbers)}.{kind}" if numbers else kind
        lines.append(f"    {json.dumps(path)}: {json.dumps(entry)}")
    head: dict[str, Any] = {
        "mesh": dict(plan.mesh),
        "prefill_threshold": plan.prefill_threshold,
        "stages": [[list(s.devices), fold_numbers(s.layers), list(s.others)] for s in plan.stages],
        "weights": {name: need.weights for name, need in plan.needs.items()},
        "notices": list(plan.notices),
    }
    parts = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    return "{\n" + ",\n".join(parts) + ',\n  "parameters": {\n' + ",\n".join(lines) + "\n  }\n}\n"
