// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "attention_kernels.h"

namespace ktx {

struct AttentionCall {
  int64_t tokens;
  int64_t heads;
  LatentShape shape;
  const void* q_latent;  // [tokens, heads, latent]
  const void* q_rope;    // [tokens, heads, rope]
  bool q_bf16;
  const void* cache;  // [pages, page_size, latent + rope]
  bool cache_bf16;
  int64_t pages;
  int64_t page_size;
  const int32_t* block_tables;  // [sequences, max_pages]
  int64_t sequences;
  int64_t max_pages;
  const int32_t* sequence;   // [tokens]; negative: padding
  const int32_t* positions;  // [tokens]
  float scale;
  void* out;  // [tokens, heads, latent], of the queries' type
};

// Causal attention of every token over its sequence's rows 0..position. Throws std::invalid_argument, before anything
// is read, if a token's sequence, position or a page it needs is out of range.
//
// Rows are taken in tiles of 64 and chunks of 512 from position 0 whatever the batch, each chunk on its own, and
// chunks are merged in order: a token's result does not depend on its neighbours, nor on how chunks are spread over
// threads.
void mla_attention(const AttentionCall& call);

}  // namespace ktx
