# SPDX-License-Identifier: Apache-2.0
"""`ktx-jax perplexity`: how surprised a model is by a text."""

from pathlib import Path

from ktx_jax.commands.common import ModelOptions, load_llm, print_json, read_text, token_bar


def perplexity(
    options: ModelOptions, file: Path, window: int, stride: int | None, out: Path | None, resume: bool, as_json: bool
) -> int:
    """Measures and prints; returns the exit code."""
    from ktx_jax.evaluate.journal import Journal
    from ktx_jax.evaluate.perplexity import measure_perplexity, perplexity_run

    text = "" if options.follows else read_text(file)
    llm = load_llm(options)
    with Journal(out, perplexity_run(llm, text, window, stride), resume=resume) as journal, token_bar("Scoring") as bar:
        result = measure_perplexity(llm, text, window, stride, journal, bar)
    if as_json:
        said = {"perplexity": result.value, "error": result.error, "nats": result.nats, "tokens": result.tokens}
        print_json({"model": str(options.model), "file": str(file), "window": window, "stride": stride, **said})
    else:
        print(f"perplexity {result.value:.4f} ± {result.error:.4f} over {result.tokens} tokens")
    return 0
