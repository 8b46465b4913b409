# SPDX-License-Identifier: Apache-2.0
"""Rule files that are wrong: each has an error of its own, at its place, that says what to do."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from plan_golden import preset

from ktx_jax.errors import KtxError
from ktx_jax.sharding.plan import Plan, check_rules
from ktx_jax.sharding.problems import Findings, RulesError
from ktx_jax.sharding.rules import Rules, parse_rules


class Case(NamedTuple):
    model: str
    text: str
    place: str  # line:column
    said: str


def read_cases() -> dict[str, Case]:
    """The cases of `bad_rules.txt`."""
    cases = {}
    whole = Path(__file__).with_name("bad_rules.txt").read_text(encoding="utf-8")
    for block in re.split(r"^=== ", whole, flags=re.MULTILINE)[1:]:
        title, _, rest = block.partition("\n")
        marked, _, said = rest.rpartition("---\n")
        before = marked.partition("»")[0]
        place = f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        name, _, model = title.rstrip(")").rpartition(" (")
        cases[name] = Case(model, marked.replace("»", ""), place, said.strip())
    return cases


CASES = read_cases()


@pytest.mark.parametrize("name", CASES)
def test_a_bad_rule_file_has_its_error_at_its_place(name):
    case = CASES[name]
    with pytest.raises(RulesError) as caught:
        Plan.from_rules(preset(case.model), Rules.from_text(case.text, "bad.yaml"))
    lines = [line for line in caught.value.lines if case.said in line]
    assert lines, str(caught.value)
    assert lines[0].startswith(f"bad.yaml:{case.place}: ")
    assert len(caught.value.lines) <= 4, "one mistake should not say much more than once"


def test_there_are_many_and_they_differ():
    assert len(CASES) > 80
    assert len({case.said for case in CASES.values()}) > 70


def test_all_problems_are_found_in_one_pass():
    text = (
        "mesh: {tensor: 2}\n"
        "rules:\n"
        "  - {match: '(', shard: [tensor]}\n"
        "  - {match: lm_head, shard: [expert]}\n"
        "  - {match: nothing, op: xla}\n"
        "  - {match: '.*\\.o_proj', shard: [null, null, tensor]}\n"
    )
    rules, problems = parse_rules(text, "bad.yaml")
    findings = Findings()
    findings.extend(problems)
    assert rules is not None
    check_rules(rules, preset("v2-lite"), "q4_k_m", findings)
    assert [problem.mark.line for problem in findings.problems()] == [3, 4, 5, 6]


def test_more_devices_than_there_are():
    rules = Rules.from_text("stages: 3\nrules:\n  - {match: '.*', stage: 0}\n", "r")
    with pytest.raises(RulesError, match="r:1:9: the rules name gpu:2, but there are 2 devices"):
        Plan.from_rules(preset("v2-lite"), rules, devices=2)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(KtxError, match="cannot be read"):
        Rules.from_file(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"\xff")
    with pytest.raises(KtxError, match="cannot be read"):
        Rules.from_file(tmp_path / "latin.yaml")
