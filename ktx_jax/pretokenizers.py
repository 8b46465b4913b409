# SPDX-License-Identifier: Apache-2.0
"""How DeepSeek's tokenizers cut text into words before byte-pair merging.

GGUF names the way in `tokenizer.ggml.pre`. Each is a chain of splits: every split cuts the pieces that the one
before it left, and keeps what it matches as a piece of its own. A vocabulary was trained behind one exact chain,
so the character ranges below are part of the model. They are those of `tokenizer.json` of DeepSeek LLM / V2,
DeepSeek Coder (V1) and DeepSeek V3.
"""

from collections.abc import Callable

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from ktx_jax.errors import KtxError
from ktx_jax.gguf.errors import quote

# Letters that have case, in the Latin, Greek, Cyrillic and other scripts that DeepSeek LLM glues into words.
# Hexadecimal code points; numbered, not typed, because several of them change under Unicode normalization.
_CASED_LETTERS = """
41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376-377 37b-37d 37f 386 388-38a 38c 38e-3a1
3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a
1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4
1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128
212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183-2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2-2cf3 a640-a66d
a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3
104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943
"""
# From '!' to '/' and from ':' to '~', their full-width forms, quotes, CJK stops. ':' to '~' holds the ASCII letters
# too, so this split cuts words again between ASCII and other letters: "Wörld" is W, ö, rld. The vocabulary agrees.
_PUNCTUATION = "21-2f 3a-7e ff01-ff0f ff1a-ff5e 2018-201f 3000-3002"
_HAN_AND_HANGUL = "4e00-9fa5 800-4e00 ac00-d7ff"
_HAN_AND_KANA = "4e00-9fa5 3040-309f 30a0-30ff"
_ASCII_PUNCTUATION = "21-2f 3a-40 5b-60 7b-7e"


def _ranges(code_points: str) -> str:
    """The inside of a regular expression's character class, from ranges of hexadecimal code points."""
    parts = []
    for span in code_points.split():
        first, _, last = span.partition("-")
        parts.append(rf"\x{{{first}}}-\x{{{last or first}}}")
    return "".join(parts)


def _isolate(pattern: str) -> PreTokenizer:
    return Split(Regex(pattern), behavior="isolated")


def _deepseek_llm() -> list[PreTokenizer]:
    return [
        _isolate(r"[\r\n]"),
        _isolate(rf"\s?[{_ranges(_CASED_LETTERS)}]+"),
        _isolate(rf"\s?[{_ranges(_PUNCTUATION)}]+"),
        _isolate(r"\s+$"),
        _isolate(rf"[{_ranges(_HAN_AND_HANGUL)}]+"),
        Digits(individual_digits=True),
    ]


def _deepseek_coder() -> list[PreTokenizer]:
    return [
        _isolate(r"[\r\n]"),
        _isolate(r"\s?\p{L}+"),
        _isolate(r"\s?\p{P}+"),
        _isolate(rf"[{_ranges(_HAN_AND_HANGUL)}]+"),
        Digits(individual_digits=True),
    ]


def _deepseek_v3() -> list[PreTokenizer]:
    words = "|".join(
        (
            rf"[{_ranges(_ASCII_PUNCTUATION)}][A-Za-z]+",
            r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
            r" ?[\p{P}\p{S}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    )
    return [_isolate(r"\p{N}{1,3}"), _isolate(rf"[{_ranges(_HAN_AND_KANA)}]+"), _isolate(words)]


_CHAINS: dict[str, Callable[[], list[PreTokenizer]]] = {
    "deepseek-llm": _deepseek_llm,
    "deepseek-coder": _deepseek_coder,
    "deepseek-v3": _deepseek_v3,
}
SUPPORTED = tuple(_CHAINS)


def pre_tokenizer(name: str) -> PreTokenizer:
    """The splits that `tokenizer.ggml.pre = name` stands for, then bytes as printable characters.

    Raises:
        KtxError: a name that is not one of `SUPPORTED`.
    """
    if name not in _CHAINS:
        raise KtxError(
            f"tokenizer.ggml.pre is {quote(name)}, which ktx-jax does not know; supported: {', '.join(SUPPORTED)}. "
            "If the file's tokenizer is one of these under another name, correct that key in the file."
        )
    return Sequence([*_CHAINS[name](), ByteLevel(add_prefix_space=False, use_regex=False)])
