# SPDX-License-Identifier: Apache-2.0
"""The documentation that every CPython carries, as training text for the embedded model.

Two sources, both under the PSF documentation licence: the help topics of `pydoc_data.topics`, and the docstrings of
the standard library (parsed with `ast`, never imported) and of the built-in types. The order is deterministic, so one
Python version always gives the same corpus.
"""

import ast
import hashlib
import importlib
import inspect
import itertools
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DROPPED = {
    "test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "ensurepip",
    "msilib", "pydoc_data", "encodings", "ntpath", "nturl2path",
}  # fmt: skip
LICENCE_WORDS = ("Permission to use", "All Rights Reserved", "WITHOUT WARRANTY", "THE SOFTWARE IS PROVIDED")
COMPILED_MODULES = (
    "builtins", "math", "cmath", "itertools", "time", "_functools", "_collections", "_thread", "zlib", "binascii",
)  # fmt: skip
PUBLIC_NAME = {  # where users find what another module defines
    "_pydecimal": "decimal", "_collections_abc": "collections.abc", "_pyio": "io", "_weakrefset": "weakref",
    "_functools": "functools", "_collections": "collections", "_thread": "threading",
    "posixpath": "os.path", "genericpath": "os.path",
}  # fmt: skip
PLAIN_QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "…": "..."})
MOST_CODE_LINES = 6
HEADING = re.compile(r"^(\S.*)\n([*=~-])\2{3,}$", re.MULTILINE)
HELD_OUT_ONE_IN = 40


@dataclass(frozen=True, slots=True)
class Entry:
    """One documented thing: a help topic, or a module, class, function or method with its docstring."""

    page: str  # the module or topic it belongs to
    name: str  # qualified, "textwrap.TextWrapper.fill"
    kind: str  # "topic", "module", "class", "function" or "method"
    signature: str  # "(self, text)", "" where there is none
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the entry is kept from training, to measure loss on."""
        return int(hashlib.sha256(f"{self.page} {self.name}".encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0

    @property
    def public(self) -> bool:
        """Whether no part of the name is private."""
        return not any(part.startswith("_") for part in self.name.split("."))


def is_wrapped(lines: list[str]) -> bool:
    """Whether lines are one paragraph or list item broken where the next word did not fit, not code or a table."""
    indents = {len(line) - len(line.lstrip()) for line in lines[1:]}
    width = max(len(line) for line in lines)
    pairs = itertools.pairwise(lines)
    return (
        len(indents) <= 1
        and (len(lines) == 1 or width >= 45)
        and all(len(line) + len(after.split()[0]) > width - 14 for line, after in pairs)
        and not any(re.search(r"\S {3,}\S", line) for line in lines)
    )


def is_noise(block: str) -> bool:
    """Whether a block is none of the prose and short code to learn from: sessions, grammar, tables, licences."""
    return (
        ">>>" in block
        or "::=" in block
        or re.search(r"^\s*[+|]|[=*~-]{5}", block, re.MULTILINE) is not None
        or any(word in block for word in LICENCE_WORDS)
        or (block.count("\n") >= MOST_CODE_LINES and not is_wrapped(block.split("\n")))
    )


def reflow(text: str) -> str:
    """Clean a docstring: wrapped paragraphs and list items become one line each, short code keeps its lines."""
    out = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text).translate(PLAIN_QUOTES)):
        items = re.split(r"\n(?=\s*[-*] )", "\n".join(line.rstrip() for line in block.splitlines() if line.strip()))
        for item in items:
            lines = item.split("\n")
            if is_noise(item) or not item:
                continue
            indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
            sentence = re.sub(r"(?<=[.!?]) +", " ", " ".join(line.strip() for line in lines))
            out.append(indent + sentence if is_wrapped(lines) else "\n".join(lines))
    return "\n\n".join(out)


def topic_entries() -> list[Entry]:
    """The sections of the help topics, each once, though the topics overlap."""
    topics = importlib.import_module("pydoc_data.topics").topics
    entries = []
    for topic in sorted(topics, key=lambda key: (-len(topics[key]), key)):
        parts = HEADING.split(topics[topic].split("\nRelated help topics:")[0])  # text, (title, underline, text)...
        for title, body in zip(parts[1::3], parts[3::3], strict=True):
            text = reflow(body)
            if text:
                entries.append(Entry(f"topic {topic}", title, "topic", "", f"{title}\n\n{text}"))
    return entries


def signature_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The arguments as one would call with, "(text, width=70)": without `self` and annotations."""
    args = node.args
    for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]:
        if arg is not None:
            arg.annotation = None
    if args.args and args.args[0].arg in ("self", "cls"):
        args.args = args.args[1:]
        args.defaults = args.defaults[: len(args.args) + len(args.posonlyargs)]
    text = f"({ast.unparse(args)})"
    return text if len(text) <= 100 else "(...)"


