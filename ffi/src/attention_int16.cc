// SPDX-License-Identifier: Apache-2.0
// MLA attention over bfloat16 caches in 16-bit integers: AVX-512 VNNI multiplies them at twice the rate of float32, on
// some machines at four times that of bfloat16, and eleven bits below a row's largest value lose less than bfloat16's
// eight do.
//
// Each part (latent, rope) of a cache row and of a query has a scale. Queries are [width / 2, 16 heads, 2]. A tile is
// there twice: by rows for the scores, [width / 32, 64 rows, 32], where lanes are heads and a pair of cache values is
// broadcast; and by pairs of rows for the weighted sum, [latent / 32, 32 pairs, 2, 16, 2], where lanes are latent values
// and a pair of weights is broadcast. The first axis has room for a cache line more: else a row's blocks would all fall
// into one set of the first-level cache. The two vectors of a pair hold values 0-3, 8-11, 16-19, 24-27 of 32 and the
// others, and so does the state. Sums of products fit 32 bits by the choice of levels.
#include <algorithm>
#include <cstring>

#include "simd_avx512.h"

#include "attention_state.h"
#include "half.h"
#include "isa.h"

namespace ktx {
namespace {

constexpr int64_t kBlock = 32 * kTilePositions + 32;  // values from one block of 32 columns to the next
constexpr float kCacheLevels = 2047.0f;
constexpr float kWeightLevels = 16383.0f;  // 64 of them times cache levels
constexpr float kNothing = 1e-30f;         // what is smaller counts as zero: its inverse may not be finite

// The most levels with which n products with cache levels fit 32 bits.
float query_levels(int64_t n) {
  return static_cast<float>(std::min<int64_t>(32767, INT32_MAX / (2047 * std::max<int64_t>(n, 1))));
}

struct Query {
  int16_t* latent;  // [padded_latent / 2, 16, 2]
  int16_t* rope;
  float* latent_scale;  // [16]
  float* rope_scale;

  Query(const LatentShape& shape, const uint8_t* p)
      : latent(reinterpret_cast<int16_t*>(const_cast<uint8_t*>(p))),
        rope(latent + shape.padded_latent() * kHeadLanes),
        latent_scale(reinterpret_cast<float*>(latent + shape.padded_width() * kHeadLanes)),
        rope_scale(latent_scale + kHeadLanes) {}

  static size_t bytes(const LatentShape& shape) {
    return static_cast<size_t>(shape.padded_width() * kHeadLanes) * sizeof(int16_t) + 2 * kHeadLanes * sizeof(float);
  }
};

struct Rows {
  int16_t* latent;  // [padded_latent / 32, kBlock], of which 64, 32
  int16_t* rope;
  int16_t* pairs;  // [padded_latent / 32, kBlock], of which 32, 2, 16, 2
  float* latent_scale;  // [64]
  float* rope_scale;

  Rows(const LatentShape& shape, const uint8_t* p)
      : latent(reinterpret_cast<int16_t*>(const_cast<uint8_t*>(p))),
        rope(latent + shape.padded_latent() / 32 * kBlock),
        pairs(latent + shape.padded_width() / 32 * kBlock),
        latent_scale(reinterpret_cast<float*>(pairs + shape.padded_latent() / 32 * kBlock)),
        rope_scale(latent_scale + kTilePositions) {}

  static size_t bytes(const LatentShape& shape) {
    const int64_t blocks = (shape.padded_width() + shape.padded_latent()) / 32;
    return static_cast<size_t>(blocks * kBlock) * sizeof(int16_t) + 2 * kTilePositions * sizeof(float);
  }
};

KTX_INLINE __m512i load_words(const int16_t* p) { return _mm512_loadu_si512(p); }
KTX_INLINE __mmask16 first_of_16(int64_t n) {
  return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1);
}
KTX_INLINE __mmask32 first_of_32(int64_t n) { return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1; }

// acc[lane] += pairs of a times the pair at x. Written out: the compiler does not fold the broadcast into the product.
KTX_INLINE void dot_words(I32& acc, __m512i a, const int16_t* x) {
  asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(a), "m"(*reinterpret_cast<const int32_t*>(x)));
}

