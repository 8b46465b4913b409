# SPDX-License-Identifier: Apache-2.0
"""Measures llama.cpp through llama-cpp-python's bindings of its C API; run by an interpreter that has them."""

import ctypes
import sys
import time
from typing import Any

import common
import llama_cpp as api
import numpy as np


@api.llama_log_callback
def _log(level: int, text: bytes, data: Any) -> None:
    sys.stderr.write(text.decode(errors="replace"))


class _Model:
    """A loaded model with an empty context; threads and repacking as told, all else llama.cpp's defaults."""

    def __init__(self, job: dict[str, Any], context: int):
        api.llama_log_set(_log, ctypes.c_void_p(0))
        api.llama_backend_init()
        begin = time.perf_counter()
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = job["repack"]
        self.model = api.llama_model_load_from_file(job["file"].encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {job['file']}")
        settings = api.llama_context_default_params()
        settings.n_ctx = context
        settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = job["threads"]
        self.context = api.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context for {job['file']}")
        self.load_s = time.perf_counter() - begin
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def clear(self) -> None:
        api.llama_memory_clear(api.llama_get_memory(self.context), True)

    def next_token(self, tokens: list[int]) -> int:
        """Adds the tokens to the cache, 512 at a time; the likeliest one after them."""
        for at in range(0, len(tokens), 512):
            part = tokens[at : at + 512]
            ids = (api.llama_token * len(part))(*part)  # the batch only points to them
            if status := api.llama_decode(self.context, api.llama_batch_get_one(ids, len(part))):
                raise RuntimeError(f"llama_decode returned {status}")
        logits = api.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())


def model(job: dict[str, Any]) -> dict[str, Any]:
    """Load seconds, seconds of each prefill, tokens/s of each reply, peak memory."""
    lengths = {int(length): times for length, times in job["prefill"].items()}
    llm = _Model(job, max(16, *lengths) + job["decode"] + 16)
    llm.next_token(common.prompt(64, seed=0))
    prefill: dict[int, list[float]] = {length: [] for length in lengths}
    for length, times in lengths.items():
        for seed in range(1, times + 1):
            llm.clear()
            tokens = common.prompt(length, seed)
            prefill[length].append(common.timed(lambda tokens=tokens: llm.next_token(tokens)))
    decode = []
    for seed in range(1, job["replies"] + 1):
        llm.clear()
        token = llm.next_token(common.prompt(16, seed))
        begin = time.perf_counter()
        for _ in range(job["decode"]):
            token = llm.next_token([token])
        decode.append(job["decode"] / (time.perf_counter() - begin))
    return {"load_s": llm.load_s, "prefill_s": prefill, "decode_tok_s": decode, "peak_rss": common.peak_rss()}


def about(job: dict[str, Any]) -> dict[str, Any]:
    """Which build this is."""
    return {"version": api.__version__, "build": api.llama_print_system_info().decode()}


if __name__ == "__main__":
    common.main({f.__name__: f for f in (model, about)})
