// SPDX-License-Identifier: Apache-2.0
// The vector operations of the kernels in AVX-512 with VNNI. Internal linkage: this is compiled with its own flags.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define KTX_INLINE __attribute__((always_inline)) inline

namespace ktx {
namespace {

using F32 = __m512;   // 16 floats
using I32 = __m512i;  // 16 int32
using I16 = __m512i;  // 16 pairs of int16
using U8 = __m512i;   // 16 quads of uint8

constexpr int kTileRows = 16;
constexpr bool kSignedBytes = false;  // byte levels keep their offset; kStart removes it

KTX_INLINE F32 zero_f() { return _mm512_setzero_ps(); }
KTX_INLINE F32 set_f(float x) { return _mm512_set1_ps(x); }
KTX_INLINE F32 load_f(const float* p) { return _mm512_loadu_ps(p); }
KTX_INLINE void store_f(float* p, F32 x) { _mm512_storeu_ps(p, x); }
KTX_INLINE F32 add_f(F32 a, F32 b) { return _mm512_add_ps(a, b); }
KTX_INLINE F32 sub_f(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
KTX_INLINE F32 mul_f(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
KTX_INLINE F32 div_f(F32 a, F32 b) { return _mm512_div_ps(a, b); }
KTX_INLINE F32 min_f(F32 a, F32 b) { return _mm512_min_ps(a, b); }
KTX_INLINE F32 max_f(F32 a, F32 b) { return _mm512_max_ps(a, b); }
KTX_INLINE F32 fma_f(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
KTX_INLINE F32 round_f(F32 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// a * 2^n for integral n in [-126, 127].
KTX_INLINE F32 scale2_f(F32 a, F32 n) { return _mm512_scalef_ps(a, n); }
KTX_INLINE F32 load_half(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
KTX_INLINE F32 load_bf16(const uint8_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
KTX_INLINE F32 u8_to_f(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
KTX_INLINE F32 s8_to_f(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
KTX_INLINE F32 int_to_f(I32 a) { return _mm512_cvtepi32_ps(a); }

KTX_INLINE I32 set_i(int32_t x) { return _mm512_set1_epi32(x); }
KTX_INLINE I32 add_i(I32 a, I32 b) { return _mm512_add_epi32(a, b); }

KTX_INLINE U8 load_u8(const uint8_t* p) { return _mm512_load_si512(p); }
KTX_INLINE void store_u8(uint8_t* p, U8 a) { _mm512_store_si512(p, a); }
KTX_INLINE U8 set_u8(uint8_t x) { return _mm512_set1_epi8(static_cast<char>(x)); }
KTX_INLINE U8 and_u8(U8 a, U8 b) { return _mm512_and_si512(a, b); }
KTX_INLINE U8 or_and_u8(U8 a, U8 b, U8 c) { return _mm512_ternarylogic_epi32(a, b, c, 0xF8); }  // a | (b & c)
// Shifts by bits within 16: bits cross bytes, so the caller masks.
KTX_INLINE U8 shr_u8(U8 a, int n) { return _mm512_srli_epi16(a, static_cast<unsigned>(n)); }
KTX_INLINE U8 shl_u8(U8 a, int n) { return _mm512_slli_epi16(a, static_cast<unsigned>(n)); }
KTX_INLINE U8 load_table(const uint8_t* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
KTX_INLINE U8 lookup(U8 table, U8 index) { return _mm512_shuffle_epi8(table, index); }
KTX_INLINE U8 signed_levels(U8 a) { return a; }
KTX_INLINE I16 widen_u8(const uint8_t* p) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// acc[r] += sum over c < 4 of w[4r + c] * x[c]. Written out: the compiler does not fold the broadcast into the product.
KTX_INLINE void dot(I32& acc, U8 w, const int8_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*reinterpret_cast<const int32_t*>(x)));
}
KTX_INLINE void dot_signed(I32& acc, U8 w, const int8_t* x) { dot(acc, w, x); }
// acc[r] += m[2r] * x[0] + m[2r + 1] * x[1].
KTX_INLINE void dot_pair(I32& acc, I16 m, const int32_t* x) {
  asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(m), "m"(*x));
}

// Largest magnitude of n floats (a multiple of 16); NaN where one is NaN, as its bits compare above all others.
KTX_INLINE float abs_max(const float* x, int n) {
  __m512i top = _mm512_setzero_si512();
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  for (int i = 0; i < n; i += 16) top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_loadu_si512(x + i), mask));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(_mm512_reduce_max_epu32(top)))));
}
// Sixteen values times `scale`, to the nearest int8; returns their sum.
KTX_INLINE int32_t quantize16(const float* x, float scale, int8_t* q) {
  const __m512i wide = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(scale)));
  const __m128i narrow = _mm512_cvtepi32_epi8(wide);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q), narrow);
  const __m128i bytes = _mm_xor_si128(narrow, _mm_set1_epi8(static_cast<char>(0x80)));
  const __m128i sums = _mm_sad_epu8(bytes, _mm_setzero_si128());
  return _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 16 * 128;
}

}  // namespace
}  // namespace ktx
