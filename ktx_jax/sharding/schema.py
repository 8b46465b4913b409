# SPDX-License-Identifier: Apache-2.0
"""Checks a rule file against the JSON Schema that comes with the package, and says where and what is wrong.

Understands the part of JSON Schema that `rules.schema.json` uses; where a schema gives alternatives, the one whose JSON
type is the value's is taken, so that an error speaks of what was meant. `description` is how a value is called.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from ktx_jax.sharding.problems import Findings, Problem, did_you_mean
from ktx_jax.sharding.yaml_positions import Located

SCHEMA_FILE = Path(__file__).with_name("rules.schema.json")
_TYPES = {
    "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float),
    "null": type(None),
}  # fmt: skip


@cache
def rules_schema() -> dict[str, Any]:
    """The schema of both dialects."""
    return json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


def check_schema(document: Located, dialect: str) -> tuple[Problem, ...]:
    """What in `document` is not as the schema of `dialect` ("native", "ktransformers") wants it."""
    findings = Findings()
    _check(document, {"$ref": f"#/$defs/{dialect}"}, "the file", findings)
    return findings.problems()


def _resolve(schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        target = rules_schema()["$defs"][schema["$ref"].removeprefix("#/$defs/")]
        schema = {**target, **{key: value for key, value in schema.items() if key != "$ref"}}
    return schema


def _is(value: Any, schema: dict[str, Any]) -> bool:
    """Whether the value's JSON type is one that the schema allows."""
    schema = _resolve(schema)
    if "anyOf" in schema:
        return any(_is(value, option) for option in schema["anyOf"])
    if "type" not in schema:
        return True
    names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    boolean = isinstance(value, bool)
    return any(isinstance(value, _TYPES[name]) and (not boolean or name == "boolean") for name in names)


def _check(node: Located, schema: dict[str, Any], name: str, findings: Findings) -> None:
    schema = _resolve(schema)
    while "anyOf" in schema:
        fitting = [option for option in schema["anyOf"] if _is(node.value, option)]
        if not fitting:
            break
        schema = {"description": schema.get("description"), **_resolve(fitting[0])}
    said = schema.get("description") or schema.get("type")
    wrong = f"`{name}` should be {said}; found {_show(node)}"
    if not _is(node.value, schema):
        findings.add(node.mark, wrong)
        return
    value = node.value
    if isinstance(value, dict):
        _check_object(node, schema, name, findings)
    elif isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            findings.add(node.mark, wrong)
        for item in value:
            _check(item, schema.get("items", {}), name, findings)
    elif isinstance(value, str):
        if "enum" in schema and value not in schema["enum"]:
            findings.add(node.mark, wrong + did_you_mean(value, schema["enum"]))
        if "pattern" in schema and not re.search(schema["pattern"], value):
            findings.add(node.mark, wrong)
    elif "minimum" in schema and value < schema["minimum"]:
        findings.add(node.mark, wrong)


def _check_object(node: Located, schema: dict[str, Any], name: str, findings: Findings) -> None:
    known = schema.get("properties", {})
    names = schema.get("propertyNames")
    for key, item in node.value.items():
        if str(key) in known:
            _check(item, known[str(key)], str(key), findings)
        elif schema.get("additionalProperties") is False:
            meant = did_you_mean(str(key), known) or f"; it takes {', '.join(known)}"
            findings.add(node.key_marks[key], f"`{name}` has no key {key!r}{meant}")
        else:
            if names and not re.search(names["pattern"], str(key)):
                findings.add(node.key_marks[key], f"a key of `{name}` should be {names['description']}; found {key!r}")
            _check(item, schema.get("additionalProperties", {}), f"{name}.{key}", findings)
    for key in schema.get("required", ()):
        if key not in node.value:
            findings.add(node.mark, f"`{name}` lacks the key {key!r}")
    if len(node.value) < schema.get("minProperties", 0):
        findings.add(node.mark, f"`{name}` should be {schema['description']}; found {_show(node)}")


def _show(node: Located) -> str:
    if isinstance(node.value, dict):
        return "a mapping" if node.value else "an empty mapping"
    if isinstance(node.value, list):
        return "a list" if node.value else "an empty list"
    return "nothing" if node.value is None else repr(node.value)
