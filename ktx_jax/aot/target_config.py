# SPDX-License-Identifier: Apache-2.0
"""A target as XLA's GPU compiler wants it told."""

from ktx_jax.errors import KtxError
from ktx_jax.sharding.targets import Target

_CUDA = "12.9.0"
"""Of the driver and runtime: XLA puts calls of kernels into CUDA graphs from 12.3 on."""


def target_config(target: Target) -> str:
    """XLA's `GpuTargetConfigProto` of a target, in text form.

    What all CUDA GPUs of the last years have alike (warps, blocks, registers) is constant here.

    Raises:
      KtxError: the target says nothing that a compiler could go by.
    """
    cuda = target.cuda
    if cuda is None:
        raise KtxError(f"{target.name} cannot be compiled for: its target file has no `cuda`")
    major, minor = cuda.capability.removesuffix("a").split(".")
    accelerated = " feature_extension: ACCELERATED_FEATURES" if cuda.capability.endswith("a") else ""
    return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {cuda.shared_memory_per_core}
  shared_memory_per_block_optin: {cuda.shared_memory_per_block}
  threads_per_core_limit: {cuda.threads_per_core} core_count: {cuda.cores} fpus_per_core: {cuda.fpus_per_core}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {round(target.bandwidth)} l2_cache_size: {cuda.l2_cache} clock_rate_ghz: {cuda.clock_ghz}
  device_memory_size: {target.memory}
  cuda_compute_capability {{ major: {major} minor: {minor}{accelerated} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "{_CUDA}" runtime_version: "{_CUDA}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{target.name}"
"""


def topology(target: Target, devices: int) -> str:
    """Full hosts of the target's devices that hold `devices` of them: "1x2x8" is one slice of two hosts of eight."""
    if devices <= target.devices_per_host:
        return f"1x1x{devices}"
    return f"1x{-(-devices // target.devices_per_host)}x{target.devices_per_host}"
