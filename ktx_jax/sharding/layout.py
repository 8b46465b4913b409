# SPDX-License-Identifier: Apache-2.0
"""How a parameter lies in memory: as numbers, the file's blocks, the GPU kernels' records, the CPU kernels' handles."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ktx_jax.quantized import HostArray, PlanesArray, QuantizedArray
from ktx_jax.sharding.choices import Spec
from ktx_jax.sharding.gpu_kernels import PALLAS, KernelLayout, has_kernel, kernel_layout, turned_spec
from ktx_jax.sharding.granules import touched_blocks
from ktx_jax.sharding.partition import cuts
from ktx_jax.sharding.plan import PlacedParameter, Plan

Form = Literal["dense", "blocks", "records", "host"]

# What makes, asks and reads the latent: an error there is met again by every later token, and these products are a few
# hundredths of the model's. The CPU kernels keep fifteen bits of their inputs even where the run is not of float32.
_LASTING = (".kv_a_proj_with_mqa", ".k_b_proj", ".v_b_proj")


@dataclass(frozen=True)
class Layout:
    """One parameter on one stage's mesh.

    Attributes:
      form: "dense" float32, "blocks" of a `QuantizedArray`, "records" of a `PlanesArray`, or "host" for a `HostArray`.
      shape: logical, of the whole.
      ggml_type: in memory.
      spec: the mesh axes that cut each dimension.
      turned: whether its last two dimensions are swapped against the file's.
      precise: as in `HostArray`.
    """

    path: str
    form: Form
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    spec: Spec
    mesh: Mesh
    turned: bool = False
    precise: bool = False

    @property
    def cuts(self) -> tuple[int, ...]:
        """Into how many parts each dimension is cut."""
        return cuts(self.spec, self.mesh.shape)

    @property
    def piece_blocks(self) -> int:
        """Blocks in a row of a piece."""
        return touched_blocks(self.shape[-1], self.ggml_type, self.cuts[-1])

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """Of the array that JAX sees."""
        if self.form == "dense":
            return self.shape
        if self.form == "host":
            return self.cuts
        if self.form == "records":
            return self.for_kernels.leaf_shape
        size = GGML_QUANT_SIZES[self.ggml_type][1]
        return (*self.shape[:-1], self.cuts[-1] * self.piece_blocks, size)

    @property
    def for_kernels(self) -> KernelLayout:
        """The same for the GPU kernels."""
        return KernelLayout(self.shape, self.ggml_type, self.cuts, self.turned)

    @property
    def dtype(self) -> Any:
        return {"dense": jnp.float32, "blocks": jnp.uint8, "records": jnp.int32, "host": jnp.uint32}[self.form]

    @property
    def sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*(axes or None for axes in self.spec)))

    def places(self) -> dict[tuple[int, ...], list[jax.Device]]:
        """Which part along each dimension each device of this process holds, by part."""
        found: dict[tuple[int, ...], list[jax.Device]] = {}
        index_map = self.sharding.addressable_devices_indices_map(self.leaf_shape)
        for device, index in index_map.items():
            assert index is not None
            parts = (
                (span.start or 0) * count // size
                for span, size, count in zip(index, self.leaf_shape, self.cuts, strict=False)
            )
            found.setdefault(tuple(parts), []).append(device)
        return found

    def wrap(self, leaf: Any) -> Any:
        """What the model's module holds, around the array (or what stands for it)."""
        if self.form == "dense":
            return leaf
        if self.form == "blocks":
            return QuantizedArray(leaf, self.ggml_type)
        if self.form == "records":
            return PlanesArray(leaf, self.ggml_type)
        *lead, k = (size // parts for size, parts in zip(self.shape, self.cuts, strict=True))
        width = self.piece_blocks * GGML_QUANT_SIZES[self.ggml_type][0] if self.cuts[-1] > 1 else k
        return HostArray(leaf, (*lead, width), self.ggml_type, self.precise)

    def abstract(self) -> Any:
        """The parameter with shapes and shardings in place of values."""
        return self.wrap(jax.ShapeDtypeStruct(self.leaf_shape, self.dtype, sharding=self.sharding))


def layout_of(plan: Plan, parameter: PlacedParameter, mesh: Mesh, op: str) -> Layout:
    """How a parameter of the plan lies for the implementation `op`.

    The kernels read k_b by rows: one that lies the other way is turned, for CPUs as float16, for GPUs as bfloat16,
    since blocks cannot be.
    """
    kind, shape, spec = parameter.stored_type, parameter.shape, parameter.spec
    if len(shape) == 1 or (op != "ffi" and parameter.path.endswith(".mlp.gate")):
        return Layout(parameter.path, "dense", shape, kind, spec, mesh)
    if op == PALLAS and has_kernel(parameter.path):
        read_so = plan.config.k_b_transposed
        into = kernel_layout(parameter.path, shape, kind, cuts(spec, mesh.shape), k_b_transposed=read_so)
        spec = turned_spec(spec) if into.turned else spec
        return Layout(parameter.path, "records", into.shape, into.ggml_type, spec, mesh, into.turned)
    if op != "ffi":
        return Layout(parameter.path, "blocks", shape, kind, spec, mesh)
    precise = plan.dtype == "float32" or parameter.path.endswith(_LASTING)
    if parameter.path.endswith(".k_b_proj") and not plan.config.k_b_transposed:
        shape, spec = (shape[0], shape[2], shape[1]), (spec[0], spec[2], spec[1])
        return Layout(parameter.path, "host", shape, GGMLQuantizationType.F16, spec, mesh, turned=True, precise=precise)
    return Layout(parameter.path, "host", shape, kind, spec, mesh, precise=precise)


def grid(layout: Layout, handles: dict[tuple[int, ...], int]) -> np.ndarray:
    """Handles by part as an array, 0 for parts of other processes."""
    out = np.zeros(layout.cuts, np.uint32)
    for part, handle in handles.items():
        out[part] = handle
    return out
