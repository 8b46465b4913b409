# SPDX-License-Identifier: Apache-2.0
"""Compiles a plan's steps for GPUs that are not here, in a process of its own."""

import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from ktx_jax.aot.hlo import CompiledCollective, CompiledKernel
from ktx_jax.aot.representatives import Representatives
from ktx_jax.aot.target_config import target_config, topology
from ktx_jax.errors import KtxError
from ktx_jax.sharding.devices import HOST, device_number
from ktx_jax.sharding.plan import GPU, Plan
from ktx_jax.sharding.step_size import PHASES, StepSize, step_size
from ktx_jax.sharding.targets import Target

Counted = TypeVar("Counted", CompiledCollective, CompiledKernel)

PLUGIN = "jax-cuda12-plugin"
_PACKAGES = (PLUGIN, "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12")
_LAYER = re.compile(r"\blayers\.(\d+)\b")


@dataclass(frozen=True)
class Job:
    """What the compiling process is asked for: the step of each stage in each phase.

    Attributes:
      devices: how many there are.
      target_config, topology: as in `target_config`; None to compile for virtual CPU devices.
      at_once: how many programs are compiled at the same time.
    """

    plan: Plan
    sizes: tuple[StepSize, ...]
    implementation: str
    devices: int
    target_config: str | None
    topology: str | None
    at_once: int


@dataclass(frozen=True)
class CompiledStep:
    """One stage's program for one kind of step. Bytes are of a device.

    Attributes:
      arguments: weights, cache and inputs; cache: of those the cache, which is updated in place.
      layers: of the arguments, those of each layer.
      temporaries, results: what the program needs beside them.
      seconds: that compiling took.
      kernels: what the device is told to run, in order.
      error: the compiler's message, in which case nothing else is known.
    """

    stage: int
    phase: str
    arguments: int = 0
    layers: tuple[tuple[int, int], ...] = ()
    temporaries: int = 0
    results: int = 0
    collectives: tuple[CompiledCollective, ...] = ()
    seconds: float = 0.0
    kernels: tuple[CompiledKernel, ...] = ()
    error: str | None = None

    def launches(self, kind: str | None = None) -> int:
        """How many kernels a step starts, of one kind or of all."""
        return sum(k.count for k in self.kernels if kind is None or k.kind == kind)


@dataclass(frozen=True)
class Compilation:
    """All steps of a plan, as if every layer had been compiled.

    Attributes:
      layers: how many layers were compiled; the others are like one of them.
      seconds, peak_memory: of the compiling process; bytes.
    """

    sizes: tuple[StepSize, ...]
    steps: tuple[CompiledStep, ...]
    layers: int
    seconds: float
    peak_memory: int

    @property
    def failed(self) -> bool:
        return any(step.error is not None for step in self.steps)


@dataclass(frozen=True)
class Answer:
    """What the compiling process gives back."""

    steps: tuple[CompiledStep, ...]
    seconds: float
    peak_memory: int


def compile_plan(
    plan: Plan, target: Target, *, phases: Sequence[str] = PHASES, whole: bool = False, implementation: str = "xla"
) -> Compilation:
    """Compiles the steps of every stage for devices of kind `target`, none of which need be here.

    For a CPU target they are this machine's CPU, as often as the plan has devices.

    Args:
      phases: "decode", "prefill".
      whole: compile every layer. Else one of each kind stands for those that differ in nothing but their number.
      implementation: of the operations that the rules leave open.

    Raises:
      KtxError: the compiler is not installed, the target or plan is none for it, or the compiling process died.
    """
    if plan.platform != target.platform:
        raise KtxError(f"{plan.name}: the plan is for a {plan.platform}, but {target.name} is a {target.platform}")
    if HOST in plan.devices:
        raise KtxError(f"{plan.name}: a plan with parts on the host is many small programs, and is not compiled ahead")
    devices = max(map(device_number, plan.devices)) + 1
    described = None, None
    if target.platform == GPU:
        check_installed()
        described = target_config(target), topology(target, devices)
    chosen = Representatives.whole(plan) if whole else Representatives.of(plan)
    sizes = tuple(step_size(plan, phase) for phase in phases)  # type: ignore[arg-type]
    at_once = 1 if whole else os.cpu_count() or 1  # a program of 60 layers takes 2 GB
    answer = run_job(Job(chosen.plan, sizes, implementation, devices, *described, at_once))
    steps = tuple(scaled(step, chosen) for step in answer.steps)
    return Compilation(sizes, steps, len(chosen.stands_for), answer.seconds, answer.peak_memory)


def check_installed() -> None:
    """Raises `KtxError` unless the compiler is here, in the version that goes with JAX."""
    jax = metadata.version("jax")
    wanted = f"pip install 'ktx-jax[aot]' {PLUGIN}=={jax} jax-cuda12-pjrt=={jax}"
    for package in _PACKAGES:
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise KtxError(f"--compile needs XLA's GPU compiler, and {package} is not installed: {wanted}") from None
        if package.startswith("jax") and found != jax:
            raise KtxError(f"{package} {found} does not go with jax {jax}: {wanted}")


def run_job(job: Job) -> Answer:
    """Has another process do it: a CUDA plugin without a GPU must not be started in this one."""
    with tempfile.TemporaryDirectory(prefix="ktx-jax-") as folder:
        asked, answered = Path(folder, "job"), Path(folder, "answer")
        asked.write_bytes(pickle.dumps(job))
        # CPU is the platform that runs; the other one is only compiled for.
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
        if job.target_config is None:
            flags = os.environ.get("XLA_FLAGS", "")
            environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={job.devices}"
        done = subprocess.run(
            [sys.executable, "-m", "ktx_jax.aot.worker", str(asked), str(answered)],
            env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            said = [line for line in done.stderr.strip().splitlines() if line][-8:]
            how = f"signal {-done.returncode}" if done.returncode < 0 else f"code {done.returncode}"
            raise KtxError("\n".join([f"the compiling process ended with {how}:", *said]))
        return pickle.loads(answered.read_bytes())


def scaled(step: CompiledStep, chosen: Representatives) -> CompiledStep:
    """A step of representatives as one of all the layers they stand for."""
    more = sum(nbytes * (chosen.stands_for[layer] - 1) for layer, nbytes in step.layers)
    return replace(
        step,
        arguments=step.arguments + more,
        collectives=tuple(_times(c, chosen) for c in step.collectives),
        kernels=tuple(_times(k, chosen) for k in step.kernels),
    )


def _times(found: Counted, chosen: Representatives) -> Counted:
    layer = _LAYER.search(found.where)
    return replace(found, count=found.count * (chosen.stands_for[int(layer[1])] if layer else 1))
