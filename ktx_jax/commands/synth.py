# SPDX-License-Identifier: Apache-2.0
"""`ktx-jax synth`: a model file of true shapes with random weights."""

from pathlib import Path

from ktx_jax.commands.common import notes, progress_bar
from ktx_jax.synth import synthesize


def synth(shape: str, layers: int | None, quant: str, out: Path, seed: int) -> int:
    """Writes the file; returns the exit code."""
    with progress_bar("Writing") as progress:
        path = synthesize(shape, out, quant, layers=layers, seed=seed, progress=progress)
    notes.print(f"{path}: {path.stat().st_size:,} bytes", markup=False)
    return 0
