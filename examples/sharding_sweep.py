# SPDX-License-Identifier: Apache-2.0
"""Which way to cut DeepSeek-V2.5 over eight GPUs, before there are any: a table, a CSV file and a picture.

    python examples/sharding_sweep.py --out sweep
    python examples/sharding_sweep.py --preset v2-lite --rules configs/deepseek-v2-lite/*gpu*.yaml --targets rtx4090

The times are a roofline (docs/plans.md): lower bounds, good for telling layouts apart.
"""

import argparse
from pathlib import Path

from ktx_jax.presets import SHAPES, preset_config
from ktx_jax.sharding.memory import show_bytes
from ktx_jax.sharding.sweep import sweep, write_csv
from ktx_jax.sharding.sweep_figure import draw_sweep

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "deepseek-v2.5"
RULES = [CONFIGS / f"8gpu{how}.yaml" for how in ("", "-width", "-expert-tensor", "-data", "-2stages")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=SHAPES, default="v2.5")
    parser.add_argument("--quant", default="q4_k_m")
    parser.add_argument("--rules", nargs="+", type=Path, default=RULES)
    parser.add_argument("--targets", nargs="+", default=["h200", "a100-80g"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=Path("sweep"), help="OUT.csv and OUT.svg are written")
    options = parser.parse_args()
    rows = sweep(
        preset_config(options.preset), options.rules, options.targets,
        batches=options.batches, contexts=[options.context], types=options.quant,
    )  # fmt: skip
    print(f"{'rules':28} {'target':24} {'batch':>5} {'needed':>9} {'step':>9} {'tokens/s':>9}  bound")
    for row in rows:
        name = Path(row.rules).stem
        if row.error:
            print(f"{name:28} {row.target:24} {row.error}")
            continue
        needed = show_bytes(row.needed) + ("" if row.fits else " !")
        print(f"{name:28} {row.target:24} {row.batch:5} {needed:>9} {row.decode_s * 1e3:6.2f} ms "
              f"{row.pipelined_tokens_per_second:9.0f}  {row.bound}")  # fmt: skip
    write_csv(rows, options.out.with_suffix(".csv"))
    options.out.with_suffix(".svg").write_text(draw_sweep(rows).svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
