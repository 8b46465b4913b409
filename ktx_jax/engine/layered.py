# SPDX-License-Identifier: Apache-2.0
"""A stage some of whose parameters lie on the host: it is cut where they are needed.

Routed experts on the host are ktransformers' layout: attention, router and shared experts on an accelerator; each
token's activations and expert ids go to the host, where the experts' weights stay, while the shared experts compute.
For long prompts the weights may come to the accelerator instead, one layer's while the one before computes.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ktx_jax.engine.program import Bound
from ktx_jax.engine.scheduler import Limits
from ktx_jax.engine.stage import Dtypes, Kind, Tail, ending, stage_cache
from ktx_jax.model.cache import Run
from ktx_jax.model.config import Config
from ktx_jax.model.linear import Embedding, Linear, RMSNorm
from ktx_jax.model.modules import MLP, DecoderLayer, DeepseekV2ForCausalLM, Experts, MoE
from ktx_jax.model.rope import cos_sin
from ktx_jax.sharding.load import LoadedStage
from ktx_jax.sharding.streaming import StreamedExperts


@dataclass(frozen=True)
class _Embed:
    dtype: Any

    def __call__(self, module: Embedding, pages: None, run: Run) -> tuple[jax.Array, None]:
        return module.rows(run.tokens, self.dtype), None


def _whole_layer(layer: DecoderLayer, pages: Any, x: jax.Array, run: Run) -> tuple[jax.Array, Any]:
    return layer(x, pages, run, *cos_sin(layer.self_attn.config, run.positions))


def _to_experts(layer: DecoderLayer, pages: Any, x: jax.Array, run: Run) -> tuple[Any, Any]:
    return layer.to_experts(x, pages, run, *cos_sin(layer.self_attn.config, run.positions))


def _shared(module: MLP, pages: None, h: jax.Array) -> tuple[jax.Array, None]:
    return module(h), None


def _experts(module: Experts, pages: None, h: jax.Array, ids: jax.Array, weights: jax.Array) -> tuple[jax.Array, None]:
    return module(h, ids, weights), None


def _norm(module: RMSNorm, pages: None, x: jax.Array, at: jax.Array) -> tuple[jax.Array, None]:
    return module(x[at]), None


@dataclass(frozen=True)
class _Head:
    tail: Tail

    def __call__(self, module: Linear, pages: None, x: jax.Array, extra: Any) -> tuple[Any, None]:
        return ending(self.tail, lambda x: module(x, dtype=jnp.float32), x, extra), None


@jax.jit
def _sum(x: jax.Array, routed: jax.Array, shared: jax.Array | None) -> jax.Array:
    """In the order in which a layer that is whole adds them."""
    return x + (routed if shared is None else routed + shared)


class _Layer:
    """A layer's programs: one, or where its experts lie on the host, what comes before them, beside them, and them."""

    def __init__(self, layer: DecoderLayer, loaded: LoadedStage, path: str):
        self.experts: Bound | None = None
        self.shared: Bound | None = None
        if isinstance(layer.mlp, MoE) and f"{path}.mlp.experts.down_proj" in loaded.apart:
            self.experts = _bind(layer.mlp.experts, loaded.host)
            if layer.mlp.shared_experts is not None:
                self.shared = _bind(layer.mlp.shared_experts, loaded.mesh)
            layer.mlp.experts = layer.mlp.shared_experts = None
        self.main = _bind(layer, loaded.mesh)

    def __call__(self, x: Any, pages: jax.Array, run: Run, brought: Bound | None = None) -> tuple[Any, jax.Array]:
        """As `DecoderLayer`; `brought`: the experts where they have come to the layer's device."""
        if self.experts is None:
            return self.main(_whole_layer, pages, x, run)
        (x, h, ids, weights), pages = self.main(_to_experts, pages, x, run)
        # Started in this order all three are under way together: the host waits for h alone.
        shared = None if self.shared is None else self.shared(_shared, None, h)[0]
        routed, _ = (brought or self.experts)(_experts, None, h, ids, weights)
        return _sum(x, jax.device_put(routed, self.main.program.by_shard), shared), pages


class _Modules:
    """The programs of all of a stage's modules, for prefill or for decode."""

    def __init__(self, loaded: LoadedStage, *, decode: bool):
        part = loaded.part(decode=decode)
        model: DeepseekV2ForCausalLM = nnx.merge(part.graphdef, part.state)
        head = model.head_weight

        def bind(module: Any, path: str) -> Bound | None:
            return None if module is None else _bind(module, loaded.host if path in loaded.apart else loaded.mesh)

        self.embed = bind(model.model.embed_tokens, "model.embed_tokens") if loaded.begins else None
        self.norm = bind(model.model.norm, "model.norm")
        self.head = bind(head, "model.embed_tokens" if head is model.model.embed_tokens else "lm_head")
        self.layers = [
            _Layer(layer, loaded, f"model.layers.{i}")
            for i, layer in enumerate(model.model.layers)
            if layer is not None
        ]


class LayeredStage:
    """A stage that runs module by module, each where its parameters lie."""

    def __init__(self, config: Config, loaded: LoadedStage, limits: Limits, *, dtypes: Dtypes):
        self._dtype = dtypes.activations
        decode = _Modules(loaded, decode=True)
        same = loaded.prefill is loaded.decode
        self._modules = {True: decode, False: decode if same else _Modules(loaded, decode=False)}
        self.cache = stage_cache(config, loaded, limits, dtypes.cache)
        self._mesh = loaded.mesh
        self._streams = [loaded.streams.get(layer) for layer in loaded.layers]

    def __call__(self, x: Any, run: Run, at: Any, extra: Any, *, tail: Tail, kind: Kind) -> Any:
        """As `stage.Stage`."""
        modules = self._modules[kind == "decode"]
        brought = self._brought() if kind == "stream" else repeat(None)
        if modules.embed is not None:
            x, _ = modules.embed(_Embed(self._dtype), None, run)
        cache = list(self.cache)
        for i, (layer, experts) in enumerate(zip(modules.layers, brought, strict=False)):
            x, cache[i] = layer(x, cache[i], run, experts)
        self.cache = tuple(cache)
        if modules.norm is not None:
            x, _ = modules.norm(_norm, None, x, at)
        if modules.head is not None:
            x, _ = modules.head(_Head(tail), None, x, extra)
        return x

    def prepare(self, x: Any, run: Run, at: Any, extra: Any, *, tail: Tail, kind: Kind) -> Any:
        """As `Stage.prepare`. It computes: what its programs hand each other decides what they are."""
        x = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), x)
        return self(x, run, at, extra, tail=tail, kind=kind)

    def _brought(self) -> Iterator[Bound | None]:
        """Each layer's experts on its device, the next ones coming meanwhile: two layers' at a time."""

        def bring(streamed: StreamedExperts | None) -> Bound | None:
            return None if streamed is None else Bound(streamed.graphdef, streamed.read(), self._mesh)

        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(bring, self._streams[0])
            for following in [*self._streams[1:], None]:
                experts, coming = coming.result(), pool.submit(bring, following)
                yield experts


def _bind(module: Any, mesh: Mesh) -> Bound:
    return Bound(*nnx.split(module), mesh)
