# SPDX-License-Identifier: Apache-2.0
"""Native rules against a model: for each concern the first rule that matches and sets it wins."""

from ktx_jax.sharding.choices import Choice, Choices, Ops
from ktx_jax.sharding.folding import fold_paths
from ktx_jax.sharding.parameters import Inventory
from ktx_jax.sharding.problems import START, Findings, did_you_mean
from ktx_jax.sharding.rules_native import CONCERNS, NativeRule, NativeRules

_NAMES = {"where": "`stage` or `device`", "shard": "`shard`", "op": "`op`"}


def resolve_native(rules: NativeRules, inventory: Inventory, findings: Findings) -> Choices:
    """What the rules say of each module. Rules that match nothing, or never take effect, go to `findings`."""
    won: dict[tuple[int, str], int] = {}  # how many modules a rule's concern decides
    beaten: dict[tuple[int, str], set[int]] = {}  # the rules that decide in its place
    by_path: dict[str, Choice] = {}
    matched = [set(filter(rule.pattern.fullmatch, inventory.paths)) for rule in rules.rules]
    for path in inventory.paths:
        winners: dict[str, int] = {}
        for index, rule in enumerate(rules.rules):
            if path not in matched[index]:
                continue
            for concern in CONCERNS:
                if getattr(rule, concern) is None or (concern == "shard" and path not in inventory.by_path):
                    continue
                first = winners.setdefault(concern, index)
                if first == index:
                    won[index, concern] = won.get((index, concern), 0) + 1
                else:
                    beaten.setdefault((index, concern), set()).add(first)
        by_path[path] = _choice(rules, winners)
    for index, rule in enumerate(rules.rules):
        if not matched[index]:
            findings.add(rule.marks["match"], _matches_nothing(rule, inventory))
            continue
        for concern in CONCERNS:
            if getattr(rule, concern) is not None and (index, concern) not in won:
                findings.add(rule.marks[concern], _never(rules, concern, beaten.get((index, concern), set())))
    return Choices(
        mesh=rules.mesh,
        stages=rules.stages,
        by_path=by_path,
        prefill_threshold=rules.prefill_threshold,
        uncovered="ignore" if rules.broken else "error",
        stage_mark=rules.stage_mark,
    )


def _choice(rules: NativeRules, winners: dict[str, int]) -> Choice:
    rule_of = {concern: rules.rules[index] for concern, index in winners.items()}
    values = [getattr(rule_of.get(concern), concern, None) for concern in CONCERNS]
    marks = [rule_of[concern].marks[concern] if concern in rule_of else START for concern in CONCERNS]
    return Choice(values[0], values[1], values[2] or Ops(), *marks)


def _matches_nothing(rule: NativeRule, inventory: Inventory) -> str:
    pattern = rule.pattern.pattern
    if begun := [path for path in inventory.paths if rule.pattern.match(path)]:
        hint = f"it matches only the beginning of {fold_paths(begun)[0]}; a regex must match the whole path"
    elif found := [path for path in inventory.paths if rule.pattern.search(path)]:
        hint = f"it matches only a part of {fold_paths(found)[0]}; a regex must match the whole path"
    else:
        kinds = {parameter.kind for parameter in inventory.parameters}
        hint = "no path is like it" + did_you_mean(pattern.rpartition("\\.")[2], [k.rpartition(".")[2] for k in kinds])
    return f"the rule {pattern!r} matches nothing in this model: {hint}"


def _never(rules: NativeRules, concern: str, before: set[int]) -> str:
    if not before:
        return f"{_NAMES[concern]} has no effect: the rule matches only modules without parameters"
    lines = sorted(rules.rules[index].marks["match"].line for index in before)
    shown = ", ".join(map(str, lines[:4])) + (", ..." if len(lines) > 4 else "")
    return (
        f"{_NAMES[concern]} has no effect: everything that the rule matches is set before, "
        f"in line{'s' if len(lines) > 1 else ''} {shown}; the first rule that sets it wins"
    )
