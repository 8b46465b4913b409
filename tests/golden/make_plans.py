# SPDX-License-Identifier: Apache-2.0
"""Writes the resolved plan of every file in `configs`: python -m golden.make_plans, in `tests`. Read the diff."""

from plan_golden import CONFIGS, GOLDEN, config_plan, folded, golden_path

if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for stale in GOLDEN.glob("*.json"):
        stale.unlink()
    for path in CONFIGS:
        golden_path(path).write_text(folded(config_plan(path)), encoding="utf-8")
