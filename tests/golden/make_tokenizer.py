# SPDX-License-Identifier: Apache-2.0
"""Makes tokenizer.json: a tiny byte-level vocabulary and texts with the ids they must get.

    python tests/golden/make_tokenizer.py

The word boundaries of every case are written by hand, and the merges are applied by the few plain lines below, so
the cases hold the tokenizer to something other than itself.
"""

import json
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from ktx_jax.tokenizer import CHARACTER_OF_BYTE

CONTROL = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜EOT｜>"]
USER_DEFINED = ["<think>", "ÿ"]
TEXT = """
A reader takes the words one after another; a model does the same with tokens. The tokens of this vocabulary are
made from the words of this page, so that the words here are short to write and other words are long. The expert
of a layer takes the tokens that the router sends, and the router takes the score of every expert. The cache holds
what the layer said about the tokens before, and the words of the page are the words of the cache. don't don't
def encode(text): return [token for token in text]   if token not in cache:    cache[token] = len(cache)
Привет мир, привет слова. 你好世界，你好词语。 안녕 세계, 안녕 단어. Grüße größer größe schön schöner. naïve café
"""

# pre-tokenizer: texts as their words.
CASES = {
    "deepseek-llm": [
        ["The", " tokens", " of", " the", " cache", "."],
        [" Gr", "üß", "e", ",", " sch", "ö", "n"],
        ["1", "2", "3", " ", "4", "½", "Ⅷ"],
        ["\n", "\n", "\t", "\r", "\n"],
        [" the", "  "],
        [" the", "   ", "\n", "  ", "\n"],
        ["  ", " word"],
        ["你好世界", "，", "안녕"],
        [" Привет", " мир", "!?"],
        ["don", "'", "t", " (", "cache", ")", " [", "token", "]"],
        ["🙂\u200d🚀"],
        ["cafe", "\u0301"],
        ["\x00\x01\x7f"],
    ],
    "deepseek-coder": [
        ["The", " tokens", " of", " the", " cache", "."],
        [" Grüße", ",", " schön"],
        ["1", "2", "3", " ", "4"],
        ["\n", "\n", "\t", "\r", "\n"],
        ["  ", " word"],
        ["你好世界", "，", "안녕"],
        [" the", "   "],
    ],
    "deepseek-v3": [
        ["The", " tokens", " of", " the", " cache", "."],
        [" Grüße", ",", " schön"],
        ["123", "4", " ", "56"],
        [" the", "\n\n", "\t", "word"],
        ["  ", " word"],
        ["你好世界", "，", "안녕"],
        ["(token", ")", " =", " [\n"],
        ["don", "'t"],
        [" the", "   "],
    ],
}


def train() -> tuple[list[str], list[str]]:
    """(tokens, merges) of a vocabulary of 560, specials aside."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence([Split("\n", "isolated"), ByteLevel(add_prefix_space=False)])
    # As in DeepSeek's vocabularies, the bytes that no UTF-8 text holds have no token of their own.
    alphabet = [c for b, c in sorted(CHARACTER_OF_BYTE.items()) if b not in (0xC0, 0xC1) and b < 0xF5]
    trainer = BpeTrainer(vocab_size=560, initial_alphabet=alphabet, show_progress=False, special_tokens=[])
    tokenizer.train_from_iterator([TEXT], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), [" ".join(m) for m in model["merges"]]


def merge(word: str, tokens: list[str], merges: list[str]) -> list[int]:
    """Byte-pair merging as defined: again and again the earliest-learned pair, leftmost first."""
    rank = {tuple(pair.split(" ")): i for i, pair in enumerate(merges)}
    parts = [CHARACTER_OF_BYTE[b] for b in word.encode()]
    while pairs := [(rank[p], i) for i, p in enumerate(pairwise(parts)) if p in rank]:
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [tokens.index(part) for part in parts]


def main() -> None:
    tokens, merges = train()
    cases = [
        {"pre": pre, "text": "".join(words), "ids": [i for word in words for i in merge(word, tokens, merges)]}
        for pre, texts in CASES.items()
        for words in texts
    ]
    specials = CONTROL + USER_DEFINED
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-llm",
        "tokenizer.ggml.tokens": tokens + specials,
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3] * len(CONTROL) + [4] * len(USER_DEFINED),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
        "tokenizer.ggml.eot_token_id": len(tokens) + 4,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    path = Path(__file__).with_name("tokenizer.json")
    path.write_text(json.dumps({"metadata": metadata, "cases": cases}, ensure_ascii=False, indent=0) + "\n")


if __name__ == "__main__":
    main()
