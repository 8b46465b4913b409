# SPDX-License-Identifier: Apache-2.0
"""The files that are measured: true shapes with random weights, made on first use; and what a token costs in them."""

from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES

from ktx_jax.gguf.reader import open_gguf
from ktx_jax.presets import SHAPES
from ktx_jax.synth import synthesize


@dataclass(frozen=True)
class Model:
    """One file of the benchmark; `layers` None keeps them all."""

    title: str
    shape: str
    quant: str
    layers: int | None

    def path(self, folder: Path) -> Path:
        layers = f"-{self.layers}" if self.layers else ""
        return folder / f"{self.shape}{layers}-{self.quant}.gguf"

    def make(self, folder: Path) -> Path:
        """The file's path, written first if it is not there."""
        path = self.path(folder)
        if not path.exists():
            print(f"writing {path}", flush=True)
            partial = path.with_suffix(".partial")
            synthesize(self.shape, partial, self.quant, self.layers)
            partial.rename(path)
        return path


# llama.cpp takes a model for V2-Lite by its 27 layers, so cut files are of the larger shape.
MODELS = {
    "lite": Model("V2-Lite, Q4_K_M", "v2-lite", "q4_k_m", None),
    "v2.5": Model("V2.5 width, 3 layers, Q4_K_M", "v2.5", "q4_k_m", 3),
    "q8_0": Model("V2.5 width, 2 layers, Q8_0", "v2.5", "q8_0", 2),
}
EXPERT_LAYER = 2  # of the "v2.5" file: gate and up Q4_K, down Q6_K


def expert_shape() -> dict[str, int]:
    """The sizes of V2.5's expert layer."""
    v2_5 = SHAPES["v2.5"]
    return {"experts": v2_5.experts, "used": 6, "hidden": v2_5.hidden, "width": v2_5.expert_ffn}


@dataclass(frozen=True)
class Cost:
    """Of one token: bytes of weights that decode reads, and multiply-accumulates with weights in prefill."""

    file_bytes: int
    decode_bytes: float
    prefill_macs: float


def cost(path: Path) -> Cost:
    """From the file's own tensors; attention over the cache is not counted."""
    with open_gguf(path) as gguf:
        used = gguf.metadata["deepseek2.expert_used_count"] / gguf.metadata["deepseek2.expert_count"]
        decode_bytes = macs = 0.0
        for name, tensor in gguf.tensors.items():
            share = used if "_exps." in name else 1.0
            block, size = GGML_QUANT_SIZES[tensor.ggml_type]
            values = tensor.nbytes // size * block
            if name != "token_embd.weight":  # one row of it is read
                decode_bytes += tensor.nbytes * share
                macs += values * share if name != "output.weight" else 0  # the head sees a prompt's last token only
        return Cost(path.stat().st_size, decode_bytes, macs)


def warm(path: Path) -> None:
    """Reads the file once, so that loading it is timed from the page cache."""
    buffer = memoryview(bytearray(16 << 20))
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
