// SPDX-License-Identifier: Apache-2.0
// The fields of ggml's blocks (see gguf-py's quants.py, the reference for every type).
//
// Levels are unsigned: a weight is scale * (level - offset) or scale * level - minimum. IQ4 types keep an index into
// kIq4Levels.
#pragma once

#include <cstdint>

#include "half.h"
#include "types.h"

namespace ktx {

// The non-linear levels of IQ4_NL and IQ4_XS, plus 128.
inline constexpr uint8_t kIq4Levels[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

inline void nibble_levels(const uint8_t* qs, uint8_t* out) {  // 16 bytes -> 32 levels
  for (int i = 0; i < 16; ++i) {
    out[i] = qs[i] & 15;
    out[i + 16] = qs[i] >> 4;
  }
}

inline void fifth_bits(const uint8_t* qh, uint8_t* out) {  // bit i of 32 to level i
  constexpr uint64_t kEach = 0x0101010101010101;
  for (int i = 0; i < 4; ++i) {
    const uint64_t bits = (qh[i] * kEach) & 0x8040201008040201;        // bit c alone in byte c
    const uint64_t ones = ((bits + 0x7f7f7f7f7f7f7f7f) >> 7) & kEach;  // 1 where it is set
    uint64_t levels;
    std::memcpy(&levels, out + 8 * i, 8);
    levels |= ones << 4;
    std::memcpy(out + 8 * i, &levels, 8);
  }
}

// Low nibbles of 32 bytes are one sub-block of 32, high nibbles the next.
inline void k_nibble_levels(const uint8_t* qs, uint8_t* out) {
  for (int pair = 0; pair < 4; ++pair, qs += 32, out += 64) {
    for (int i = 0; i < 32; ++i) {
      out[i] = qs[i] & 15;
      out[i + 32] = qs[i] >> 4;
    }
  }
}

inline void k_two_bit_levels(const uint8_t* qs, uint8_t* out) {
  for (int half = 0; half < 2; ++half, qs += 32) {
    for (int j = 0; j < 4; ++j, out += 32) {
      for (int i = 0; i < 32; ++i) out[i] = (qs[i] >> (2 * j)) & 3;
    }
  }
}

inline void q6k_levels(const uint8_t* ql, const uint8_t* qh, uint8_t* out) {
  for (int half = 0; half < 2; ++half, ql += 64, qh += 32, out += 128) {
    for (int i = 0; i < 32; ++i) {
      out[i] = static_cast<uint8_t>((ql[i] & 15) | ((qh[i] & 3) << 4));
      out[i + 32] = static_cast<uint8_t>((ql[i + 32] & 15) | (((qh[i] >> 2) & 3) << 4));
      out[i + 64] = static_cast<uint8_t>((ql[i] >> 4) | (((qh[i] >> 4) & 3) << 4));
      out[i + 96] = static_cast<uint8_t>((ql[i + 32] >> 4) | ((qh[i] >> 6) << 4));
    }
  }
}

// The quantized levels of one block, in order of K.
inline void unpack_levels(Type type, const uint8_t* b, uint8_t* out) {
  switch (type) {
    case Type::kQ4_0:
    case Type::kIQ4_NL:
      return nibble_levels(b + 2, out);
    case Type::kQ4_1:
      return nibble_levels(b + 4, out);
    case Type::kQ5_0:
      nibble_levels(b + 6, out);
      return fifth_bits(b + 2, out);
    case Type::kQ5_1:
      nibble_levels(b + 8, out);
      return fifth_bits(b + 4, out);
    case Type::kQ8_0:
      for (int i = 0; i < 32; ++i) out[i] = b[2 + i] ^ 0x80;
      return;
    case Type::kQ2_K:
      return k_two_bit_levels(b + 16, out);
    case Type::kQ3_K:
      k_two_bit_levels(b + 32, out);
      for (int s = 0; s < 8; ++s) {
        for (int i = 0; i < 32; ++i) out[32 * s + i] |= static_cast<uint8_t>(((b[i] >> s) & 1) << 2);
      }
      return;
    case Type::kQ4_K:
      return k_nibble_levels(b + 16, out);
    case Type::kQ5_K:
      k_nibble_levels(b + 48, out);
      for (int s = 0; s < 8; ++s) {
        for (int i = 0; i < 32; ++i) out[32 * s + i] |= static_cast<uint8_t>(((b[16 + i] >> s) & 1) << 4);
      }
      return;
    case Type::kQ6_K:
      return q6k_levels(b, b + 128, out);
    case Type::kIQ4_XS:
      for (int s = 0; s < 8; ++s) nibble_levels(b + 8 + 16 * s, out + 32 * s);
      return;
    case Type::kF32:
    case Type::kF16:
    case Type::kBF16:
      return;  // no levels
  }
}

// Q4_K and Q5_K: eight 6-bit scales and minima in 12 bytes.
inline void k_scales_and_minima(const uint8_t* s, uint8_t* scales, uint8_t* minima) {
  for (int i = 0; i < 4; ++i) {
    scales[i] = s[i] & 63;
    minima[i] = s[i + 4] & 63;
    scales[i + 4] = static_cast<uint8_t>((s[i + 8] & 15) | ((s[i] >> 6) << 4));
    minima[i + 4] = static_cast<uint8_t>((s[i + 8] >> 4) | ((s[i + 4] >> 6) << 4));
  }
}

// Q3_K: sixteen 6-bit scales in 12 bytes; 32 is to be subtracted.
inline void q3k_scales(const uint8_t* s, uint8_t* scales) {
  for (int i = 0; i < 16; ++i) {
    const int low = i < 8 ? s[i] & 15 : s[i - 8] >> 4;
    scales[i] = static_cast<uint8_t>(low | (((s[8 + i % 4] >> (2 * (i / 4))) & 3) << 4));
  }
}

// IQ4_XS: eight 6-bit scales, from scales_h and scales_l; 32 is to be subtracted.
inline void iq4xs_scales(const uint8_t* b, uint8_t* scales) {
  const uint32_t high = load_u16(b + 2);
  for (int i = 0; i < 8; ++i) {
    const int low = (b[4 + i / 2] >> (4 * (i % 2))) & 15;
    scales[i] = static_cast<uint8_t>(low | (((high >> (2 * i)) & 3) << 4));
  }
}

}  // namespace ktx
