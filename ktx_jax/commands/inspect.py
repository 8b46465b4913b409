# SPDX-License-Identifier: Apache-2.0
"""`ktx-jax inspect`: what a model file holds, from its headers alone."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ktx_jax.commands.common import print_json
from ktx_jax.gguf.errors import GGUFError, quote
from ktx_jax.gguf.reader import GGUF, TensorInfo, open_gguf
from ktx_jax.model.config import ARCHITECTURE, config_from_gguf

# Parts of a model by GGUF tensor name, the first that matches.
_PARTS = (
    (r"token_embd\..*", "embedding"),
    (r"output\..*", "output"),
    (r".*_norm\..*", "norms"),
    (r".*\.attn_.*", "attention"),
    (r".*\.ffn_gate_inp\..*|.*exp_probs_b.*", "router"),
    (r".*\.ffn_.*_exps\..*", "experts"),
    (r".*\.ffn_.*_shexp\..*", "shared experts"),
    (r".*\.ffn_(gate|up|down)\..*", "dense layers"),
)
_SHOWN = 8  # values of an array


def inspect(path: Path, as_json: bool) -> int:
    """Prints what the headers say; returns the exit code."""
    with open_gguf(path) as file:
        described = describe(file)
    if as_json:
        print_json(described)
    else:
        _print(described)
    return 0


def describe(file: GGUF) -> dict[str, Any]:
    """Everything that `inspect` prints, as JSON values."""
    tensors = list(file.tensors.values())
    total = sum(tensor.nbytes for tensor in tensors)
    return {
        "files": {str(part): part.stat().st_size for part in file.files},
        "tensors": len(tensors),
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "tensor_bytes": total,
        "cache_bytes_per_token": _cache_bytes(file),
        "types": _sums(tensors, lambda tensor: tensor.ggml_type.name),
        "parts": _sums(tensors, lambda tensor: part_of(tensor.name)),
        "metadata": {key: _shortened(value) for key, value in file.metadata.items()},
    }


def part_of(tensor_name: str) -> str:
    """Which part of the model a tensor belongs to."""
    return next((part for pattern, part in _PARTS if re.fullmatch(pattern, tensor_name)), "other")


def _sums(tensors: list[TensorInfo], key: Callable[[TensorInfo], str]) -> dict[str, dict[str, int]]:
    """Tensors, parameters and bytes by `key`, the largest first."""
    sums: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        entry = sums.setdefault(key(tensor), {"tensors": 0, "parameters": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["parameters"] += math.prod(tensor.shape)
        entry["bytes"] += tensor.nbytes
    return dict(sorted(sums.items(), key=lambda item: -item[1]["bytes"]))


def _cache_bytes(file: GGUF) -> int | None:
    """Bytes of latent cache that a token takes in 16 bits, or None where the file is no whole DeepSeek-V2."""
    if file.metadata.get("general.architecture") != ARCHITECTURE:
        return None
    try:
        config = config_from_gguf(file.metadata, file.tensors, file=str(file.path))
    except GGUFError:  # what is wrong with the configuration is for loading to say; the headers are still worth showing
        return None
    return 2 * config.num_hidden_layers * config.latent_dim


def _shortened(value: Any) -> Any:
    if isinstance(value, list) and len(value) > _SHOWN:
        return {"length": len(value), "first": value[:_SHOWN]}
    return value


def _print(described: Mapping[str, Any]) -> None:
    metadata = described["metadata"]
    width = max(map(len, metadata), default=0)
    for key, value in metadata.items():
        print(f"{_plain(key):{width}}  {_told(value)}")
    for title in ("types", "parts"):
        table = Table(title, box=None)
        for column in ("tensors", "parameters", "bytes", "share"):
            table.add_column(column, justify="right")
        for name, sums in described[title].items():
            share = sums["bytes"] / max(described["tensor_bytes"], 1)
            table.add_row(name, *(f"{sums[k]:,}" for k in ("tensors", "parameters", "bytes")), f"{share:.1%}")
        print()
        Console(highlight=False).print(table)
    print()
    for name, size in described["files"].items():
        print(f"{name}: {size:,} bytes")
    print(f"{described['parameters']:,} parameters in {described['tensors']:,} tensors")
    if described["cache_bytes_per_token"] is not None:
        print(f"{described['cache_bytes_per_token']:,} bytes of cache for a token (bfloat16)")


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['length']:,} values: {', '.join(map(_told, value['first']))}, ..."
    return quote(value) if isinstance(value, str) else str(value)


def _plain(text: str) -> str:
    """`text` from a file without codes that would steer the terminal."""
    return text if text.isprintable() else quote(text)