def walk_definitions(node: ast.AST, page: str, prefix: str) -> Iterator[Entry]:
    """Entries of the classes and functions defined in a module or class, in source order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.If, ast.Try)):
            yield from walk_definitions(child, page, prefix)
        if not isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        name = f"{prefix}.{child.name}"
        doc = ast.get_docstring(child)
        if isinstance(child, ast.ClassDef):
            if doc:
                yield Entry(page, name, "class", "", reflow(doc))
            yield from walk_definitions(child, page, name)
        elif doc:
            kind = "method" if isinstance(node, ast.ClassDef) else "function"
            yield Entry(page, name, kind, signature_of(child), reflow(doc))


def library_entries(lib: Path) -> Iterator[Entry]:
    """Entries of every module under the standard library's folder."""
    for path in sorted(lib.rglob("*.py")):
        relative = path.relative_to(lib).with_suffix("")
        parts = relative.parts[:-1] if relative.name == "__init__" else relative.parts
        if DROPPED & set(parts) or not parts:
            continue
        tree = ast.parse(path.read_bytes())
        page = PUBLIC_NAME.get(parts[0], ".".join(parts))
        doc = ast.get_docstring(tree)
        if doc:
            yield Entry(page, page, "module", "", reflow(doc))
        yield from walk_definitions(tree, page, page)


def compiled_entries() -> Iterator[Entry]:
    """Entries of the built-in types and of a few modules written in C, whose docstrings no source file holds."""
    for module_name in COMPILED_MODULES:
        module = importlib.import_module(module_name)
        page = PUBLIC_NAME.get(module_name, module_name)
        prefix = "" if page == "builtins" else f"{page}."
        for name, value in sorted(vars(module).items()):
            doc = inspect.getdoc(value)
            if name.startswith("_") or not callable(value) or not doc:
                continue
            yield Entry(page, prefix + name, "class" if isinstance(value, type) else "function", "", reflow(doc))
            members = sorted(vars(value).items()) if isinstance(value, type) else []
            for member, method in members:
                doc = getattr(method, "__doc__", None)
                if callable(method) and isinstance(doc, str) and not member.startswith("_"):
                    yield Entry(page, f"{prefix}{name}.{member}", "method", "", reflow(doc))


def load_entries() -> list[Entry]:
    """All entries, each text once, in a fixed order."""
    lib = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    entries = []
    for entry in [*topic_entries(), *compiled_entries(), *library_entries(lib)]:
        if len(entry.text) >= 20 and entry.text not in seen:
            seen.add(entry.text)
            entries.append(entry)
    return entries


def render(entry: Entry) -> str:
    """An entry as it stands on a page of documentation: its heading, then its text indented below."""
    if entry.kind == "topic":
        return entry.text
    heading = f"class {entry.name}" if entry.kind == "class" else entry.name + entry.signature
    return heading + "\n" + "\n".join(f"    {line}" if line else "" for line in entry.text.split("\n"))


def pages(entries: list[Entry]) -> list[str]:
    """One text a module or topic, its entries joined."""
    by_page: dict[str, list[str]] = {}
    for entry in entries:
        by_page.setdefault(entry.page, []).append(render(entry))
    return ["\n\n".join(parts) for parts in by_page.values()]
