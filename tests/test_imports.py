# SPDX-License-Identifier: Apache-2.0
"""Imports point one way, and the command line does not wait for JAX."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the faces down. A room may import its own level and those below.
LEVELS = [
    {"cli", "commands", "server", "evaluate", "aot"},
    {"llm", "async_engine"},
    {"execution"},
    {"engine"},
    {"sharding", "synth", "presets"},
    {"model"},
    {"ops", "tokenizer", "pretokenizers", "chat", "template_sandbox"},
    {"quantized"},
    {"distributed"},
    {"gguf", "resources", "cuda_plugin", "peers"},
    {"errors"},
    {"pallas_kernels", "ktx_ffi"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
SOURCES = sorted((ROOT / "ktx_jax").rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "ktx_jax").parts[0].removesuffix(".py")


def imported_rooms(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module == "ktx_jax"
            names = [f"ktx_jax.{alias.name}" for alias in node.names] if whole else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "ktx_jax" and len(parts) > 1:
                yield parts[1]
            elif parts[0] in LEVELS[-1]:
                yield parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    room = room_of(path)
    if room == "__init__":
        return
    assert room in LEVEL, f"{room} has no level yet: add it to LEVELS"
    up = {other for other in imported_rooms(path) if LEVEL[other] < LEVEL[room]}
    assert not up, f"{path.name} imports from above: {up}"


@pytest.mark.parametrize("package", ["pallas_kernels", "ffi"])
def test_kernels_know_nothing_of_the_library(package):
    for path in (ROOT / package).rglob("*.py"):
        assert not [name for name in imported_rooms(path) if name not in LEVELS[-1]], path


def test_the_package_and_the_command_line_import_no_jax():
    code = "import sys, ktx_jax, ktx_jax.cli; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
