# SPDX-License-Identifier: Apache-2.0
"""How much one step computes: what costs and collectives follow from, beside the plan."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ktx_jax.sharding.plan import Plan

PHASES = ("decode", "prefill")


@dataclass(frozen=True)
class StepSize:
    """A step, as each of the `data` groups computes it.

    Attributes:
      tokens: that go through the layers; in decode, one of each sequence.
      sequences: that they belong to.
      cached: positions that each sequence has in the cache when the step is done.
      rows: of logits; a prefill step has room for every sequence's.
    """

    phase: Literal["decode", "prefill"]
    tokens: int
    sequences: int
    cached: int
    rows: int


def step_size(plan: "Plan", phase: Literal["decode", "prefill"]) -> StepSize:
    """The largest step of a plan: a token for each of its sequences with the context full, or the first chunk of a
    prompt, as long as a chunk may be."""
    sequences = -(-plan.batch // plan.stages[0].data(plan.mesh))
    if phase == "decode":
        return StepSize("decode", sequences, sequences, plan.context, sequences)
    tokens = min(plan.chunk, plan.context)
    return StepSize("prefill", tokens, 1, tokens, sequences)
