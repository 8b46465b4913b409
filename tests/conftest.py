# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Threads of XLA, before there are any: in JAX's interpreter of GPU kernels each warpgroup that waits holds one of them.
os.environ.setdefault("NPROC", str(max(8, os.cpu_count() or 1)))

import jax
import jaxtyping
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def compilations() -> Iterator[Callable[[], int]]:
    """Gives how many programs JAX has compiled, or taken from its cache on disk, since it was last asked."""
    names: list[str] = []

    def hear(event: str, duration_secs: float, **kwargs: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(event)

    def since() -> int:
        count = len(names)
        names.clear()
        return count

    jax.monitoring.register_event_duration_secs_listener(hear)
    yield since
    jax.monitoring.unregister_event_duration_listener(hear)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without runtime type checks, as it is where people work."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def gpu_compiler() -> None:
    """The compiler for GPUs that are not here; tests that need it skip where the extra `aot` is not installed."""
    from ktx_jax.aot.compile import check_installed
    from ktx_jax.errors import KtxError

    try:
        check_installed()
    except KtxError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def oracle() -> Path:
    """Folder of reference models and logits; tests that need it skip where it is absent."""
    path = Path(os.environ.get("KTX_ORACLE", ROOT.parent / "shared" / "oracle"))
    if not path.is_dir():
        pytest.skip("no oracle folder: set KTX_ORACLE to run these cases")
    return path
