# SPDX-License-Identifier: Apache-2.0
"""`ktx-jax compare`: what a quantization, an implementation or a dtype costs, by two models' answers to one text."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ktx_jax.commands.common import ModelOptions, load_llms, notes, print_json, read_text, token_bar


def compare(
    a: ModelOptions, b: ModelOptions, file: Path, window: int, out: Path | None, resume: bool, plot: Path | None,
    as_json: bool,
) -> int:  # fmt: skip
    """Compares and prints a table, or JSON; returns the exit code."""
    from ktx_jax.evaluate.compare import blank_figure, compare, compare_run, draw_comparison
    from ktx_jax.evaluate.journal import Journal

    text = "" if a.follows else read_text(file)
    if plot is not None and not a.follows:
        blank_figure(plot)
    first, second = models = load_llms(a, b)
    run = compare_run(first, second, text, window)
    with Journal(out, run, resume=resume) as journal, token_bar("Comparing") as bar:
        distances = compare(first, second, text, window, journal, bar)
    summary = distances.summary()
    names = [f"{llm.path.name}, {llm.implementation}, {llm.dtype.__name__}" for llm in models]
    if as_json:
        print_json({"a": names[0], "b": names[1], "file": str(file), **summary})
    else:
        _print(names, summary)
    if plot is not None:
        draw_comparison(distances, (llm.path.name for llm in models), plot)
        notes.print(f"drawn in {plot}", markup=False)
    return 0


def _print(names: list[str], s: dict[str, int | float]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    rows = {
        "A": names[0],
        "B": names[1],
        "tokens": f"{s['tokens']}",
        "perplexity A": f"{s['perplexity_a']:.4f} ± {s['perplexity_a_error']:.4f}",
        "perplexity B": f"{s['perplexity_b']:.4f} ± {s['perplexity_b_error']:.4f}",
        "ln(B / A)": f"{s['log_perplexity_ratio']:.6f} ± {s['log_perplexity_ratio_error']:.6f}",
        "KL from A to B": f"{s['kl']:.3e} ± {s['kl_error']:.1e} nats a token",
        "KL median, 90%, 99%": f"{s['kl_p50']:.2e}, {s['kl_p90']:.2e}, {s['kl_p99']:.2e}",
        "KL 99.9%, most": f"{s['kl_p99.9']:.2e}, {s['kl_p100']:.2e}",
        "same top token": f"{s['same_top']:.2%} ± {s['same_top_error']:.2%}",
        "probability, RMS change": f"{s['probability_rms']:.2%}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False, soft_wrap=True, markup=False).print(table)
