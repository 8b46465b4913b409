// SPDX-License-Identifier: Apache-2.0
// The vector operations of the kernels in AVX2 with FMA and F16C: pairs of 256-bit registers. Internal linkage.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define KTX_INLINE __attribute__((always_inline)) inline

namespace ktx {
namespace {

struct F32 {
  __m256 a, b;
};
struct I32 {
  __m256i a, b;
};
using I16 = I32;
using U8 = I32;

constexpr int kTileRows = 4;
constexpr bool kSignedBytes = true;  // products of full bytes would overflow 16 bits

KTX_INLINE F32 zero_f() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
KTX_INLINE F32 set_f(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
KTX_INLINE F32 load_f(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
KTX_INLINE void store_f(float* p, F32 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
KTX_INLINE F32 add_f(F32 x, F32 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
KTX_INLINE F32 sub_f(F32 x, F32 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
KTX_INLINE F32 mul_f(F32 x, F32 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
KTX_INLINE F32 div_f(F32 x, F32 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
KTX_INLINE F32 min_f(F32 x, F32 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
KTX_INLINE F32 max_f(F32 x, F32 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
KTX_INLINE F32 fma_f(F32 x, F32 y, F32 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
KTX_INLINE F32 round_f(F32 x) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, kMode), _mm256_round_ps(x.b, kMode)};
}
KTX_INLINE __m256 power_of_2(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
// x * 2^n for integral n in [-126, 127].
KTX_INLINE F32 scale2_f(F32 x, F32 n) { return mul_f(x, {power_of_2(n.a), power_of_2(n.b)}); }

KTX_INLINE __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
KTX_INLINE F32 load_half(const uint8_t* p) { return {_mm256_cvtph_ps(load16(p)), _mm256_cvtph_ps(load16(p + 16))}; }
KTX_INLINE F32 load_bf16(const uint8_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p + 16)), 16))};
}
KTX_INLINE F32 u8_to_f(const uint8_t* p) {
  const __m128i v = load16(p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(v)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(v, v)))};
}
KTX_INLINE F32 s8_to_f(const uint8_t* p) {
  const __m128i v = load16(p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(v, v)))};
}
KTX_INLINE F32 int_to_f(I32 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

KTX_INLINE I32 set_i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
KTX_INLINE I32 add_i(I32 x, I32 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }

KTX_INLINE U8 load_u8(const uint8_t* p) {
  return {_mm256_load_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
KTX_INLINE void store_u8(uint8_t* p, U8 x) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_store_si256(reinterpret_cast<__m256i*>(p + 32), x.b);
}
KTX_INLINE U8 set_u8(uint8_t x) {
  const __m256i v = _mm256_set1_epi8(static_cast<char>(x));
  return {v, v};
}
KTX_INLINE U8 and_u8(U8 x, U8 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
KTX_INLINE U8 or_and_u8(U8 x, U8 y, U8 z) {  // x | (y & z)
  return {_mm256_or_si256(x.a, _mm256_and_si256(y.a, z.a)), _mm256_or_si256(x.b, _mm256_and_si256(y.b, z.b))};
}
// Shifts by bits within 16: bits cross bytes, so the caller masks.
KTX_INLINE U8 shr_u8(U8 x, int n) { return {_mm256_srli_epi16(x.a, n), _mm256_srli_epi16(x.b, n)}; }
KTX_INLINE U8 shl_u8(U8 x, int n) { return {_mm256_slli_epi16(x.a, n), _mm256_slli_epi16(x.b, n)}; }
KTX_INLINE U8 load_table(const uint8_t* p) {
  const __m256i v = _mm256_broadcastsi128_si256(load16(p));
  return {v, v};
}
KTX_INLINE U8 lookup(U8 table, U8 x) { return {_mm256_shuffle_epi8(table.a, x.a), _mm256_shuffle_epi8(table.b, x.b)}; }
KTX_INLINE U8 signed_levels(U8 x) {
  const __m256i top = _mm256_set1_epi8(static_cast<char>(0x80));
  return {_mm256_xor_si256(x.a, top), _mm256_xor_si256(x.b, top)};
}
KTX_INLINE I16 widen_u8(const uint8_t* p) {
  return {_mm256_cvtepu8_epi16(load16(p)), _mm256_cvtepu8_epi16(load16(p + 16))};
}

KTX_INLINE __m256i broadcast4(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}
KTX_INLINE __m256i quad_sums(__m256i w, __m256i x) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1));
}
// acc[r] += sum over c < 4 of w[4r + c] * x[c]; w < 128, so that sums of two fit 16 bits.
KTX_INLINE void dot(I32& acc, U8 w, const int8_t* x) {
  const __m256i v = broadcast4(x);
  acc.a = _mm256_add_epi32(acc.a, quad_sums(w.a, v));
  acc.b = _mm256_add_epi32(acc.b, quad_sums(w.b, v));
}
// The same for signed w, x >= -127: the sign moves to x.
KTX_INLINE void dot_signed(I32& acc, U8 w, const int8_t* x) {
  const __m256i v = broadcast4(x);
  acc.a = _mm256_add_epi32(acc.a, quad_sums(_mm256_abs_epi8(w.a), _mm256_sign_epi8(v, w.a)));
  acc.b = _mm256_add_epi32(acc.b, quad_sums(_mm256_abs_epi8(w.b), _mm256_sign_epi8(v, w.b)));
}
// acc[r] += m[2r] * x[0] + m[2r + 1] * x[1].
KTX_INLINE void dot_pair(I32& acc, I16 m, const int32_t* x) {
  const __m256i v = _mm256_set1_epi32(*x);
  acc.a = _mm256_add_epi32(acc.a, _mm256_madd_epi16(m.a, v));
  acc.b = _mm256_add_epi32(acc.b, _mm256_madd_epi16(m.b, v));
}

// Largest magnitude of n floats (a multiple of 16); NaN where one is NaN, as its bits compare above all others.
KTX_INLINE float abs_max(const float* x, int n) {
  __m256i top = _mm256_setzero_si256();
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  for (int i = 0; i < n; i += 8) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    top = _mm256_max_epu32(top, _mm256_and_si256(v, mask));
  }
  __m128i half = _mm_max_epu32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4E));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xB1));
  return _mm_cvtss_f32(_mm_castsi128_ps(half));
}
// Sixteen values times `scale`, to the nearest int8; returns their sum.
KTX_INLINE int32_t quantize16(const float* x, float scale, int8_t* q) {
  const __m256 s = _mm256_set1_ps(scale);
  const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), s));
  const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8), s));
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q), bytes);
  const __m128i biased = _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(0x80)));
  const __m128i sums = _mm_sad_epu8(biased, _mm_setzero_si128());
  return _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 16 * 128;
}

}  // namespace
}  // namespace ktx
