// SPDX-License-Identifier: Apache-2.0
// MLA attention with AVX512-BF16 products over bfloat16 caches.
//
// Queries are [width / 2, 16 heads, 2], tiles [width / 32, 64 rows, 32]. Scores: lanes are heads, a pair of cache
// values is broadcast. Weighted sum: two cache rows are interleaved in registers, lanes are 16 latent values, a pair of
// weights is broadcast. Within 32 latent values the state keeps the order interleaving leaves: 0-3, 8-11, 16-19, 24-27,
// then 4-7, 12-15, ...
#include <cstring>

#include "simd_avx512.h"

#include "attention_state.h"
#include "half.h"
#include "isa.h"

namespace ktx {
namespace {

// acc[lane] += pairs of a times the pair at x. Written out: the compiler does not fold the broadcast into the product.
KTX_INLINE void dot_bf16(F32& acc, __m512i a, const uint16_t* x) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(a), "m"(*reinterpret_cast<const int32_t*>(x)));
}

KTX_INLINE __m512i load_words(const uint16_t* p) { return _mm512_loadu_si512(p); }

// One part of a head's query, n values, into its lane.
void pack_head(const float* values, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i += 32, out += 32 * kHeadLanes) {
    alignas(64) uint32_t pairs[16];
    const int64_t left = n - i;
    const __mmask16 low = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    const __mmask16 high = left >= 32 ? 0xffff : left > 16 ? static_cast<__mmask16>((1u << (left - 16)) - 1) : 0;
    const __m512 a = _mm512_maskz_loadu_ps(low, values + i);
    const __m512 b = _mm512_maskz_loadu_ps(high, values + i + 16);
    _mm512_store_si512(pairs, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
    for (int c = 0; c < 16; ++c) std::memcpy(out + c * 2 * kHeadLanes, &pairs[c], sizeof(uint32_t));
  }
}

void pack_query(const LatentShape& shape, const float* latent, const float* rope, int heads, uint8_t* out) {
  uint16_t* packed = reinterpret_cast<uint16_t*>(out);
  if (heads < kHeadLanes) {
    std::memset(packed, 0, static_cast<size_t>(shape.padded_width()) * kHeadLanes * sizeof(uint16_t));
  }
  for (int h = 0; h < heads; ++h) {
    pack_head(latent + h * shape.latent, shape.latent, packed + 2 * h);
    pack_head(rope + h * shape.rope, shape.rope, packed + shape.padded_latent() * kHeadLanes + 2 * h);
  }
}

// One part of every row, n_values wide, into blocks of 32.
void pack_part(const void* const* rows, int n, int64_t first, int64_t n_values, uint16_t* out) {
  for (int64_t i = 0; i < n_values; i += 32, out += 32 * kTilePositions) {
    const int64_t left = n_values - i;
    const __mmask32 mask = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
    for (int s = 0; s < n; ++s) {
      const uint16_t* row = static_cast<const uint16_t*>(rows[s]) + first + i;
      _mm512_store_si512(out + 32 * s, _mm512_maskz_loadu_epi16(mask, row));
    }
    // Rows up to the next block of 16 are multiplied too, their scores unused.
    for (int s = n; s % 16 != 0; ++s) _mm512_store_si512(out + 32 * s, _mm512_setzero_si512());
  }
}

void pack_tile(const LatentShape& shape, const void* const* rows, int n, bool, uint8_t* out) {
  uint16_t* packed = reinterpret_cast<uint16_t*>(out);
  pack_part(rows, n, 0, shape.latent, packed);
  pack_part(rows, n, shape.latent, shape.rope, packed + shape.padded_latent() * kTilePositions);
}

// Sixteen rows at a time.
void scores(int64_t width, const uint16_t* query, const uint16_t* tile, int valid, float scale, float* out) {
  for (int s = 0; s < valid; s += 16) {
    F32 acc[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) acc[r] = zero_f();
    const uint16_t* q = query;
    for (int64_t i = 0; i < width; i += 32) {
      const uint16_t* block = tile + i * kTilePositions + 32 * s;
#pragma GCC unroll 2
      for (int c = 0; c < 32; c += 2, q += 2 * kHeadLanes) {
        const __m512i pairs = load_words(q);
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) dot_bf16(acc[r], pairs, block + 32 * r + c);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) store_f(out + 16 * (s + r), mul_f(acc[r], set_f(scale)));
  }
}

