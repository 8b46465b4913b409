# SPDX-License-Identifier: Apache-2.0
"""llama-cpp-python's server with repacking as told: python llama_server.py 0|1 SERVER-ARGUMENTS..."""

import runpy
import sys

import llama_cpp

_REPACK = sys.argv.pop(1) == "1"
_default = llama_cpp.llama_model_default_params


def _params() -> llama_cpp.llama_model_params:
    params = _default()
    params.use_extra_bufts = _REPACK
    return params


if __name__ == "__main__":
    llama_cpp.llama_model_default_params = llama_cpp.llama_cpp.llama_model_default_params = _params
    runpy.run_module("llama_cpp.server", run_name="__main__")
