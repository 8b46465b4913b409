# SPDX-License-Identifier: Apache-2.0
"""Our reading of the JSON Schema agrees with jsonschema's, and positions are right."""

import json

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_golden import CONFIGS
from test_rules_errors import CASES

from ktx_jax.sharding.schema import check_schema, rules_schema
from ktx_jax.sharding.yaml_positions import load_located


def says_jsonschema(document) -> bool:
    # JSON's keys are text.
    document = json.loads(json.dumps(document))
    dialect = "ktransformers" if isinstance(document, list) else "native"
    schema = rules_schema() | rules_schema()["$defs"][dialect]
    schema.pop("anyOf")
    return jsonschema.Draft202012Validator(schema).is_valid(document)


def says_ours(text) -> bool:
    located, problems = load_located(text)
    assert located is not None, problems
    return not check_schema(located, "ktransformers" if isinstance(located.value, list) else "native")


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(rules_schema())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_files_that_come_along_are_valid(path):
    text = path.read_text(encoding="utf-8")
    jsonschema.Draft202012Validator(rules_schema()).validate(json.loads(json.dumps(yaml.safe_load(text))))
    assert says_ours(text)


# Not those that are no YAML, or have a key twice: jsonschema never sees such.
READ = {name: load_located(case.text) for name, case in CASES.items()}
LOADED = {name: located for name, (located, problems) in READ.items() if located is not None and not problems}


@pytest.mark.parametrize("name", LOADED)
def test_both_agree_on_bad_files(name):
    assert says_ours(CASES[name].text) == says_jsonschema(LOADED[name].plain())


KEYS = ["mesh", "stages", "rules", "match", "stage", "device", "shard", "replicate", "op", "data",
        "tensor", "prefill", "decode", "name", "class", "replace", "kwargs", "recursive", "generate_device",
        "transfer_map", "5"]  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-1, 3), st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["tensor", "data", "replicate", "cpu", "gpu:0", "cuda:1", "gpu:0-3", "xla", "KLinearTorch", ""]),
)  # fmt: skip
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
)
RULES = st.fixed_dictionaries({"match": SCALARS}, optional=dict.fromkeys(KEYS[4:9], DOCUMENTS))
NATIVE = st.fixed_dictionaries(
    {"rules": st.lists(RULES, max_size=3)}, optional={"mesh": DOCUMENTS, "stages": DOCUMENTS}
)
KWARGS = st.dictionaries(st.sampled_from([*KEYS[-3:], "out_device"]), DOCUMENTS, max_size=3)
KT = st.lists(
    st.fixed_dictionaries({"match": DOCUMENTS, "replace": st.fixed_dictionaries({"kwargs": KWARGS})}), max_size=3
)


@given(st.one_of(DOCUMENTS, NATIVE, KT))
@settings(deadline=None)
def test_both_agree(document):
    assert says_ours(yaml.safe_dump(document, allow_unicode=True)) == says_jsonschema(document)


@given(st.text(max_size=60))
@settings(deadline=None)
def test_any_text_is_answered(text):
    located, problems = load_located(text)
    assert located is not None or problems
