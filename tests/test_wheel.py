# SPDX-License-Identifier: Apache-2.0
"""The wheel, as somebody installs it: what it holds, and that it works from an empty folder."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, ROOT]
    subprocess.run(command, check=True, timeout=1500)
    [path] = out.glob("ktx_jax-*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """An interpreter that has the wheel and, beside it, this one's dependencies but not this checkout."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    query = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # A path file's folder is searched, but path files in it are not read: an editable install there stays unseen.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_it_is_built_for_the_oldest_jax():
    """XLA takes kernels that were built for an older interface than its own, and refuses those for a newer one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [built] = [r for r in project["build-system"]["requires"] if r.startswith("jax")]
    [needed] = [r for r in project["project"]["dependencies"] if r.startswith("jax>")]
    assert needed.startswith(built.replace("==", ">=") + ",")


def test_it_holds_what_it_needs_and_nothing_named_ffi(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"ktx_jax", "ktx_ffi", "pallas_kernels"}
    for needed in ("ktx_jax/data/tiny-q4_k_m.gguf", "ktx_jax/data/tiny-q8_0.gguf", "ktx_jax/data/README.md"):
        assert needed in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.endswith((".cc", ".h", ".gitkeep")) or "tests/" in name]


def test_it_works_from_an_empty_folder(python, tmp_path):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": ""}
    (tmp_path / "empty").mkdir()
    run = subprocess.run(
        [python, "-m", "ktx_jax.cli", "demo"],
        cwd=tmp_path / "empty", env=env, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    where = subprocess.run([python, "-c", "import ktx_jax; print(ktx_jax.__file__)"], env=env, capture_output=True,
                           text=True, check=True, cwd=tmp_path / "empty").stdout  # fmt: skip
    assert str(ROOT) not in where
