// SPDX-License-Identifier: Apache-2.0
// A panel of 16 weight rows times a tile of M activation rows. Included after a simd_*.h.
//
// Levels are decoded once into eight registers and used for all M rows. Sums of products are integers, hence exact; the
// order of the floating-point additions of a row does not depend on M, so neither does its result.
#pragma once

#include "codecs.h"
#include "kernels.h"

namespace ktx {
namespace {

// Thirty-two levels times 32 activations of each row m, one sum: use(m, sum).
template <Type kType, int M, typename Start, typename Use>
KTX_INLINE void sums_of_32(const U8 (&w)[8], const int8_t* q, Start start, Use use) {
#pragma GCC unroll 16
  for (int m = 0; m < M; m += 2) {  // two rows at a time hide the latency of the products
    constexpr int kRow = 32;
    I32 a = start(m);
    if (M == 1) {
      I32 b = set_i(0);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        dot_levels<kType>(a, w[j], q + 4 * j);
        dot_levels<kType>(b, w[j + 4], q + 16 + 4 * j);
      }
      use(m, add_i(a, b));
    } else {
      const bool both = m + 1 < M;
      I32 b = start(both ? m + 1 : m);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        dot_levels<kType>(a, w[j], q + m * kRow + 4 * j);
        if (both) dot_levels<kType>(b, w[j], q + (m + 1) * kRow + 4 * j);
      }
      use(m, a);
      if (both) use(m + 1, b);
    }
  }
}

// The same as two sums of 16: use(m, first, second).
template <Type kType, int M, typename Start, typename Use>
KTX_INLINE void sums_of_16(const U8 (&w)[8], const int8_t* q, Start start, Use use) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    I32 a = start(m, 0);
    I32 b = start(m, 1);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      dot_levels<kType>(a, w[j], q + m * 32 + 4 * j);
      dot_levels<kType>(b, w[j + 4], q + m * 32 + 16 + 4 * j);
    }
    use(m, a, b);
  }
}

template <Type kType, int M>
__attribute__((noinline)) void panel_of_32(const uint8_t* panel, const uint8_t* next, int64_t k, const ActTile& x, float* out,
                                           int64_t ld) {
  using F = Format<kType>;
  constexpr bool kMinima = F::kLayout.header_bytes == 128;
  const FetchAhead<M> fetch(panel, panel_bytes(kType, k), next);
  F32 total[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) total[m] = zero_f();
  const int8_t* q = x.q;
  const float* d = x.d;
  const int32_t* aux = x.aux;
  for (int64_t i = 0; i < k; ++i, q += 32 * M, d += M, aux += M) {
    const int odd = static_cast<int>(i & 1);
    U8 w[8];
    const uint8_t* levels = panel + F::kLayout.header_bytes + odd * F::kLayout.codec_bytes;
    F::decode(levels, w);
    fetch.template from<F::kLayout.codec_bytes>(levels);
    if (odd == 0) fetch.template from<F::kLayout.header_bytes>(panel);
    const uint8_t* scales = panel + odd * (F::kLayout.header_bytes / 2);
    const F32 scale = load_half(scales);
    sums_of_32<kType, M>(
        w, q, [&](int m) __attribute__((always_inline)) { return kMinima ? set_i(0) : start_sum<kType>(aux + m); },
        [&](int m, I32 sum)
            __attribute__((always_inline)) { total[m] = fma_f(int_to_f(sum), mul_f(scale, set_f(d[m])), total[m]); });
    if constexpr (kMinima) {
      const F32 minimum = load_half(scales + 32);
      const float* sums = reinterpret_cast<const float*>(aux);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) total[m] = fma_f(minimum, set_f(sums[m]), total[m]);
    }
    panel += odd * (F::kLayout.header_bytes + 2 * F::kLayout.codec_bytes);
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) store_f(out + m * ld, total[m]);
}

// The scales of a super-block, and its minima where the type has them.
template <Type kType>
struct SuperBlock {
  static constexpr int kMinimumPairs = kType == Type::kQ2_K ? 8 : kType == Type::kQ4_K || kType == Type::kQ5_K ? 4 : 0;
  F32 d;
  F32 dmin;
  alignas(64) uint8_t scales[256];  // [sub-block][row]
  const uint8_t* minima;            // pairs (2p, 2p + 1) a row
  alignas(64) uint8_t minima_buffer[kType == Type::kQ2_K ? 256 : 64];

