# SPDX-License-Identifier: Apache-2.0
"""The CUDA plugin stands aside where there is no driver."""

import importlib
import sys

import pytest

from ktx_jax import cuda_plugin


@pytest.fixture
def installed(monkeypatch):
    """A plugin for CUDA 12, and none of its modules imported."""
    monkeypatch.setattr(cuda_plugin, "find_spec", lambda name: name == "jax_cuda12_plugin" or None)
    for name in ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13", "jax_cuda12_plugin", "jax_cuda13_plugin"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(before):
        del sys.modules[name]


def test_without_a_driver_there_is_nothing_to_start(installed, monkeypatch):
    monkeypatch.setattr(cuda_plugin, "_driver", lambda: False)
    cuda_plugin.leave_out_cuda()
    importlib.import_module("jax_plugins.xla_cuda12").initialize()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("jax_cuda12_plugin")
    assert "jax_plugins.xla_cuda13" not in sys.modules
    cuda_plugin.leave_out_cuda()  # a second time changes nothing


def test_with_a_driver_it_is_left_alone(installed, monkeypatch):
    monkeypatch.setattr(cuda_plugin, "_driver", lambda: True)
    cuda_plugin.leave_out_cuda()
    assert "jax_plugins.xla_cuda12" not in sys.modules


def test_without_a_plugin_nothing_is_done(installed, monkeypatch):
    monkeypatch.setattr(cuda_plugin, "find_spec", lambda name: None)
    monkeypatch.setattr(cuda_plugin, "_driver", lambda: pytest.fail("nobody needs to know"))
    cuda_plugin.leave_out_cuda()
