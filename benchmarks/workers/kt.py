# SPDX-License-Identifier: Apache-2.0
"""Measures the llamafile experts of kt-kernel (ktransformers); run by an interpreter that has it."""

from typing import Any

import common
import kt_kernel
import torch
from kt_kernel import kt_kernel_ext
from kt_kernel.utils.loader import GGUFLoader


class _Layer:
    """One layer's experts. The package's own wrapper wants a GPU for its buffers; what it wraps does not."""

    def __init__(self, job: dict[str, Any]):
        shape = job["shape"]
        workers = kt_kernel_ext.WorkerPoolConfig()
        workers.subpool_count, workers.subpool_numa_map, workers.subpool_thread_count = 1, [0], [job["threads"]]
        self.pool = kt_kernel_ext.CPUInfer(workers)
        self.on_gpu = torch.zeros(shape["experts"], dtype=torch.bool)
        config = kt_kernel_ext.moe.MOEConfig(
            shape["experts"], shape["used"], shape["hidden"], shape["width"], self.on_gpu.data_ptr()
        )
        config.layer_idx, config.pool = job["layer"], self.pool.backend_
        # As the package's wrapper sets them.
        config.m_block, config.group_min_len = 32, 10
        config.max_len = config.group_max_len = max(job["tokens"])
        config.hidden_type = kt_kernel_ext.kvcache.ggml_type.BF16
        loader = GGUFLoader(job["file"])
        self.tensors = []  # read where they lie, not copied
        for part in ("gate", "up", "down"):
            name = f"blk.{job['layer']}.ffn_{part}_exps.weight"
            data, kind = loader.get_undequanted_tensor_and_ggml_type(name)
            self.tensors.append(data)
            setattr(config, f"{part}_proj", data.data_ptr())
            setattr(config, f"{part}_type", kind)
        self.moe = kt_kernel_ext.moe.MOE(config)
        order = torch.arange(shape["experts"], dtype=torch.int32)
        self.run(self.moe.load_weights_task(order.data_ptr()))

    def run(self, task: Any) -> None:
        self.pool.submit(task)
        self.pool.sync()


def experts(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each call of one layer's experts."""
    shape, layer = job["shape"], _Layer(job)

    def apply(count: torch.Tensor, ids: torch.Tensor, share: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
        pointers = (ids.data_ptr(), share.data_ptr(), x.data_ptr(), out.data_ptr())
        layer.run(layer.moe.forward_task(count.data_ptr(), shape["used"], *pointers, False))

    seconds: dict[int, list[float]] = {}
    for tokens, calls in zip(job["tokens"], job["calls"], strict=True):
        count = torch.tensor([tokens], dtype=torch.int32)
        inputs = [
            (count, torch.from_numpy(ids).contiguous(), torch.from_numpy(share), torch.from_numpy(x).bfloat16())
            for x, ids, share in common.expert_inputs(tokens, calls + 1, shape)
        ]
        out = torch.zeros(tokens, shape["hidden"], dtype=torch.bfloat16)
        apply(*inputs[0], out)
        seconds[tokens] = [common.timed(lambda at=at, out=out: apply(*at, out)) for at in inputs[1:]]
    return {"seconds": seconds, "peak_rss": common.peak_rss()}


def about(job: dict[str, Any]) -> dict[str, Any]:
    """Which build this is."""
    return {"version": kt_kernel.__version__, "build": kt_kernel.__cpu_variant__}


if __name__ == "__main__":
    common.main({f.__name__: f for f in (experts, about)})
