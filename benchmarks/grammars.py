# SPDX-License-Identifier: Apache-2.0
"""llguidance beside xgrammar, on a model's vocabulary: compiling schemas, a mask a token, whether replies validate.

    python benchmarks/grammars.py MODEL     with xgrammar and jsonschema installed beside ktx-jax[serve]

Replies are random walks: at each place one of the allowed tokens, quotes and brackets that close more often than
others,
until the grammar lets it end.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, Protocol

import jsonschema
import numpy as np
import xgrammar

from ktx_jax.engine.grammar import Grammar, prepare_grammars
from ktx_jax.errors import KtxError
from ktx_jax.tokenizer import Tokenizer


def closed(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }  # fmt: skip


STRING, INTEGER, NUMBER = ({"type": kind} for kind in ("string", "integer", "number"))
TYPICAL = {
    "flat": closed(name=STRING, age=INTEGER, score=NUMBER, active={"type": "boolean"}),
    "list": closed(
        items={"type": "array", "items": closed(id=INTEGER, title=STRING, tags={"type": "array", "items": STRING})}
    ),
    "choices": closed(
        unit={"enum": ["celsius", "fahrenheit"]}, place=STRING, when={"anyOf": [STRING, {"type": "null"}]}
    ),
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {"node": closed(value=INTEGER, children={"type": "array", "items": {"$ref": "#/$defs/node"}})},
    },
    "any object": {"type": "object"},
}
HARD = {
    "bounds": closed(
        a={"type": "integer", "minimum": -5, "maximum": 37}, b={"type": "number", "exclusiveMinimum": 0, "maximum": 1.5}
    ),
    "pattern": closed(
        code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
        word={"type": "string", "minLength": 3, "maxLength": 8},
    ),
    "counts": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 3, "maxItems": 5},
    "formats": closed(day={"type": "string", "format": "date"}, id={"type": "string", "format": "uuid"}),
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
            {"type": "object", "properties": {"b": STRING}, "required": ["b"]},
        ]
    },
    "one of": {"oneOf": [closed(kind={"const": "x"}, n=INTEGER), closed(kind={"const": "y"}, s=STRING)]},
    "tuple": {"type": "array", "prefixItems": [STRING, INTEGER], "items": False, "minItems": 2},
    "multiple": closed(n={"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100}),
}


class Walker(Protocol):
    """How far a reply has come."""

    def mask(self) -> np.ndarray:
        """The allowed tokens' bits, 32 a word."""
        ...

    def accept(self, token: int) -> bool: ...


class Guided:
    """llguidance, through `Grammar`."""

    name = "llguidance"

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        prepare_grammars(tokenizer)

    def compile(self, schema: dict[str, Any]) -> Grammar:
        return Grammar.from_json_schema(schema, self._tokenizer)

    def start(self, compiled: Grammar) -> Walker:
        match = compiled.start()
        match.mask = match.allowed  # type: ignore[attr-defined]
        return match  # type: ignore[return-value]


class _Matched:
    def __init__(self, compiled: Any, words: int):
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._bits = xgrammar.allocate_token_bitmask(1, words * 32)

    def mask(self) -> np.ndarray:
        self._matcher.fill_next_token_bitmask(self._bits)
        return self._bits[0].numpy().view(np.uint32)

    def accept(self, token: int) -> bool:
        return bool(self._matcher.accept_token(token))


class Compiled:
    """xgrammar; compact JSON as ours, one thread, nothing kept from one schema to the next."""

    name = "xgrammar"

    def __init__(self, tokenizer: Tokenizer):
        self._words = -(-tokenizer.vocab_size // 32)
        vocabulary = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        info = xgrammar.TokenizerInfo(
            vocabulary, xgrammar.VocabType.RAW, vocab_size=len(vocabulary), stop_token_ids=sorted(tokenizer.eos_ids)
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, schema: dict[str, Any]) -> Any:
        return self._compiler.compile_json_schema(
            json.dumps(schema), any_whitespace=False, separators=(",", ":"), strict_mode=False
        )

    def start(self, compiled: Any) -> Walker:
        return _Matched(compiled, self._words)


def walk(walker: Walker, tokenizer: Tokenizer, rng: np.random.Generator, most: int) -> tuple[str | None, list[float]]:
    """A random reply, None if it did not end within `most` tokens; seconds of each mask."""
    closers = {i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in (b'"', b"}", b"]")}
    out, times = [], []
    for _ in range(most):
        begun = time.perf_counter()
        mask = walker.mask()
        times.append(time.perf_counter() - begun)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: tokenizer.vocab_size]).tolist()
        if tokenizer.eos_ids & set(allowed):
            return b"".join(map(tokenizer.token_bytes, out)).decode(errors="replace"), times
        close = sorted(closers & set(allowed))
        token = int(rng.choice(close if close and rng.random() < 0.3 else allowed))
        assert walker.accept(token)
        out.append(token)
    return None, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file; its vocabulary is all that is read")
    parser.add_argument("--walks", type=int, default=20, help="random replies of each schema")
    options = parser.parse_args()
    tokenizer = Tokenizer.from_gguf(options.model)
    for kind in (Guided, Compiled):
        begun = time.perf_counter()
        engine: Any = kind(tokenizer)
        print(f"{kind.name}: vocabulary of {tokenizer.vocab_size} in {time.perf_counter() - begun:.2f} s")
        for group in (TYPICAL, HARD):
            for name, schema in group.items():
                print(f"  {name:12} {measure(engine, schema, tokenizer, options.walks)}", flush=True)


def measure(engine: Any, schema: dict[str, Any], tokenizer: Tokenizer, walks: int) -> str:
    """One line of figures."""
    compiled, seconds = None, []
    for _ in range(5):
        begun = time.perf_counter()
        try:
            compiled = engine.compile(schema)
        except (KtxError, RuntimeError, ValueError) as error:
            return f"refused: {' '.join(str(error).split())[:90]}"
        seconds.append(time.perf_counter() - begun)
    rng, times, ended, valid = np.random.default_rng(0), [], 0, 0
    for _ in range(walks):
        text, spent = walk(engine.start(compiled), tokenizer, rng, most=60)
        times += spent
        if text is not None:
            ended += 1
            valid += validates(text, schema)
    mask = f"mask {1e6 * statistics.median(times):6.0f} us, 99% {1e6 * float(np.percentile(times, 99)):6.0f} us"
    return (
        f"compile {1e3 * statistics.median(seconds):8.2f} ms   {mask}   {valid} of {ended} replies that ended validate"
    )


def validates(text: str, schema: dict[str, Any]) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


if __name__ == "__main__":
    main()
