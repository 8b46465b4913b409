# SPDX-License-Identifier: Apache-2.0
"""A byte-level BPE vocabulary for the embedded model, trained on its own corpus, and its GGUF metadata."""

import json

from tiny_chat import BOS, CHAT_TEMPLATE, EOS, SPECIAL_TOKENS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ktx_jax.pretokenizers import pre_tokenizer

PRE = "deepseek-llm"
NORMAL, CONTROL = 1, 3  # ggml's token types


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE behind DeepSeek LLM's splits; the special tokens take the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(PRE)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_metadata(tokenizer: Tokenizer) -> dict:
    """The `tokenizer.*` keys of GGUF that hold the vocabulary, its merges and the chat template."""
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": PRE,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if token in SPECIAL_TOKENS else NORMAL for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": tokens.index(BOS),
        "tokenizer.ggml.eos_token_id": tokens.index(EOS),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
