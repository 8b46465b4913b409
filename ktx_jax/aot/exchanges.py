# SPDX-License-Identifier: Apache-2.0
"""The collectives that a plan predicts, beside those that its compiled steps have."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ktx_jax.aot.compile import CompiledStep
from ktx_jax.sharding.collectives import predict_collectives
from ktx_jax.sharding.folding import fold_paths
from ktx_jax.sharding.plan import Plan
from ktx_jax.sharding.step_size import StepSize


@dataclass(frozen=True)
class Exchange:
    """Collectives that are alike, in one stage's step.

    Attributes:
      devices: in a group; nbytes: of the whole array; as in `Collective`.
      predicted, compiled: how many times a step.
      unbounded: whether a compiled one lies in a loop whose length is not known; it is counted once.
      where: modules, or what the compiler says where the plan knows none.
    """

    kind: str
    devices: int
    nbytes: int
    predicted: int
    compiled: int
    unbounded: bool
    where: tuple[str, ...]

    @property
    def surprising(self) -> bool:
        """Whether there are more than the plan says, or nobody knows how many. Fewer is no harm."""
        return self.compiled > self.predicted or self.unbounded


def exchanges(plan: Plan, size: StepSize, step: CompiledStep) -> list[Exchange]:
    """Both kinds of a step, the predicted ones first."""
    predicted: Counter[tuple[str, int, int]] = Counter()
    compiled: Counter[tuple[str, int, int]] = Counter()
    modules: dict[tuple[str, int, int], list[str]] = {}
    traced: dict[tuple[str, int, int], list[str]] = {}
    unbounded = set()
    for c in predict_collectives(plan, size):
        if c.stage == step.stage:
            key = (c.kind, c.devices, c.nbytes)
            predicted[key] += 1
            modules.setdefault(key, []).append(c.where)
    for found in step.collectives:
        key = (found.kind, found.devices or len(plan.stages[step.stage].devices), found.nbytes)
        compiled[key] += found.count
        traced.setdefault(key, []).append(found.where)
        if not found.bounded:
            unbounded.add(key)
    return [
        Exchange(*key, predicted[key], compiled[key], key in unbounded, _where(modules.get(key, traced.get(key, []))))
        for key in dict.fromkeys((*predicted, *compiled))
    ]


def _where(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(path.removeprefix("model.") for path in fold_paths(dict.fromkeys(names)))