  KTX_INLINE void read(const uint8_t* super_scales, const uint8_t* header) {
    d = load_half(F::kLayout.scales_first ? super_scales : header);
    if constexpr (kType == Type::kQ4_K || kType == Type::kQ5_K) {
      dmin = load_half(header + 32);
      unpack_six_bits(header + 64);
      minima = scales + 128;
    } else if constexpr (kType == Type::kQ3_K) {
      unpack_six_bits(header);
    } else if constexpr (kType == Type::kQ2_K) {
      dmin = load_half(header + 32);
      const U8 low = set_u8(15);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const U8 v = load_u8(header + 64 + 64 * i);
        store_u8(scales + 64 * i, and_u8(v, low));
        store_u8(minima_buffer + 64 * i, and_u8(shr_u8(v, 4), low));
      }
      minima = minima_buffer;
    } else if constexpr (kType == Type::kIQ4_XS) {
      for (int i = 0; i < 128; ++i) {
        const int low = (header[64 + i % 64] >> (i / 64 * 4)) & 15;
        scales[i] = static_cast<uint8_t>(low | (((header[32 + i % 32] >> (i / 32 * 2)) & 3) << 4));
      }
    }
  }

  KTX_INLINE F32 scale(const uint8_t* header, int s) const {
    if constexpr (kType == Type::kQ6_K) {
      return mul_f(d, s8_to_f(header + 16 * s));
    } else if constexpr (kType == Type::kQ3_K || kType == Type::kIQ4_XS) {
      return mul_f(d, sub_f(u8_to_f(scales + 16 * s), set_f(32.0f)));
    } else {
      return mul_f(d, u8_to_f(scales + 16 * s));
    }
  }

 private:
  using F = Format<kType>;

  KTX_INLINE void unpack_six_bits(const uint8_t* p) {
    const U8 a = load_u8(p);
    const U8 b = load_u8(p + 64);
    const U8 c = load_u8(p + 128);
    const U8 low = set_u8(63);
    store_u8(scales, and_u8(a, low));
    store_u8(scales + 64, and_u8(b, low));
    store_u8(scales + 128, and_u8(c, low));
    U8 top = and_u8(shr_u8(a, 6), set_u8(3));
    top = or_and_u8(top, shr_u8(b, 4), set_u8(12));
    store_u8(scales + 192, or_and_u8(top, shr_u8(c, 2), set_u8(48)));
  }
};

template <Type kType, int M>
__attribute__((noinline)) void panel_of_256(const uint8_t* panel, const uint8_t* next, int64_t k, const ActTile& x, float* out,
                                            int64_t ld) {
  using F = Format<kType>;
  constexpr int kPairs = SuperBlock<kType>::kMinimumPairs;
  constexpr int kAux = kPairs ? kPairs : F::kSixteen ? 2 : 1;  // words of a row, by super-block or by 32
  const FetchAhead<M> fetch(panel, panel_bytes(kType, k / 8), next);
  alignas(64) F32 total[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) total[m] = zero_f();
  const uint8_t* super_scales = panel;
  panel += leading_bytes(kType, k / 8);
  const int8_t* q = x.q;
  const float* d = x.d;
  const int32_t* aux = x.aux;
  SuperBlock<kType> block;
  for (int64_t i = 0; i < k / 8; ++i, super_scales += 32, d += M) {
    const uint8_t* header = panel;
    fetch.template from<F::kLayout.header_bytes>(header);
    block.read(super_scales, header);
    F32 acc[M];
    if constexpr (kPairs != 0) {
      I16 minima[kPairs];
#pragma GCC unroll 8
      for (int p = 0; p < kPairs; ++p) minima[p] = widen_u8(block.minima + 32 * p);
      const F32 negative = sub_f(zero_f(), block.dmin);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        I32 sum = set_i(0);
#pragma GCC unroll 8
        for (int p = 0; p < kPairs; ++p) dot_pair(sum, minima[p], aux + m * kPairs + p);
        acc[m] = mul_f(int_to_f(sum), negative);
      }
      aux += M * kPairs;
    } else {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) acc[m] = zero_f();
    }
    panel += F::kLayout.header_bytes;
#pragma GCC unroll 1
    for (int s = 0; s < 8; ++s, q += 32 * M, panel += F::kLayout.codec_bytes) {
      U8 w[8];
      F::decode(panel, w);
      fetch.template from<F::kLayout.codec_bytes>(panel);
      if constexpr (F::kSixteen) {
        const F32 first = block.scale(header, 2 * s);
        const F32 second = block.scale(header, 2 * s + 1);
        sums_of_16<kType, M>(
            w, q,
            [&](int m, int h)
                __attribute__((always_inline)) { return kPairs ? set_i(0) : start_sum<kType>(aux + 2 * m + h); },
            [&](int m, I32 a, I32 b) __attribute__((always_inline)) {
              acc[m] = fma_f(int_to_f(b), second, fma_f(int_to_f(a), first, acc[m]));
            });
      } else {
        const F32 scale = block.scale(header, s);
        sums_of_32<kType, M>(
            w, q, [&](int m) __attribute__((always_inline)) { return kPairs ? set_i(0) : start_sum<kType>(aux + m); },
            [&](int m, I32 sum) __attribute__((always_inline)) { acc[m] = fma_f(int_to_f(sum), scale, acc[m]); });
      }
      if (kPairs == 0) aux += M * kAux;
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) total[m] = fma_f(acc[m], set_f(d[m]), total[m]);
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) store_f(out + m * ld, total[m]);
}

// Floating-point weights times float32 activations, summed by 256.
template <Type kType, int M>
__attribute__((noinline)) void panel_of_floats(const uint8_t* panel, const uint8_t*, int64_t k, const ActTile& x,
                                               float* out, int64_t ld) {
  F32 total[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) total[m] = zero_f();
  const float* values = x.d;
  for (int64_t begin = 0; begin < k; begin += 256) {
    const int64_t end = begin + 256 < k ? begin + 256 : k;
    F32 acc[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) acc[m] = zero_f();
    for (int64_t i = begin; i < end; ++i, values += M) {
      F32 w;
      if constexpr (kType == Type::kF32) {
        w = load_f(reinterpret_cast<const float*>(panel) + i * kPanelRows);
      } else if constexpr (kType == Type::kF16) {
        w = load_half(panel + i * 2 * kPanelRows);
      } else {
        w = load_bf16(panel + i * 2 * kPanelRows);
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) acc[m] = fma_f(w, set_f(values[m]), acc[m]);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) total[m] = add_f(total[m], acc[m]);
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) store_f(out + m * ld, total[m]);
}

}  // namespace
}  // namespace ktx
