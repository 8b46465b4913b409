// SPDX-License-Identifier: Apache-2.0
// The interface between MLA attention and its kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ktx {

inline constexpr int kHeadLanes = 16;  // heads that are computed together
inline constexpr int kTilePositions = 64;

// Widths of a cache row's two parts, and those padded with zeros to whole vectors.
struct LatentShape {
  int64_t latent;
  int64_t rope;

  int64_t padded_latent() const { return (latent + 31) / 32 * 32; }
  int64_t padded_width() const { return padded_latent() + (rope + 31) / 32 * 32; }
  // A softmax under way: largest score, sum of weights [16] each, weighted sum of latents [16, padded_latent].
  int64_t state_floats() const { return kHeadLanes * (2 + padded_latent()); }
};

// Into the second-level cache.
inline void fetch_row(const void* row, int64_t bytes) {
  if (row == nullptr) return;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const uint8_t*>(row) + i, 0, 2);
}

struct AttentionKernels {
  // Of a packed query and of a packed tile, multiples of 64.
  size_t (*query_bytes)(const LatentShape& shape);
  size_t (*tile_bytes)(const LatentShape& shape);
  // Packs `heads` <= 16 rows of float32 queries.
  void (*pack_query)(const LatentShape& shape, const float* latent, const float* rope, int heads, uint8_t* out);
  // Packs n <= 64 cache rows, bfloat16 or float32; fetches `ahead`, rows that will be packed next, [n] or fewer, the rest
  // nullptr.
  void (*pack_tile)(const LatentShape& shape, const void* const* rows, const void* const* ahead, int n, bool bf16,
                    uint8_t* out);
  // Begins a state that has seen nothing.
  void (*reset)(const LatentShape& shape, float* state);
  // Attends the first `valid` rows of a tile.
  void (*attend)(const LatentShape& shape, const uint8_t* query, const uint8_t* tile, int valid, float scale,
                 float* state);
  // Merges a later state into one whose largest scores and sums are `tops` [2, 16], of all heads, and whose weighted
  // sums are `mean`, of heads [first, last).
  void (*merge)(const LatentShape& shape, const float* later, float* tops, float* mean, int first, int last);
  // out[h - first, r] for heads [first, last), [last - first, latent].
  void (*finish)(const LatentShape& shape, const float* tops, const float* mean, int first, int last, float* out);
};

}  // namespace ktx
