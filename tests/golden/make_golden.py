# SPDX-License-Identifier: Apache-2.0
"""Makes the reference models: tiny random GGUF files and the logits that Hugging Face transformers gives for them.

    pip install -e ".[oracle]"
    python tests/golden/make_golden.py

Each file's weights are drawn, quantized and written; read back by gguf-py; put dequantized into transformers'
DeepSeek-V2 in float32 with eager attention; and its logits stored. The logits are then those of the file's own weights,
by a reader, a dequantizer and a model that are not this project's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, quants
from golden_variants import VARIANTS, Variant
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from ktx_jax.gguf.quantize import quantize
from ktx_jax.gguf.writer import TensorSource, write_gguf

FOLDER = Path(__file__).parent
TOKENS = 32
# A sequence past YaRN's original context of 4096, and where its logits are kept.
LONG_TOKENS, LONG_AT = 4650, (100, 2000, 4095, 4096, 4097, 4607, 4608, 4649)


def draw(variant: Variant) -> dict[str, np.ndarray]:
    """Random weights by GGUF name, of a size at which attention and routing are far from uniform."""
    rng = np.random.default_rng(sum(map(ord, variant.name)))
    weights = {}
    for name, shape in variant.shapes().items():
        if name.endswith("_norm.weight"):
            weights[name] = 1 + 0.2 * rng.standard_normal(shape)
        else:
            inputs = shape[-2] if "attn_k_b" in name else shape[-1]
            weights[name] = rng.standard_normal(shape) * variant.gain(name) * inputs**-0.5
    return {name: value.astype(np.float32) for name, value in weights.items()}


def write(variant: Variant) -> list[Path]:
    """The variant's GGUF file, or the parts of its split set."""
    weights = draw(variant)
    kinds = {name: variant.kind(name, value.shape) for name, value in weights.items()}
    tensors = [TensorSource(n, v.shape, kinds[n], quantize(v, kinds[n])) for n, v in weights.items()]
    if variant.parts == 1:
        path = FOLDER / f"{variant.name}.gguf"
        write_gguf(path, variant.metadata(), tensors)
        return [path]
    paths = []
    share = -(-len(tensors) // variant.parts)
    for part in range(variant.parts):
        split = {
            "split.no": np.uint16(part),
            "split.count": np.uint16(variant.parts),
            "split.tensors.count": np.int32(len(tensors)),
        }
        paths.append(FOLDER / f"{variant.name}-{part + 1:05d}-of-{variant.parts:05d}.gguf")
        metadata = variant.metadata() | split if part == 0 else split
        write_gguf(paths[-1], metadata, tensors[part * share : (part + 1) * share])
    return paths


def read(paths: list[Path]) -> dict[str, np.ndarray]:
    """Every tensor of the files, dequantized by gguf-py."""
    return {
        tensor.name: quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for path in paths
        for tensor in GGUFReader(path).tensors
    }


def state_dict(variant: Variant, weights: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The weights under transformers' names, in its layout: `kv_b_proj` whole, the experts' gate and up fused."""
    state = {
        "model.embed_tokens.weight": weights["token_embd.weight"],
        "model.norm.weight": weights["output_norm.weight"],
        "lm_head.weight": weights["token_embd.weight" if variant.tied else "output.weight"],
    }
    for layer in range(variant.layers):
        block = {n.split(".")[2]: w for n, w in weights.items() if n.startswith(f"blk.{layer}.")}
        state |= {f"model.layers.{layer}.{name}.weight": w for name, w in attention(variant, block).items()}
        mlp = f"model.layers.{layer}.mlp"
        if layer == 0:
            state |= {f"{mlp}.{part}_proj.weight": block[f"ffn_{part}"] for part in ("gate", "up", "down")}
            continue
        state[f"{mlp}.gate.weight"] = block["ffn_gate_inp"]
        state[f"{mlp}.experts.down_proj"] = block["ffn_down_exps"]
        state[f"{mlp}.experts.gate_up_proj"] = (
            block["ffn_gate_up_exps"]
            if variant.fused
            else np.concatenate([block["ffn_gate_exps"], block["ffn_up_exps"]], axis=1)
        )
        shared = f"{mlp}.shared_experts"
        state |= {f"{shared}.{part}_proj.weight": block[f"ffn_{part}_shexp"] for part in ("gate", "up", "down")}
    return {name: torch.from_numpy(np.array(value)) for name, value in state.items()}


def attention(variant: Variant, block: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One layer's attention weights and norms, by their names in transformers."""
    if variant.old:
        kv_b = block["attn_kv_b"]
    else:
        kv_b = np.concatenate([block["attn_k_b"].swapaxes(1, 2), block["attn_v_b"]], axis=1)
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_q_a": "self_attn.q_a_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_q_b": "self_attn.q_b_proj",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm",
        "attn_output": "self_attn.o_proj",
    }
    out = {theirs: block[ours] for ours, theirs in names.items() if ours in block}
    return out | {"self_attn.kv_b_proj": kv_b.reshape(-1, variant.kv_rank)}


@torch.no_grad()
def logits(model: DeepseekV2ForCausalLM, tokens: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False).logits[0].numpy()


def main() -> None:
    saved: dict[str, Any] = {}
    for variant in VARIANTS:
        weights = read(write(variant))
        config = DeepseekV2Config(**variant.hugging_face(), attn_implementation="eager", dtype="float32")
        model = DeepseekV2ForCausalLM(config).eval()
        model.load_state_dict(state_dict(variant, weights))
        rng = np.random.default_rng(7)
        tokens = rng.integers(0, variant.vocab, TOKENS).astype(np.uint16)
        saved |= {f"{variant.name}.tokens": tokens, f"{variant.name}.logits": logits(model, tokens)}
        if variant.long:
            tokens = rng.integers(0, variant.vocab, LONG_TOKENS).astype(np.uint16)
            saved["long.tokens"], saved["long.at"] = tokens, np.array(LONG_AT, np.int32)
            saved["long.logits"] = logits(model, tokens)[list(LONG_AT)]
        print(variant.name, "logits' deviation", saved[f"{variant.name}.logits"].std())
    np.savez_compressed(FOLDER / "logits.npz", **saved)


if __name__ == "__main__":
    main()
