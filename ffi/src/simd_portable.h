// SPDX-License-Identifier: Apache-2.0
// The vector operations of the kernels in the vector extensions of GCC and Clang, which compile to what the target has.
#pragma once

#include <cstdint>
#include <cstring>

#include "half.h"

#define KTX_INLINE __attribute__((always_inline)) inline

namespace ktx {
namespace {

using F32 = float __attribute__((vector_size(64)));
using I32 = int32_t __attribute__((vector_size(64)));
using U32 = uint32_t __attribute__((vector_size(64)));
using I16 = int16_t __attribute__((vector_size(64)));
using U16 = uint16_t __attribute__((vector_size(64)));
using U8 = uint8_t __attribute__((vector_size(64)));
using Bytes16 = uint8_t __attribute__((vector_size(16)));
using SignedBytes16 = int8_t __attribute__((vector_size(16)));
using Bytes32 = uint8_t __attribute__((vector_size(32)));
using Half16 = uint16_t __attribute__((vector_size(32)));

constexpr int kTileRows = 2;  // more would take registers that few targets have, and long to compile
constexpr bool kSignedBytes = false;

template <typename V>
KTX_INLINE V load_any(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

KTX_INLINE F32 zero_f() { return F32{}; }
KTX_INLINE F32 set_f(float x) { return F32{} + x; }
KTX_INLINE F32 load_f(const float* p) { return load_any<F32>(p); }
KTX_INLINE void store_f(float* p, F32 x) { std::memcpy(p, &x, sizeof x); }
KTX_INLINE F32 add_f(F32 x, F32 y) { return x + y; }
KTX_INLINE F32 sub_f(F32 x, F32 y) { return x - y; }
KTX_INLINE F32 mul_f(F32 x, F32 y) { return x * y; }
KTX_INLINE F32 div_f(F32 x, F32 y) { return x / y; }
KTX_INLINE F32 min_f(F32 x, F32 y) { return x < y ? x : y; }
KTX_INLINE F32 max_f(F32 x, F32 y) { return x > y ? x : y; }
// Rounded twice: a fused one is a function call where the CPU has no instruction for it.
KTX_INLINE F32 fma_f(F32 x, F32 y, F32 z) { return x * y + z; }
// To the nearest integer, for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits.
KTX_INLINE F32 round_f(F32 x) { return (x + 12582912.0f) - 12582912.0f; }
KTX_INLINE F32 bits_to_f(I32 x) { return reinterpret_cast<F32>(x); }
// x * 2^n for integral n in [-126, 127].
KTX_INLINE F32 scale2_f(F32 x, F32 n) { return x * bits_to_f((__builtin_convertvector(n, I32) + 127) << 23); }
KTX_INLINE F32 load_half(const uint8_t* p) {
  float out[16];
  for (int i = 0; i < 16; ++i) out[i] = half_to_float(load_u16(p + 2 * i));
  return load_f(out);
}
KTX_INLINE F32 load_bf16(const uint8_t* p) {
  return reinterpret_cast<F32>(__builtin_convertvector(load_any<Half16>(p), U32) << 16);
}
KTX_INLINE F32 int_to_f(I32 x) { return __builtin_convertvector(x, F32); }
KTX_INLINE F32 u8_to_f(const uint8_t* p) { return int_to_f(__builtin_convertvector(load_any<Bytes16>(p), I32)); }
KTX_INLINE F32 s8_to_f(const uint8_t* p) { return int_to_f(__builtin_convertvector(load_any<SignedBytes16>(p), I32)); }

KTX_INLINE I32 set_i(int32_t x) { return I32{} + x; }
KTX_INLINE I32 add_i(I32 x, I32 y) { return x + y; }

KTX_INLINE U8 load_u8(const uint8_t* p) { return load_any<U8>(p); }
KTX_INLINE void store_u8(uint8_t* p, U8 x) { std::memcpy(p, &x, sizeof x); }
KTX_INLINE U8 set_u8(uint8_t x) { return U8{} + x; }
KTX_INLINE U8 and_u8(U8 x, U8 y) { return x & y; }
KTX_INLINE U8 or_and_u8(U8 x, U8 y, U8 z) { return x | (y & z); }
// Shifts by bits within 16: bits cross bytes, so the caller masks.
KTX_INLINE U8 shr_u8(U8 x, int n) { return reinterpret_cast<U8>(reinterpret_cast<U16>(x) >> n); }
KTX_INLINE U8 shl_u8(U8 x, int n) { return reinterpret_cast<U8>(reinterpret_cast<U16>(x) << n); }
KTX_INLINE U8 load_table(const uint8_t* p) {
  U8 out = {};
  std::memcpy(&out, p, 16);
  return out;
}
KTX_INLINE U8 lookup(U8 table, U8 x) {
  uint8_t levels[16];
  uint8_t index[64];
  std::memcpy(levels, &table, sizeof levels);
  std::memcpy(index, &x, sizeof index);
  for (uint8_t& i : index) i = levels[i];
  return load_u8(index);
}
KTX_INLINE U8 signed_levels(U8 x) { return x; }
KTX_INLINE I16 widen_u8(const uint8_t* p) { return __builtin_convertvector(load_any<Bytes32>(p), I16); }

// Sums of neighbouring 16-bit products, as 32 bits.
KTX_INLINE I32 pair_sums(I16 products) {
  const I32 both = reinterpret_cast<I32>(products);
  return (reinterpret_cast<I32>(reinterpret_cast<U32>(both) << 16) >> 16) + (both >> 16);
}
KTX_INLINE I16 alternate(int16_t even, int16_t odd) {
  const uint32_t word = static_cast<uint16_t>(even) | static_cast<uint32_t>(static_cast<uint16_t>(odd)) << 16;
  return reinterpret_cast<I16>(U32{} + word);
}
// acc[r] += sum over c < 4 of w[4r + c] * x[c]. A product of a byte and an int8 in [-127, 127] fits 16 bits.
KTX_INLINE void dot(I32& acc, U8 w, const int8_t* x) {
  const U16 words = reinterpret_cast<U16>(w);
  const I16 even = reinterpret_cast<I16>(words & static_cast<uint16_t>(0xff));
  const I16 odd = reinterpret_cast<I16>(words >> 8);
  acc += pair_sums(even * alternate(x[0], x[2])) + pair_sums(odd * alternate(x[1], x[3]));
}
KTX_INLINE void dot_signed(I32& acc, U8 w, const int8_t* x) { dot(acc, w, x); }
// acc[r] += m[2r] * x[0] + m[2r + 1] * x[1], x two int16 whose products with a 6-bit m need 32 bits.
KTX_INLINE void dot_pair(I32& acc, I16 m, const int32_t* x) {
  int16_t pair[2];
  std::memcpy(pair, x, sizeof pair);
  const I32 both = reinterpret_cast<I32>(m);
  acc += (both & 0xffff) * pair[0] + (both >> 16) * pair[1];
}

// Largest magnitude of n floats; NaN where one is NaN, as its bits compare above all others.
KTX_INLINE float abs_max(const float* x, int n) {
  uint32_t top = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = bits_from_float(x[i]) & 0x7fffffff;
    top = bits > top ? bits : top;
  }
  return float_from_bits(top);
}
// Sixteen values times `scale`, to the nearest int8; returns their sum.
KTX_INLINE int32_t quantize16(const float* x, float scale, int8_t* q) {
  const I32 levels = __builtin_convertvector(round_f(load_f(x) * scale), I32);
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) {
    q[i] = static_cast<int8_t>(levels[i]);
    sum += levels[i];
  }
  return sum;
}

}  // namespace
}  // namespace ktx
