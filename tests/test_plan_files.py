# SPDX-License-Identifier: Apache-2.0
"""The rule files that come with the package: each resolves as it is kept, and conversions place the same things."""

import re
import subprocess
import sys

import pytest
from plan_golden import CONFIGS, PRESETS, ROOT, config_plan, folded, golden_path, preset

from ktx_jax.resources import configs
from ktx_jax.sharding.convert import convert_ktransformers
from ktx_jax.sharding.plan import Plan
from ktx_jax.sharding.rules import Rules
from ktx_jax.sharding.targets import load_target, target_names

NAMES = [f"{path.parent.name}/{path.stem}" for path in CONFIGS]
KTRANSFORMERS = [path for path in CONFIGS if path.stem.startswith("ktransformers")]


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_a_file_resolves_as_it_is_kept(path):
    assert folded(config_plan(path)) == golden_path(path).read_text(encoding="utf-8"), (
        "if the change is meant: python -m golden.make_plans, in tests, and read the diff"
    )


def test_no_kept_plan_is_stale():
    assert {golden_path(path).name for path in CONFIGS} == {p.name for p in golden_path(CONFIGS[0]).parent.iterdir()}


@pytest.mark.parametrize("path", KTRANSFORMERS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_conversion_places_the_same_things(path):
    config, rules = preset(PRESETS[path.parent.name]), Rules.from_file(path)
    text = convert_ktransformers(rules, config)
    native = Plan.from_rules(config, Rules.from_text(text))
    original = Plan.from_rules(config, rules)
    assert len(rules.content.rules) > 12 > len(Rules.from_text(text).content.rules)
    assert native.parameters == original.parameters
    assert native.stages == original.stages
    assert native.needs == original.needs


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_no_big_parameter_is_repeated_unless_a_rule_says_so(path):
    plan = config_plan(path)
    small = ("norm", "q_a_proj", "kv_a_proj_with_mqa", "mlp.gate")
    for p in plan.parameters:
        if len(p.devices) > 1 and not any(p.spec):
            assert p.path.endswith(small), p.path


def test_targets_are_read():
    assert target_names() == ["a100-80g", "cpu", "h100", "h200", "rtx4090"]
    for name in target_names():
        target = load_target(name)
        assert 0 < target.usable < target.memory
        assert target.platform == ("cpu" if name == "cpu" else "gpu")


def test_the_files_come_with_the_package():
    assert (configs() / "deepseek-v2.5" / "8gpu.yaml").is_file()


def test_the_rules_in_the_documentation_are_good():
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "rules.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    for text in blocks:
        Plan.from_rules(preset("v2.5"), Rules.from_text(text))


def test_plans_need_no_jax():
    code = (
        "import sys; from ktx_jax.presets import preset_config; from ktx_jax.sharding.plan import Plan;"
        "from ktx_jax.sharding.rules import Rules;"
        f"plan = Plan.from_rules(preset_config('v2-lite'), Rules.from_file({str(CONFIGS[0])!r}));"
        "plan.summary(), plan.figure().svg(), plan.to_json(), plan.check(10**9); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
