# SPDX-License-Identifier: Apache-2.0
"""ktransformers' dialect: a list of `match` / `replace`, where the first rule that matches a module takes all of it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ktx_jax.sharding.devices import device_name
from ktx_jax.sharding.ktransformers_modules import KNOWN_CLASSES, class_name
from ktx_jax.sharding.problems import Findings, Mark, did_you_mean
from ktx_jax.sharding.yaml_positions import Located

_DEFAULT_THRESHOLD = 30000  # of KDeepseekV2Model, where its rule does not say


@dataclass(frozen=True)
class KTransformersRule:
    """One rule.

    Attributes:
      pattern: searched for in the path; None matches every path.
      class_name: the class the module must have; None for any.
      generate, prefill: devices; out: where results go; None where the rule does not say.
      generate_op, prefill_op: operators under ktransformers' names.
      threshold: of layer-wise prefill, 0 for never; transfers: layers at which hidden states move. On `^model$` only.
      recursive: whether the modules inside are looked at on their own.
    """

    mark: Mark
    pattern: re.Pattern[str] | None
    class_name: str | None
    generate: str | None
    prefill: str | None
    out: str | None
    generate_op: str | None
    prefill_op: str | None
    threshold: int | None
    transfers: Mapping[int, str]
    recursive: bool
    marks: Mapping[str, Mark]
    ignored: tuple[str, ...]  # options without a meaning here


@dataclass(frozen=True)
class KTransformersRules:
    """A file of ktransformers' rules, in order."""

    rules: tuple[KTransformersRule, ...]


def parse_ktransformers(document: Located, findings: Findings) -> KTransformersRules:
    """The rules of a document that is as the schema wants it; what else is wrong goes to `findings`."""
    rules = [_rule(item, findings) for item in document.value]
    return KTransformersRules(tuple(rule for rule in rules if rule is not None))


def _rule(item: Located, findings: Findings) -> KTransformersRule | None:
    match, replace = item.value["match"], item.value["replace"]
    name, cls = match.get("name"), match.get("class")
    pattern, broken = None, False
    if name is not None:
        try:
            pattern = re.compile(name.value)
        except (re.error, RecursionError, OverflowError) as error:
            findings.add(name.mark, f"{name.value!r} is not a regex: {error}")
            broken = True
    if cls is not None and class_name(cls.value) not in KNOWN_CLASSES:
        findings.add(cls.mark, _unknown_class(cls.value))
        broken = True
    if broken:
        return None
    kwargs = replace.get("kwargs")
    values = {} if kwargs is None else {key: value for key, value in kwargs.value.items() if value.value is not None}
    plain = {key: value.plain() for key, value in values.items()}
    recursive = item.get("recursive")
    return KTransformersRule(
        mark=item.mark,
        pattern=pattern,
        class_name=None if cls is None else class_name(cls.value),
        **{key: plain[option] and device_name(plain[option]) if option in plain else None for key, option in _DEVICES},
        generate_op=plain.get("generate_op"),
        prefill_op=plain.get("prefill_op"),
        threshold=_threshold(replace, plain, kwargs),
        transfers={int(layer): device_name(device) for layer, device in plain.get("transfer_map", {}).items()},
        recursive=True if recursive is None else recursive.value,
        marks={key: value.mark for key, value in values.items()},
        ignored=_ignored(plain),
    )


_DEVICES = (("generate", "generate_device"), ("prefill", "prefill_device"), ("out", "out_device"))


def _threshold(replace: Located, plain: Mapping[str, Any], kwargs: Located | None) -> int | None:
    cls = replace.get("class")
    if kwargs is not None and "per_layer_prefill_intput_threshold" in kwargs.value:
        return plain.get("per_layer_prefill_intput_threshold", 0)
    return _DEFAULT_THRESHOLD if cls is not None and cls.value.endswith(".KDeepseekV2Model") else None


def _ignored(plain: Mapping[str, Any]) -> tuple[str, ...]:
    said = []
    if plain.get("absorb_for_prefill") is False:
        said.append("absorb_for_prefill: False has no effect: attention is absorbed in prefill and decode")
    if "backend" in plain:
        said.append(f"backend: {plain['backend']} has no effect: the CPU kernels choose by the processor")
    return tuple(said)


def _unknown_class(dotted: str) -> str:
    name = class_name(dotted)
    if "V3" in name:
        return f"the class {dotted} belongs to another model: DeepSeek-V2 has none of it"
    near = did_you_mean(name, KNOWN_CLASSES)
    return f"no module of DeepSeek-V2 has the class {dotted}{near or '; it takes ' + ', '.join(sorted(KNOWN_CLASSES))}"
