// SPDX-License-Identifier: Apache-2.0
// From stored vectors to eight vectors of unsigned levels: 16 rows x 32 along K (layout.h). Included after a simd_*.h.
#pragma once

#include "formats.h"
#include "layout.h"

namespace ktx {
namespace {

template <Type kType>
struct Format {
  static constexpr Layout kLayout = layout_of(kType);
  static constexpr bool kTable = kType == Type::kIQ4_NL || kType == Type::kIQ4_XS;
  // Levels use all eight bits, so that some instruction sets need them signed.
  static constexpr bool kFullBytes = kType == Type::kQ8_0 || kTable;
  static constexpr bool kSixteen = kType == Type::kQ6_K || kType == Type::kQ3_K || kType == Type::kQ2_K;

  static KTX_INLINE void decode(const uint8_t* p, U8 (&w)[8]) {
    if constexpr (kLayout.codec == Codec::kByte) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) w[j] = load_u8(p + 64 * j);
    } else if constexpr (kLayout.codec == Codec::kTwoBit || kLayout.codec == Codec::kThreeBit) {
      decode_two_bits(p, w);
    } else {
      decode_nibbles(p, w);
    }
    if constexpr (kFullBytes && kSignedBytes) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) w[j] = signed_levels(w[j]);
    }
  }

 private:
  static KTX_INLINE void decode_nibbles(const uint8_t* p, U8 (&w)[8]) {
    const U8 low = set_u8(15);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const U8 v = load_u8(p + 64 * j);
      w[j] = and_u8(v, low);
      w[j + 4] = and_u8(shr_u8(v, 4), low);
    }
    if constexpr (kLayout.codec == Codec::kNibble1) {
      const U8 bit = set_u8(16);
      const U8 h = load_u8(p + 256);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        w[j] = or_and_u8(w[j], shl_u8(h, 4 - j), bit);
        w[j + 4] = or_and_u8(w[j + 4], shr_u8(h, j), bit);
      }
    }
    if constexpr (kLayout.codec == Codec::kNibble2) {
      const U8 bits = set_u8(0x30);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const U8 h = load_u8(p + 256 + 64 * half);
        w[4 * half + 0] = or_and_u8(w[4 * half + 0], shl_u8(h, 4), bits);
        w[4 * half + 1] = or_and_u8(w[4 * half + 1], shl_u8(h, 2), bits);
        w[4 * half + 2] = or_and_u8(w[4 * half + 2], h, bits);
        w[4 * half + 3] = or_and_u8(w[4 * half + 3], shr_u8(h, 2), bits);
      }
    }
    if constexpr (kTable) {
      const U8 table = load_table(kIq4Levels);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) w[j] = lookup(table, w[j]);
    }
  }

  static KTX_INLINE void decode_two_bits(const uint8_t* p, U8 (&w)[8]) {
    const U8 low = set_u8(3);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const U8 v = load_u8(p + 64 * half);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) w[4 * half + c] = and_u8(shr_u8(v, 2 * c), low);
    }
    if constexpr (kLayout.codec == Codec::kThreeBit) {
      const U8 bit = set_u8(4);
      const U8 h = load_u8(p + 128);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) w[j] = or_and_u8(w[j], j < 2 ? shl_u8(h, 2 - j) : shr_u8(h, j - 2), bit);
    }
  }
};

// Fetches a panel into the first-level cache ahead of its use, then the panel that is read next, so that nothing is
// fetched in vain. Few rows read a panel once: it then passes the outer caches by, which need not write it back.
template <int M>
class FetchAhead {
 public:
  KTX_INLINE FetchAhead(const uint8_t* panel, int64_t bytes, const uint8_t* next)
      : turn_(panel + bytes - kAhead), beyond_((next != nullptr ? next : panel) - turn_) {}

  // What stands for the `kBytes` at p, so far ahead.
  template <int kBytes>
  KTX_INLINE void from(const uint8_t* p) const {
    const uint8_t* to = p + (p < turn_ ? kAhead : beyond_);
#pragma GCC unroll 8
    for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(to + i, 0, M <= 4 ? 0 : 3);
  }

 private:
  static constexpr int64_t kAhead = 4096;
  const uint8_t* turn_;
  int64_t beyond_;
};

// acc[r] += the four levels of row r times x.
template <Type kType>
KTX_INLINE void dot_levels(I32& acc, U8 w, const int8_t* x) {
  if constexpr (Format<kType>::kFullBytes) {
    dot_signed(acc, w, x);
  } else {
    dot(acc, w, x);
  }
}

// What a sum of products starts from: the offset's share, unless the levels are decoded as signed.
template <Type kType>
KTX_INLINE I32 start_sum(const int32_t* start) {
  if constexpr (Format<kType>::kFullBytes && kSignedBytes) {
    return set_i(0);
  } else {
    return set_i(*start);
  }
}

}  // namespace
}  // namespace ktx
