# SPDX-License-Identifier: Apache-2.0
"""Ways to cut a model, run side by side on virtual CPU devices: what a device holds, what devices exchange, how far the
answers are from one device's, how fast it is. A table and a figure.

    python examples/sharding_experiment.py [--model FILE] [--rules FILE ...] [--out FIGURE]

`sharding_sweep.py` asks the same of devices that are not here, by arithmetic alone; here everything runs. Virtual
devices share one processor, so the speeds show what cutting costs, not what more hardware would gain.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import jax
import numpy as np
from matplotlib.figure import Figure

from ktx_jax import LLM, Rules, SamplingParams
from ktx_jax.evaluate.compare import measure_distances
from ktx_jax.gguf.reader import open_gguf
from ktx_jax.gguf.writer import TensorSource, write_gguf
from ktx_jax.resources import demo_model
from ktx_jax.sharding.collectives import predict_collectives
from ktx_jax.sharding.memory import show_bytes
from ktx_jax.sharding.step_size import step_size

DEVICES, BATCH, CONTEXT = 4, 8, 128
TINY = {
    "one device": "rules: [{match: '.*', device: 'gpu:0'}]",
    "tensor": r"""
mesh: {tensor: 2}
rules:
  - {match: '.*(norm|kv_a_proj_with_mqa|mlp\.gate|q_a_proj)', shard: replicate}
  - {match: '.*\.experts\.down_proj', shard: [null, null, tensor]}
  - {match: '.*\.experts\..*', shard: [null, tensor]}
  - {match: '.*\.(o_proj|down_proj)', shard: [null, tensor]}
  - {match: '.*', shard: [tensor]}""",
    "expert": r"""
mesh: {expert: 4}
rules:
  - {match: '.*\.experts\..*', shard: [expert]}
  - {match: '.*', shard: replicate}""",
    "expert, tensor": r"""
mesh: {expert: 2, tensor: 2}
rules:
  - {match: '.*(norm|kv_a_proj_with_mqa|mlp\.gate|q_a_proj)', shard: replicate}
  - {match: '.*\.experts\.down_proj', shard: [expert, null, tensor]}
  - {match: '.*\.experts\..*', shard: [expert, tensor]}
  - {match: '.*\.(o_proj|down_proj)', shard: [null, tensor]}
  - {match: '.*', shard: [tensor]}""",
    "data": """
mesh: {data: 4}
rules: [{match: '.*', shard: replicate}]""",
    "stages": r"""
stages: [gpu:0, gpu:1]
rules:
  - {match: 'model\.embed_tokens|model\.layers\.[01]\..*', stage: 0}
  - {match: '.*', stage: 1}""",
}


@dataclass(frozen=True)
class Row:
    """One way to cut the model: `kl` in nats from the first way's answers, bytes of the fullest device."""

    name: str
    devices: int
    weights: int
    cache: int
    collectives: int  # of a decode step
    exchanged: int  # their bytes
    kl: float
    tokens_per_second: float


def untied(model: Path, folder: Path) -> Path:
    """The model; where its head is its embedding, a file with a copy of it, so that they can be in different stages."""
    with open_gguf(model) as gguf:
        if "output.weight" in gguf.tensors:
            return model
        tensors = [TensorSource(name, t.shape, t.ggml_type, gguf.blocks(name)) for name, t in gguf.tensors.items()]
        tensors += [one._replace(name="output.weight") for one in tensors if one.name == "token_embd.weight"]
        write_gguf(folder / model.name, gguf.metadata, tensors)
    return folder / model.name


def experiment(model: Path, ways: list[Rules], text: str) -> Iterator[Row]:
    """Runs the model in each way; the first is what the others are held against."""
    reference = None
    for rules in ways:
        llm = LLM(model, rules=rules, devices=jax.devices("cpu"), implementation="xla", context=CONTEXT, batch=BATCH)
        tokens = llm.encode(text)[:CONTEXT]
        logits = llm.logits(tokens)
        reference = logits if reference is None else reference
        targets = np.asarray(tokens[1:], np.int32)
        collectives = predict_collectives(llm.plan, step_size(llm.plan, "decode"))
        yield Row(
            rules.name,
            len(llm.plan.devices),
            max(need.weights for need in llm.plan.needs.values()),
            max(need.cache for need in llm.plan.needs.values()),
            len(collectives),
            sum(one.nbytes for one in collectives),
            float(measure_distances(reference[:-1], logits[:-1], targets).kl.mean()),
            speed(llm, tokens),
        )


def speed(llm: LLM, tokens: list[int]) -> float:
    """Tokens a second of a batch of replies, prompts included; the second time, when all is compiled."""
    prompts = [tokens[i : i + 16] for i in range(BATCH)]
    params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
    seconds = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        llm.generate(prompts, params)
        seconds = time.perf_counter() - begun
    return BATCH * 32 / seconds


def draw(rows: list[Row], path: Path) -> None:
    """A panel for each figure, a bar for each way."""
    panels = {
        "weights, MB on the fullest device": [row.weights / 1e6 for row in rows],
        "cache, MB on the fullest device": [row.cache / 1e6 for row in rows],
        "exchanged, kB a decode step": [row.exchanged / 1e3 for row in rows],
        "KL from the first, nats a token": [row.kl for row in rows],
        "tokens a second": [row.tokens_per_second for row in rows],
    }
    figure = Figure(figsize=(14, 1.2 + 0.4 * len(rows)), layout="constrained")
    at = np.arange(len(rows))[::-1]
    for axes, (title, values) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        axes.barh(at, values, color="#4878a8")
        axes.set_yticks(at, [f"{row.name} ({row.devices})" for row in rows])
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.locator_params(axis="x", nbins=4)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Prints the table, draws the figure, and returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model(), help="a GGUF file [default: the embedded model]")
    parser.add_argument("--rules", type=Path, nargs="+", help="rule files, the first to hold the others against")
    parser.add_argument("--devices", type=int, default=DEVICES, help=f"virtual CPU devices [default: {DEVICES}]")
    parser.add_argument("--out", type=Path, default=Path("sharding_experiment.png"), help="the figure")
    options = parser.parse_args(arguments)
    jax.config.update("jax_num_cpu_devices", options.devices)
    if options.rules:
        ways = [Rules.from_file(path) for path in options.rules]
    else:
        ways = [Rules.from_text(text, name) for name, text in TINY.items()]
    print(f"{'rules':16} devices   weights     cache  collectives  exchanged        KL  tokens/s")
    rows = []
    with TemporaryDirectory() as folder:
        for row in experiment(untied(options.model, Path(folder)), ways, "\n".join(topics.values())):
            rows.append(row)
            held = f"{row.devices:7} {show_bytes(row.weights):>9} {show_bytes(row.cache):>9}"
            exchanged = f"{row.collectives:12} {show_bytes(row.exchanged):>10}"
            print(f"{row.name:16} {held} {exchanged} {row.kl:9.2e} {row.tokens_per_second:9.1f}", flush=True)
    draw(rows, options.out)
    print(options.out)
    return rows


if __name__ == "__main__":
    main()