// One part of a head's query, n values, into its lane; its scale. A value that is not finite makes that NaN.
float pack_head(const float* values, int64_t n, int16_t* out) {
  __m512i bits = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i v = _mm512_castps_si512(_mm512_maskz_loadu_ps(first_of_16(n - i), values + i));
    bits = _mm512_max_epu32(bits, _mm512_and_si512(v, _mm512_set1_epi32(0x7fffffff)));
  }
  const float top = float_from_bits(_mm512_reduce_max_epu32(bits));
  const float levels = query_levels(n);
  const F32 inverse = set_f(top > kNothing && top < __builtin_inff() ? levels / top : 0.0f);
  for (int64_t i = 0; i < n; i += 32, out += 32 * kHeadLanes) {
    const __m512i a = _mm512_cvtps_epi32(mul_f(_mm512_maskz_loadu_ps(first_of_16(n - i), values + i), inverse));
    const __m512i b =
        _mm512_cvtps_epi32(mul_f(_mm512_maskz_loadu_ps(first_of_16(n - i - 16), values + i + 16), inverse));
    alignas(64) uint32_t pairs[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), _mm512_cvtepi32_epi16(a));
    _mm256_store_si256(reinterpret_cast<__m256i*>(pairs + 8), _mm512_cvtepi32_epi16(b));
    for (int c = 0; c < 16; ++c) std::memcpy(out + c * 2 * kHeadLanes, &pairs[c], sizeof(uint32_t));
  }
  return top < __builtin_inff() ? top / levels : __builtin_nanf("");
}

void pack_query(const LatentShape& shape, const float* latent, const float* rope, int heads, uint8_t* out) {
  if (heads < kHeadLanes) std::memset(out, 0, Query::bytes(shape));
  const Query q(shape, out);
  for (int h = 0; h < heads; ++h) {
    q.latent_scale[h] = pack_head(latent + h * shape.latent, shape.latent, q.latent + 2 * h);
    q.rope_scale[h] = pack_head(rope + h * shape.rope, shape.rope, q.rope + 2 * h);
  }
}

// One part of a cache row, n values, into blocks of 32; its scale.
float pack_row(const uint16_t* row, int64_t n, int16_t* out) {
  __m512i bits = _mm512_setzero_si512();  // magnitudes of bfloat16 compare as their bits
  for (int64_t i = 0; i < n; i += 32) {
    const __m512i v = _mm512_maskz_loadu_epi16(first_of_32(n - i), row + i);
    bits = _mm512_max_epu16(bits, _mm512_and_si512(v, _mm512_set1_epi16(0x7fff)));
  }
  bits = _mm512_max_epu32(_mm512_srli_epi32(bits, 16), _mm512_and_si512(bits, _mm512_set1_epi32(0xffff)));
  const float top = float_from_bits(_mm512_reduce_max_epu32(bits) << 16);
  const F32 inverse = set_f(top > kNothing && top < __builtin_inff() ? kCacheLevels / top : 0.0f);
  for (int64_t i = 0; i < n; i += 32, out += kBlock) {
    const __m512i v = _mm512_maskz_loadu_epi16(first_of_32(n - i), row + i);
    // As float32, in the order that packing undoes.
    const F32 a = _mm512_castsi512_ps(_mm512_unpacklo_epi16(_mm512_setzero_si512(), v));
    const F32 b = _mm512_castsi512_ps(_mm512_unpackhi_epi16(_mm512_setzero_si512(), v));
    const __m512i levels =
        _mm512_packs_epi32(_mm512_cvtps_epi32(mul_f(a, inverse)), _mm512_cvtps_epi32(mul_f(b, inverse)));
    _mm512_store_si512(out, levels);
  }
  return top < __builtin_inff() ? top / kCacheLevels : __builtin_nanf("");
}

void pack_tile(const LatentShape& shape, const void* const* rows, const void* const* ahead, int n, bool, uint8_t* out) {
  const Rows tile(shape, out);
  for (int s = 0; s < n; ++s) {
    fetch_row(ahead[s], 2 * (shape.latent + shape.rope));
    const uint16_t* row = static_cast<const uint16_t*>(rows[s]);
    tile.latent_scale[s] = pack_row(row, shape.latent, tile.latent + 32 * s);
    tile.rope_scale[s] = pack_row(row + shape.latent, shape.rope, tile.rope + 32 * s);
  }
  // Rows up to the next block of 16 are multiplied too, their scores unused.
  for (int s = n; s % 16 != 0; ++s) {
    for (int64_t b = 0; b < shape.padded_width() / 32; ++b) {
      _mm512_store_si512(tile.latent + b * kBlock + 32 * s, _mm512_setzero_si512());
    }
    tile.latent_scale[s] = tile.rope_scale[s] = 0.0f;
  }
  for (int64_t i = 0; i < shape.padded_latent() / 32 * kBlock; i += kBlock) {
    for (int s = 0; s < n; s += 2) {
      const __m512i even = load_words(tile.latent + i + 32 * s);
      const __m512i odd = load_words(tile.latent + i + 32 * (s + 1));  // zeros where there are no more rows
      _mm512_store_si512(tile.pairs + i + 32 * s, _mm512_unpacklo_epi16(even, odd));
      _mm512_store_si512(tile.pairs + i + 32 * (s + 1), _mm512_unpackhi_epi16(even, odd));
    }
  }
}

