# SPDX-License-Identifier: Apache-2.0
"""Native rule files as text, from what they should say."""

import re
from collections.abc import Iterable, Mapping, Sequence

from ktx_jax.sharding.choices import Ops
from ktx_jax.sharding.folding import numbers_regex


def layers_pattern(layers: Iterable[int], rest: str = ".*") -> str:
    """A regex for the paths in some layers whose part inside the layer matches `rest`."""
    return rf"model\.layers\.({numbers_regex(layers)})\.{rest}"


def kinds_pattern(kinds: Sequence[str]) -> str:
    """A regex for just these paths inside a layer; those of one module share its name."""
    by_module: dict[str, list[str]] = {}
    for kind in kinds:
        module, _, name = kind.rpartition(".")
        by_module.setdefault(module, []).append(name)
    parts = [(re.escape(module) + r"\." if module else "") + _group(names) for module, names in by_module.items()]
    return parts[0] if len(parts) == 1 else f"({'|'.join(parts)})"


def _group(names: Sequence[str]) -> str:
    escaped = [re.escape(name) for name in names]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"


def rule(match: str, **sets: object) -> str:
    """One row. Regexes are quoted once, so that backslashes stay as they are."""
    quoted = match.replace("'", "''")
    values = "".join(f", {name}: {_yaml(value)}" for name, value in sets.items())
    return f"  - {{match: '{quoted}'{values}}}"


def _yaml(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {item}" for key, item in value.items()) + "}"
    return str(value)


def ops_value(ops: Ops) -> object:
    """An `op` entry: one name where prefill and decode are alike."""
    if ops.prefill == ops.decode:
        return ops.decode
    return {phase: op for phase, op in (("prefill", ops.prefill), ("decode", ops.decode)) if op is not None}


def stages_line(stages: Sequence[Sequence[str]]) -> str:
    """The `stages` entry for stages of one device each."""
    return f"stages: [{', '.join(name for devices in stages for name in devices)}]"


def native_text(comments: Iterable[str], header: Iterable[str], rules: Sequence[str]) -> str:
    """A whole file."""
    body = ["rules:", *rules] if rules else ["rules: []"]
    return "\n".join([*(f"# {line}".rstrip() for line in comments), *header, *body]) + "\n"
