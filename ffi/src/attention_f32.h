// SPDX-License-Identifier: Apache-2.0
// MLA attention in float32, over float32 or bfloat16 caches. Included after a simd_*.h.
//
// Scores: lanes are heads, so that the cache is read as it lies, one value broadcast at a time; queries are [width,
// 16]. Weighted sum: lanes are 16 latent values. Tiles are [width / 16, 64 rows, 16].
#pragma once

#include "attention_state.h"
#include "half.h"

namespace ktx {
namespace {

constexpr int kRowBlock = kTileRows;  // cache rows, or heads, in registers

// Element i of a padded row: latent, zeros, rope, zeros.
inline int64_t source_index(const LatentShape& shape, int64_t i) {
  if (i < shape.padded_latent()) return i < shape.latent ? i : -1;
  const int64_t r = i - shape.padded_latent();
  return r < shape.rope ? shape.latent + r : -1;
}

void pack_query_f32(const LatentShape& shape, const float* latent, const float* rope, int heads, uint8_t* out) {
  float* packed = reinterpret_cast<float*>(out);
  for (int64_t i = 0; i < shape.padded_width(); ++i) {
    const int64_t from = source_index(shape, i);
    for (int h = 0; h < kHeadLanes; ++h) {
      float value = 0.0f;
      if (h < heads && from >= 0) {
        value = from < shape.latent ? latent[h * shape.latent + from] : rope[h * shape.rope + from - shape.latent];
      }
      packed[i * kHeadLanes + h] = value;
    }
  }
}

void pack_tile_f32(const LatentShape& shape, const void* const* rows, const void* const* ahead, int n, bool bf16,
                   uint8_t* out) {
  for (int s = 0; s < n; ++s) fetch_row(ahead[s], (bf16 ? 2 : 4) * (shape.latent + shape.rope));
  float* packed = reinterpret_cast<float*>(out);
  for (int64_t i = 0; i < shape.padded_width(); i += 16) {
    float* block = packed + i * kTilePositions;
    const int64_t from = source_index(shape, i);
    const bool whole = from >= 0 && source_index(shape, i + 15) == from + 15;
    for (int s = 0; s < n; ++s) {
      const float* f = static_cast<const float*>(rows[s]);
      const uint16_t* b = static_cast<const uint16_t*>(rows[s]);
      if (whole) {
        store_f(block + 16 * s, bf16 ? load_bf16(reinterpret_cast<const uint8_t*>(b + from)) : load_f(f + from));
        continue;
      }
      for (int c = 0; c < 16; ++c) {
        const int64_t at = source_index(shape, i + c);
        block[16 * s + c] = at < 0 ? 0.0f : bf16 ? bf16_to_float(b[at]) : f[at];
      }
    }
    // Rows up to the next block are multiplied too, their scores unused.
    for (int s = n; s < kTilePositions && s % kRowBlock != 0; ++s) store_f(block + 16 * s, zero_f());
  }
}

void scores_f32(int64_t width, const float* query, const float* tile, int valid, float scale, float* scores) {
  for (int s = 0; s < valid; s += kRowBlock) {
    F32 acc[kRowBlock];
#pragma GCC unroll 16
    for (int r = 0; r < kRowBlock; ++r) acc[r] = zero_f();
    for (int64_t i = 0; i < width; i += 16) {
      const float* block = tile + i * kTilePositions + 16 * s;
      for (int c = 0; c < 16; ++c) {
        const F32 q = load_f(query + (i + c) * kHeadLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRowBlock; ++r) acc[r] = fma_f(q, set_f(block[16 * r + c]), acc[r]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRowBlock; ++r) store_f(scores + 16 * (s + r), mul_f(acc[r], set_f(scale)));
  }
}

void attend_f32(const LatentShape& shape, const uint8_t* query, const uint8_t* tile_bytes, int valid, float scale,
                float* state) {
  const float* tile = reinterpret_cast<const float*>(tile_bytes);
  const State s(state);
  alignas(64) float weights[kTilePositions * kHeadLanes];
  alignas(64) float fade[kHeadLanes];
  scores_f32(shape.padded_width(), reinterpret_cast<const float*>(query), tile, valid, scale, weights);
  softmax_tile(weights, valid, s, fade);
  const int64_t width = shape.padded_latent();
  for (int64_t i = 0; i < width; i += 16) {
    const float* block = tile + i * kTilePositions;
    for (int h = 0; h < kHeadLanes; h += kRowBlock) {
      float* mean = s.mean + h * width + i;
      F32 acc[kRowBlock];
#pragma GCC unroll 16
      for (int r = 0; r < kRowBlock; ++r) acc[r] = mul_f(load_f(mean + r * width), set_f(fade[h + r]));
      for (int p = 0; p < valid; ++p) {
        const F32 v = load_f(block + 16 * p);
#pragma GCC unroll 16
        for (int r = 0; r < kRowBlock; ++r) acc[r] = fma_f(v, set_f(weights[16 * p + h + r]), acc[r]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRowBlock; ++r) store_f(mean + r * width, acc[r]);
    }
  }
}

void finish_f32(const LatentShape& shape, const float* tops, const float* mean, int first, int last, float* out) {
  for (int h = first; h < last; ++h, out += shape.latent) {
    const float sum = tops[kHeadLanes + h];
    const float* row = mean + h * shape.padded_latent();
    for (int64_t i = 0; i < shape.latent; ++i) out[i] = row[i] / sum;
  }
}

size_t query_bytes_f32(const LatentShape& shape) {
  return static_cast<size_t>(kHeadLanes * shape.padded_width()) * sizeof(float);
}

size_t tile_bytes_f32(const LatentShape& shape) {
  return static_cast<size_t>(kTilePositions * shape.padded_width()) * sizeof(float);
}

constexpr AttentionKernels kAttentionF32 = {query_bytes_f32, tile_bytes_f32, pack_query_f32, pack_tile_f32,
                                            reset_state,     attend_f32,     merge_states,   finish_f32};

}  // namespace
}  // namespace ktx
