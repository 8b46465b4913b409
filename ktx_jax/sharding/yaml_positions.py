# SPDX-License-Identifier: Apache-2.0
"""YAML whose every value knows its line and column, so that errors can point at it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from ktx_jax.sharding.problems import START, Findings, Mark, Problem

_MAX_DEPTH = 20  # of lists and mappings; rule files need six


@dataclass(frozen=True)
class Located:
    """A scalar, a list of `Located`, or a mapping to `Located`, with its place in the file."""

    value: Any
    mark: Mark
    key_marks: Mapping[Any, Mark] = field(default_factory=dict)

    def get(self, key: Any) -> "Located | None":
        """The value under a key; None where there is none, or an explicit null."""
        found = self.value.get(key)
        return None if found is None or found.value is None else found

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        return [item.plain() for item in self.value] if isinstance(self.value, list) else self.value


def load_located(text: str) -> tuple[Located | None, tuple[Problem, ...]]:
    """The one document in `text`, and what is wrong with it as YAML: syntax, duplicate keys, keys that are no scalars.

    None where the syntax is broken, or the document too deep or recursive.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, (Problem(START, "the file is empty: a rule file has at least `rules: []`"),)
        findings = Findings()
        return _located(loader, node, findings, 0), findings.problems()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        context = f" ({error.context})" if error.context else ""
        return None, (Problem(_mark(mark), f"not valid YAML: {error.problem}{context}"),)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        return None, (Problem(START, f"not valid YAML: {' '.join(str(error).split())}"),)


def _mark(mark: Any) -> Mark:
    return START if mark is None else Mark(mark.line + 1, mark.column + 1)


def _located(loader: yaml.SafeLoader, node: yaml.Node, findings: Findings, depth: int) -> Located:
    mark = _mark(node.start_mark)
    if depth > _MAX_DEPTH:
        raise yaml.constructor.ConstructorError(None, None, "nested too deeply, or within itself", node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        return Located([_located(loader, item, findings, depth + 1) for item in node.value], mark)
    if not isinstance(node, yaml.MappingNode):
        return Located(loader.construct_object(node, deep=True), mark)
    values: dict[Any, Located] = {}
    marks: dict[Any, Mark] = {}
    for key_node, value_node in node.value:
        at = _mark(key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode):
            findings.add(at, "a key must be a word or a number, not a list or a mapping")
            continue
        key = loader.construct_object(key_node, deep=True)
        if key in values:
            findings.add(at, f"the key {key!r} occurs twice; first in line {marks[key].line}")
            continue
        values[key], marks[key] = _located(loader, value_node, findings, depth + 1), at
    return Located(values, mark, marks)