// Integer products of one part of a query and of 16 rows.
KTX_INLINE void products(int64_t width, const int16_t* q, const int16_t* rows, I32 (&acc)[16]) {
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) acc[r] = set_i(0);
  for (int64_t i = 0; i < width; i += 32, rows += kBlock) {
#pragma GCC unroll 2
    for (int c = 0; c < 32; c += 2, q += 2 * kHeadLanes) {
      const __m512i pairs = load_words(q);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) dot_words(acc[r], pairs, rows + 32 * r + c);
    }
  }
}

void scores(const LatentShape& shape, const Query& q, const Rows& tile, int valid, float scale, float* out) {
  const F32 latent = mul_f(load_f(q.latent_scale), set_f(scale));
  const F32 rope = mul_f(load_f(q.rope_scale), set_f(scale));
  for (int s = 0; s < valid; s += 16) {
    float* to = out + 16 * s;
    I32 acc[16];
    products(shape.padded_latent(), q.latent, tile.latent + 32 * s, acc);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      store_f(to + 16 * r, mul_f(int_to_f(acc[r]), mul_f(latent, set_f(tile.latent_scale[s + r]))));
    }
    products(shape.padded_width() - shape.padded_latent(), q.rope, tile.rope + 32 * s, acc);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      const F32 factor = mul_f(rope, set_f(tile.rope_scale[s + r]));
      store_f(to + 16 * r, fma_f(int_to_f(acc[r]), factor, load_f(to + 16 * r)));
    }
  }
}

// Weights [valid, 16] times the rows' scales, as levels [32, 16 heads, 2]; returns the scale of each head's.
F32 weight_levels(float* weights, int valid, const float* row_scale, int16_t* out) {
  F32 top = zero_f();
  F32 sum = zero_f();
  for (int s = 0; s < valid; ++s) {
    const F32 weight = mul_f(load_f(weights + 16 * s), set_f(row_scale[s]));
    store_f(weights + 16 * s, weight);
    top = max_f(weight, top);
    sum = add_f(sum, weight);
  }
  const F32 inverse = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(top, set_f(kNothing), _CMP_GT_OQ), set_f(kWeightLevels), top);
  for (int s = 0; s < valid; s += 2) {
    const __m512i even = _mm512_cvtps_epi32(mul_f(load_f(weights + 16 * s), inverse));
    const __m512i odd =
        s + 1 < valid ? _mm512_cvtps_epi32(mul_f(load_f(weights + 16 * (s + 1)), inverse)) : _mm512_setzero_si512();
    _mm512_store_si512(out + 16 * s, _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16)));
  }
  // A row that is not finite is lost in levels, not in the sum.
  return mul_f(fma_f(sum, zero_f(), top), set_f(1.0f / kWeightLevels));
}

// Sixteen latent values of all heads.
KTX_INLINE void weighted_sum(const int16_t* pairs, const int16_t* levels, int valid, const float* scale,
                             const float* fade, float* mean, int64_t width) {
  I32 acc[kHeadLanes];
#pragma GCC unroll 16
  for (int h = 0; h < kHeadLanes; ++h) acc[h] = set_i(0);
  for (int s = 0; s < valid; s += 2) {
    const __m512i values = load_words(pairs + 32 * s);
#pragma GCC unroll 16
    for (int h = 0; h < kHeadLanes; ++h) dot_words(acc[h], values, levels + 16 * s + 2 * h);
  }
#pragma GCC unroll 16
  for (int h = 0; h < kHeadLanes; ++h) {
    const F32 before = mul_f(load_f(mean + h * width), set_f(fade[h]));
    store_f(mean + h * width, fma_f(int_to_f(acc[h]), set_f(scale[h]), before));
  }
}

void attend(const LatentShape& shape, const uint8_t* query, const uint8_t* tile_bytes, int valid, float scale,
            float* state) {
  const Rows tile(shape, tile_bytes);
  const State s(state);
  alignas(64) float weights[kTilePositions * kHeadLanes];
  alignas(64) float fade[kHeadLanes];
  alignas(64) float weight_scale[kHeadLanes];
  alignas(64) int16_t levels[kTilePositions * kHeadLanes];
  scores(shape, Query(shape, query), tile, valid, scale, weights);
  softmax_tile(weights, valid, s, fade);
  store_f(weight_scale, weight_levels(weights, valid, tile.latent_scale, levels));
  const int64_t width = shape.padded_latent();
  for (int64_t i = 0; i < width; i += 32) {
    const int16_t* pairs = tile.pairs + i / 32 * kBlock;
    weighted_sum(pairs, levels, valid, weight_scale, fade, s.mean + i, width);
    weighted_sum(pairs + 32, levels, valid, weight_scale, fade, s.mean + i + 16, width);
  }
}

void finish(const LatentShape& shape, const float* tops, const float* mean, int first_head, int last_head, float* out) {
  // Back to the order of the latent: four values of the first vector, then four of the second.
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

const AttentionKernels kAttentionInt16 = {Query::bytes, Rows::bytes, pack_query,   pack_tile, reset_state,
                                          attend,       merge_states, finish};

}  // namespace ktx
