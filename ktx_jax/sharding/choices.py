# SPDX-License-Identifier: Apache-2.0
"""What rules choose for a module, whatever dialect they are written in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ktx_jax.sharding.problems import START, Mark

AXES = ("data", "expert", "tensor")
IMPLEMENTATIONS = ("xla", "pallas", "ffi")

Spec = tuple[tuple[str, ...], ...]
"""The mesh axes that cut each logical dimension; () for a dimension that is whole."""


@dataclass(frozen=True)
class Where:
    """A stage, or a device that holds the weights. `prefill`: another device, to which they go for long prompts."""

    stage: int | None = None
    device: str | None = None
    prefill: str | None = None


@dataclass(frozen=True)
class Shard:
    """How a parameter lies over its stage's mesh.

    Attributes:
      spec: the axes that cut each dimension; None to repeat the parameter whole on every device.
      replicate: axes over which it is knowingly repeated.
    """

    spec: Spec | None
    replicate: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ops:
    """Implementations of a module's operation: None leaves the choice to whoever runs it."""

    prefill: str | None = None
    decode: str | None = None


@dataclass(frozen=True)
class Choice:
    """What the rules say of one module, and the line of the rule that says it."""

    where: Where | None = None
    shard: Shard | None = None
    ops: Ops = Ops()
    where_mark: Mark = START
    shard_mark: Mark = START
    ops_mark: Mark = START


@dataclass(frozen=True)
class Choices:
    """What a rule file says of a whole model.

    Attributes:
      mesh: the size of each axis that the file names.
      stages: the devices of each stage; None if stages follow from the devices of the layers.
      by_path: what it says of each parameter and rotary embedding.
      prefill_threshold: prompts longer than this are prefilled with streamed weights; None for never.
      uncovered: whether a parameter that no rule speaks of is an error, or ignored (in a file that has other errors).
      yielding_ops: whether an implementation that cannot run where it is asked for is left to the run, with a notice
        (ktransformers' operators name kernels of its own), or an error.
      notices: what the user should know.
    """

    mesh: Mapping[str, int]
    stages: tuple[tuple[str, ...], ...] | None
    by_path: Mapping[str, Choice]
    prefill_threshold: int | None = None
    uncovered: Literal["error", "ignore"] = "error"
    yielding_ops: bool = False
    notices: tuple[str, ...] = ()
    stage_mark: Mark = START
