# SPDX-License-Identifier: Apache-2.0
"""The collectives that a plan implies: what devices of a stage exchange in a step, and what goes between stages.

Activations are whole on every device of a group, except between two products of which the first is cut along its
outputs and the second along its inputs. So a product cut along its inputs ends in a sum over devices, and one cut along
its outputs in a gathering, unless what follows takes its result as it lies.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktx_jax.sharding.choices import Spec
from ktx_jax.sharding.memory import CACHE_BYTES
from ktx_jax.sharding.partition import cuts
from ktx_jax.sharding.step_size import StepSize

if TYPE_CHECKING:
    from ktx_jax.sharding.plan import Plan

ALL_REDUCE, ALL_GATHER = "all-reduce", "all-gather"
_F32 = 4

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Collective:
    """One exchange in a step.

    Attributes:
      kind: "all-reduce" or "all-gather".
      where: the module whose result it makes whole.
      axes: of the stage's mesh, over which devices take part; the groups are those that differ only there.
      devices: in a group.
      nbytes: of the whole result, which each device of a group has afterwards.
    """

    kind: str
    where: str
    stage: int
    axes: Axes
    devices: int
    nbytes: int


def predict_collectives(plan: "Plan", size: StepSize) -> tuple[Collective, ...]:
    """Every collective of a step, in the order in which stages and layers compute."""
    found: list[Collective] = []
    for index in range(len(plan.stages)):
        found += _Walk(plan, index, size).run()
    return tuple(found)


class _Walk:
    """One stage, followed as the model computes (`model.modules`): cuts are those of the last dimension of a value."""

    def __init__(self, plan: "Plan", stage: int, size: StepSize):
        self._plan, self._stage, self._size = plan, stage, size
        self._config, self._mesh = plan.config, plan.mesh
        self._here = {p.path: p for p in plan.parameters if p.stage == stage}
        self._width = CACHE_BYTES[plan.dtype]
        self._found: list[Collective] = []

    def run(self) -> list[Collective]:
        others = self._plan.stages[self._stage].others
        if "model.embed_tokens" in others:
            self._embedding("model.embed_tokens")
        for layer in self._plan.stages[self._stage].layers:
            self._layer(f"model.layers.{layer}", self._config.is_moe(layer))
        if "model.norm" in others:
            self._norm("model.norm")
            if self._config.tie_word_embeddings:
                self._head("model.embed_tokens")
        if "lm_head" in others:
            self._head("lm_head")
        return self._found

    def _spec(self, path: str) -> Spec:
        return self._here[path].spec

    def _parts(self, axes: Axes) -> int:
        return cuts((axes,), self._mesh)[0]

    def _add(self, kind: str, where: str, axes: Axes, values: int, width: int | None = None) -> None:
        if (devices := self._parts(axes)) > 1:
            nbytes = values * (self._width if width is None else width)
            self._found.append(Collective(kind, where, self._stage, axes, devices, nbytes))

    def _recut(self, where: str, have: Axes, want: Axes, values: int, width: int | None = None) -> None:
        """`values` in all, cut over `have`: gathered, unless they are wanted as they lie."""
        if have != want:
            self._add(ALL_GATHER, where, have, values, width)

    def _norm(self, path: str) -> None:
        [axes] = self._spec(path)[:1]
        self._recut(path, axes, (), self._here[path].shape[0], _F32)

    def _product(self, path: str, rows: int, have: Axes = (), want: Axes = (), width: int | None = None) -> None:
        """A product of `rows` rows with a weight [N, K]."""
        (features, inputs), (outer, inner) = self._here[path].shape, self._spec(path)
        self._recut(path, have, inner, rows * inputs, width)
        self._add(ALL_REDUCE, path, inner, rows * features // self._parts(outer), width)
        self._recut(path, outer, want, rows * features, width)

    def _embedding(self, path: str) -> None:
        by_row, by_value = self._spec(path)[:2]
        size = self._size.tokens * self._config.hidden_size
        self._add(ALL_REDUCE, path, by_row, size)
        self._recut(path, by_value, (), size)

    def _layer(self, path: str, moe: bool) -> None:
        self._norm(f"{path}.input_layernorm")
        self._attention(f"{path}.self_attn")
        self._norm(f"{path}.post_attention_layernorm")
        if moe:
            self._moe(f"{path}.mlp")
        else:
            self._total([self._mlp(f"{path}.mlp")])

    def _attention(self, path: str) -> None:
        c, tokens = self._config, self._size.tokens
        heads, by_value = self._spec(f"{path}.k_b_proj")[0], self._spec(f"{path}.v_b_proj")[0]
        if c.q_lora_rank is None:
            self._product(f"{path}.q_proj", tokens, want=heads)
        else:
            self._product(f"{path}.q_a_proj", tokens)
            self._norm(f"{path}.q_a_layernorm")
            self._product(f"{path}.q_b_proj", tokens, want=heads)
        self._product(f"{path}.kv_a_proj_with_mqa", tokens)
        self._norm(f"{path}.kv_a_layernorm")
        self._recut(f"{path}.v_b_proj", heads, by_value, tokens * c.num_attention_heads * c.kv_lora_rank)
        self._product(f"{path}.o_proj", tokens, have=by_value)

    def _mlp(self, path: str) -> tuple[str, Axes]:
        """Where its partial sums are, and the axes over which they are to be added."""
        gate, up, down = (f"{path}.{name}_proj" for name in ("gate", "up", "down"))
        by_row, (outer, inner) = self._spec(gate)[0], self._spec(down)
        if not (self._spec(gate) == self._spec(up) == (inner, ()) and outer == ()):
            tokens, (size, width) = self._size.tokens, self._here[down].shape
            self._product(gate, tokens, want=by_row)
            self._product(up, tokens, want=by_row)
            self._recut(down, by_row, inner, tokens * width)
            self._recut(down, outer, (), tokens * size)
        return down, inner

    def _moe(self, path: str) -> None:
        self._product(f"{path}.gate", self._size.tokens, width=_F32)
        by_expert, _, by_width = self._spec(f"{path}.experts.down_proj")
        parts = [(f"{path}.experts.down_proj", by_expert + by_width)]
        if self._config.n_shared_experts:
            parts.append(self._mlp(f"{path}.shared_experts"))
        self._total(parts)

    def _total(self, parts: list[tuple[str, Axes]]) -> None:
        """Partial sums [T, D]: one exchange for those over the same axes."""
        by_axes = {axes: where for where, axes in reversed(parts)}
        for axes, where in reversed(by_axes.items()):
            self._add(ALL_REDUCE, where, axes, self._size.tokens * self._config.hidden_size)

    def _head(self, path: str) -> None:
        self._product(path, self._size.rows, width=_F32)