KTX_INLINE F32 round_to_bf16(F32 x) {  // to nearest even, for finite values
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

// Weights of rows 2i and 2i + 1 side by side: [32, 16 heads, 2]. A missing last row weighs nothing.
void pair_weights(const float* weights, int valid, uint16_t* out) {
  for (int s = 0; s < valid; s += 2) {
    const __m512i even = _mm512_srli_epi32(_mm512_castps_si512(load_f(weights + 16 * s)), 16);
    const __m512i odd = s + 1 < valid ? _mm512_castps_si512(load_f(weights + 16 * (s + 1))) : _mm512_setzero_si512();
    _mm512_store_si512(out + 2 * 16 * (s / 2), _mm512_or_si512(even, odd));
  }
}

// Thirty-two latent values of eight heads.
KTX_INLINE void weighted_sum(const uint16_t* block, const uint16_t* pairs, int valid, const float* fade, float* mean,
                             int64_t width) {
  F32 low[8];
  F32 high[8];
#pragma GCC unroll 8
  for (int h = 0; h < 8; ++h) {
    low[h] = mul_f(load_f(mean + h * width), set_f(fade[h]));
    high[h] = mul_f(load_f(mean + h * width + 16), set_f(fade[h]));
  }
  for (int s = 0; s < valid; s += 2) {
    const __m512i even = load_words(block + 32 * s);
    const __m512i odd = s + 1 < valid ? load_words(block + 32 * (s + 1)) : _mm512_setzero_si512();
    const __m512i a = _mm512_unpacklo_epi16(even, odd);
    const __m512i b = _mm512_unpackhi_epi16(even, odd);
#pragma GCC unroll 8
    for (int h = 0; h < 8; ++h) {
      dot_bf16(low[h], a, pairs + 16 * s + 2 * h);
      dot_bf16(high[h], b, pairs + 16 * s + 2 * h);
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < 8; ++h) {
    store_f(mean + h * width, low[h]);
    store_f(mean + h * width + 16, high[h]);
  }
}

void attend(const LatentShape& shape, const uint8_t* query, const uint8_t* tile_bytes, int valid, float scale,
            float* state) {
  const uint16_t* tile = reinterpret_cast<const uint16_t*>(tile_bytes);
  const State s(state);
  alignas(64) float weights[kTilePositions * kHeadLanes];
  alignas(64) float fade[kHeadLanes];
  alignas(64) uint16_t pairs[kTilePositions * kHeadLanes];
  scores(shape.padded_width(), reinterpret_cast<const uint16_t*>(query), tile, valid, scale, weights);
  softmax_tile(weights, valid, s, fade, round_to_bf16);
  pair_weights(weights, valid, pairs);
  const int64_t width = shape.padded_latent();
  for (int64_t i = 0; i < width; i += 32) {
    for (int h = 0; h < kHeadLanes; h += 8) {
      weighted_sum(tile + i * kTilePositions, pairs + 2 * h, valid, fade + h, s.mean + h * width + i, width);
    }
  }
}

void finish(const LatentShape& shape, const float* tops, const float* mean, int first_head, int last_head, float* out) {
  // Back to the order of the latent: four values of the low half, then four of the high half.
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int h = first_head; h < last_head; ++h, out += shape.latent) {
    const float* row = mean + h * shape.padded_latent();
    const F32 sum = set_f(tops[kHeadLanes + h]);
    for (int64_t i = 0; i < shape.latent; i += 32) {
      const F32 a = div_f(load_f(row + i), sum);
      const F32 b = div_f(load_f(row + i + 16), sum);
      alignas(64) float values[32];
      store_f(values, _mm512_permutex2var_ps(a, first, b));
      store_f(values + 16, _mm512_permutex2var_ps(a, second, b));
      const int64_t n = shape.latent - i < 32 ? shape.latent - i : 32;
      std::memcpy(out + i, values, static_cast<size_t>(n) * sizeof(float));
    }
  }
}

}  // namespace

const AttentionKernels kAttentionBf16 = {sizeof(uint16_t), pack_query,   pack_tile, reset_state,
                                         attend,           merge_states, finish};

}  // namespace ktx
