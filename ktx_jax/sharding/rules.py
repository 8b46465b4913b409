# SPDX-License-Identifier: Apache-2.0
"""`Rules`: a rule file in either dialect, checked as far as that is possible without a model."""

import os
from dataclasses import dataclass
from pathlib import Path

from ktx_jax.errors import KtxError
from ktx_jax.sharding.choices import Choices
from ktx_jax.sharding.parameters import Inventory
from ktx_jax.sharding.problems import Findings, Problem, RulesError
from ktx_jax.sharding.resolve_ktransformers import resolve_ktransformers
from ktx_jax.sharding.resolve_native import resolve_native
from ktx_jax.sharding.rules_ktransformers import KTransformersRules, parse_ktransformers
from ktx_jax.sharding.rules_native import NativeRules, parse_native
from ktx_jax.sharding.schema import check_schema
from ktx_jax.sharding.yaml_positions import load_located


@dataclass(frozen=True)
class Rules:
    """A table of regexes that says where each part of a model lies and how it is cut.

    Attributes:
      name: how errors call the file.
      text: what was read.
      content: the parsed rules; their type is the dialect.
    """

    name: str
    text: str
    content: NativeRules | KTransformersRules

    @property
    def dialect(self) -> str:
        """ "native" or "ktransformers"."""
        return "native" if isinstance(self.content, NativeRules) else "ktransformers"

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Rules":
        """Reads a rule file. Raises `RulesError` as `from_text`, and `KtxError` for a file that cannot be read."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise KtxError(f"{path}: the rule file cannot be read: {error}") from error
        return cls.from_text(text, str(path))

    @classmethod
    def from_text(cls, text: str, name: str = "rules") -> "Rules":
        """Reads rules from `text`: a list is ktransformers' dialect, a mapping the native one.

        Raises:
          RulesError: everything that is wrong in the file, each with line and column.
        """
        rules, problems = parse_rules(text, name)
        if rules is None or problems:
            raise RulesError(name, problems)
        return rules

    def choices(self, inventory: Inventory, findings: Findings) -> Choices:
        """What the rules say of a model; what is wrong with that goes to `findings`."""
        if isinstance(self.content, NativeRules):
            return resolve_native(self.content, inventory, findings)
        return resolve_ktransformers(self.content, inventory, findings)


def parse_rules(text: str, name: str) -> tuple[Rules | None, tuple[Problem, ...]]:
    """The rules in `text` and all problems of the file itself. Rules that are broken are left out; None if all are."""
    document, problems = load_located(text)
    if document is None:
        return None, problems
    dialect = "ktransformers" if isinstance(document.value, list) else "native"
    problems += check_schema(document, dialect)
    if problems:
        return None, problems
    findings = Findings()
    parse = parse_native if dialect == "native" else parse_ktransformers
    return Rules(name, text, parse(document, findings)), findings.problems()
