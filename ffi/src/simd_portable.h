// SPDX-License-Identifier: Apache-2.0
// The vector operations of the kernels in the vector extensions of GCC and Clang: four vectors of 16 bytes, which every
// target of interest has in hardware.
#pragma once

#include <cstdint>
#include <cstring>

#include "half.h"

#define KTX_INLINE __attribute__((always_inline)) inline

namespace ktx {
namespace {

using Float4 = float __attribute__((vector_size(16)));
using Int4 = int32_t __attribute__((vector_size(16)));
using Word4 = uint32_t __attribute__((vector_size(16)));
using Int8 = int16_t __attribute__((vector_size(16)));
using Word8 = uint16_t __attribute__((vector_size(16)));
using Byte16 = uint8_t __attribute__((vector_size(16)));

template <typename V>
struct Four {
  V v[4];
};
using F32 = Four<Float4>;
using I32 = Four<Int4>;
using I16 = Four<Int8>;
using U8 = Four<Byte16>;

constexpr int kTileRows = 2;  // more would take registers that few targets have, and long to compile
constexpr bool kSignedBytes = false;

template <typename V, typename Function>
KTX_INLINE Four<V> each(Function f) {
  return {{f(0), f(1), f(2), f(3)}};
}
template <typename V>
KTX_INLINE V load_any(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

KTX_INLINE F32 set_f(float x) {
  const Float4 v = {x, x, x, x};
  return {{v, v, v, v}};
}
KTX_INLINE F32 zero_f() { return set_f(0.0f); }
KTX_INLINE F32 load_f(const float* p) { return load_any<F32>(p); }
KTX_INLINE void store_f(float* p, F32 x) { std::memcpy(p, &x, sizeof x); }
KTX_INLINE F32 add_f(F32 x, F32 y) {
  return each<Float4>([&](int i) { return x.v[i] + y.v[i]; });
}
KTX_INLINE F32 sub_f(F32 x, F32 y) {
  return each<Float4>([&](int i) { return x.v[i] - y.v[i]; });
}
KTX_INLINE F32 mul_f(F32 x, F32 y) {
  return each<Float4>([&](int i) { return x.v[i] * y.v[i]; });
}
KTX_INLINE F32 div_f(F32 x, F32 y) {
  return each<Float4>([&](int i) { return x.v[i] / y.v[i]; });
}
KTX_INLINE F32 min_f(F32 x, F32 y) {
  return each<Float4>([&](int i) { return x.v[i] < y.v[i] ? x.v[i] : y.v[i]; });
}
KTX_INLINE F32 max_f(F32 x, F32 y) {
  return each<Float4>([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; });
}
// Rounded twice: a fused one is a function call where the CPU has no instruction for it.
KTX_INLINE F32 fma_f(F32 x, F32 y, F32 z) {
  return each<Float4>([&](int i) { return x.v[i] * y.v[i] + z.v[i]; });
}
// To the nearest integer, for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits.
KTX_INLINE Float4 round4(Float4 x) { return (x + 12582912.0f) - 12582912.0f; }
KTX_INLINE F32 round_f(F32 x) {
  return each<Float4>([&](int i) { return round4(x.v[i]); });
}
// x * 2^n for integral n in [-126, 127].
KTX_INLINE F32 scale2_f(F32 x, F32 n) {
  return each<Float4>(
      [&](int i) { return x.v[i] * reinterpret_cast<Float4>((__builtin_convertvector(n.v[i], Int4) + 127) << 23); });
}
template <typename Element>
KTX_INLINE F32 gather_f(Element element) {
  float out[16];
  for (int i = 0; i < 16; ++i) out[i] = element(i);
  return load_f(out);
}
KTX_INLINE F32 load_half(const uint8_t* p) {
  return gather_f([&](int i) { return half_to_float(load_u16(p + 2 * i)); });
}
KTX_INLINE F32 load_bf16(const uint8_t* p) {
  return gather_f([&](int i) { return bf16_to_float(load_u16(p + 2 * i)); });
}
KTX_INLINE F32 u8_to_f(const uint8_t* p) {
  return gather_f([&](int i) { return static_cast<float>(p[i]); });
}
KTX_INLINE F32 s8_to_f(const uint8_t* p) {
  return gather_f([&](int i) { return static_cast<float>(static_cast<int8_t>(p[i])); });
}
KTX_INLINE F32 int_to_f(I32 x) {
  return each<Float4>([&](int i) { return __builtin_convertvector(x.v[i], Float4); });
}

KTX_INLINE I32 set_i(int32_t x) {
  const Int4 v = {x, x, x, x};
  return {{v, v, v, v}};
}
KTX_INLINE I32 add_i(I32 x, I32 y) {
  return each<Int4>([&](int i) { return x.v[i] + y.v[i]; });
}

KTX_INLINE U8 load_u8(const uint8_t* p) { return load_any<U8>(p); }
KTX_INLINE void store_u8(uint8_t* p, U8 x) { std::memcpy(p, &x, sizeof x); }
KTX_INLINE U8 set_u8(uint8_t x) {
  const Byte16 v = Byte16{} + x;
  return {{v, v, v, v}};
}
KTX_INLINE U8 and_u8(U8 x, U8 y) {
  return each<Byte16>([&](int i) { return x.v[i] & y.v[i]; });
}
KTX_INLINE U8 or_and_u8(U8 x, U8 y, U8 z) {  // x | (y & z)
  return each<Byte16>([&](int i) { return x.v[i] | (y.v[i] & z.v[i]); });
}
// Shifts by bits within 16: bits cross bytes, so the caller masks.
KTX_INLINE U8 shr_u8(U8 x, int n) {
  return each<Byte16>([&](int i) { return reinterpret_cast<Byte16>(reinterpret_cast<Word8>(x.v[i]) >> n); });
}
KTX_INLINE U8 shl_u8(U8 x, int n) {
  return each<Byte16>([&](int i) { return reinterpret_cast<Byte16>(reinterpret_cast<Word8>(x.v[i]) << n); });
}
KTX_INLINE U8 load_table(const uint8_t* p) {
  const Byte16 v = load_any<Byte16>(p);
  return {{v, v, v, v}};
}
KTX_INLINE U8 lookup(U8 table, U8 x) {
  uint8_t levels[16];
  uint8_t index[64];
  std::memcpy(levels, &table, sizeof levels);
  store_u8(index, x);
  for (uint8_t& i : index) i = levels[i];
  return load_u8(index);
}
KTX_INLINE U8 signed_levels(U8 x) { return x; }
KTX_INLINE I16 widen_u8(const uint8_t* p) {
  int16_t out[32];
  for (int i = 0; i < 32; ++i) out[i] = p[i];
  return load_any<I16>(out);
}

// Sums of neighbouring 16-bit products, as 32 bits.
KTX_INLINE Int4 pair_sums(Int8 products) {
  const Int4 both = reinterpret_cast<Int4>(products);
  return (reinterpret_cast<Int4>(reinterpret_cast<Word4>(both) << 16) >> 16) + (both >> 16);
}
KTX_INLINE Int8 alternate(int16_t even, int16_t odd) {
  const uint32_t word = static_cast<uint16_t>(even) | static_cast<uint32_t>(static_cast<uint16_t>(odd)) << 16;
  return reinterpret_cast<Int8>(Word4{word, word, word, word});
}
// acc[r] += sum over c < 4 of w[4r + c] * x[c]. A product of a byte and an int8 in [-127, 127] fits 16 bits.
KTX_INLINE void dot(I32& acc, const U8& w, const int8_t* x) {
  const Int8 x_even = alternate(x[0], x[2]);
  const Int8 x_odd = alternate(x[1], x[3]);
  for (int i = 0; i < 4; ++i) {
    const Word8 words = reinterpret_cast<Word8>(w.v[i]);
    const Int8 even = reinterpret_cast<Int8>(words & static_cast<uint16_t>(0xff));
    const Int8 odd = reinterpret_cast<Int8>(words >> 8);
    acc.v[i] += pair_sums(even * x_even) + pair_sums(odd * x_odd);
  }
}
KTX_INLINE void dot_signed(I32& acc, const U8& w, const int8_t* x) { dot(acc, w, x); }
// acc[r] += m[2r] * x[0] + m[2r + 1] * x[1], x two int16 whose products with a 6-bit m need 32 bits.
KTX_INLINE void dot_pair(I32& acc, const I16& m, const int32_t* x) {
  int16_t pair[2];
  std::memcpy(pair, x, sizeof pair);
  for (int i = 0; i < 4; ++i) {
    const Int4 both = reinterpret_cast<Int4>(m.v[i]);
    acc.v[i] += (both & 0xffff) * pair[0] + (both >> 16) * pair[1];
  }
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
  int32_t sum = 0;
  for (int i = 0; i < 4; ++i) {
    const Int4 levels = __builtin_convertvector(round4(load_any<Float4>(x + 4 * i) * scale), Int4);
    for (int c = 0; c < 4; ++c) {
      q[4 * i + c] = static_cast<int8_t>(levels[c]);
      sum += levels[c];
    }
  }
  return sum;
}

}  // namespace
}  // namespace ktx
