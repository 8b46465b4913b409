// SPDX-License-Identifier: Apache-2.0
// The layout that matmul kernels read: panels of 16 rows.
//
// Sixteen rows are interleaved so that one 64-byte vector holds four consecutive levels along K of each row: byte 4r +
// c of "quad" j is level 4j + c of row r. Thirty-two levels along K are eight quads, stored by codec:
//   nibbles   4 vectors, quad j in the low and quad j + 4 in the high nibbles
//   +1 bit    and one vector whose bit j is the fifth bit of quad j
//   +2 bits   and two vectors: bits 2c..2c+1 of the first belong to quad c, of the second to quad c + 4
//   bytes     8 vectors
//   2 bits    2 vectors like those of +2 bits
//   3 bits    and one vector of third bits
//
// Types in blocks of 32 store two blocks at a time: their scales (float16, 16 rows, a vector for both; the _1 types a
// vector of scales and minima for each), then the levels; the last pair of an odd K is half used. K-quants store
// super-blocks of 256: a header of scales, then eight times 32 levels; Q6_K and Q3_K, whose header would misalign the
// levels, keep their float16 super-scales in front of the panel. Sizes are those of the file but for that padding.
// Floating-point types are [K][16].
#pragma once

#include <cstdint>

#include "types.h"

namespace ktx {

inline constexpr int kPanelRows = 16;

enum class Codec { kNone, kNibble, kNibble1, kNibble2, kByte, kTwoBit, kThreeBit };

struct Layout {
  int block_size;  // elements along K that share scales: 1, 32, 256
  Codec codec;
  int codec_bytes;   // of 16 rows x 32 levels
  int header_bytes;  // of a pair of 32-blocks, or of a super-block
  bool scales_first;
};

inline constexpr Layout layout_of(Type type) {
  switch (type) {
    case Type::kQ4_0:
    case Type::kIQ4_NL:
      return {32, Codec::kNibble, 256, 64, false};
    case Type::kQ4_1:
      return {32, Codec::kNibble, 256, 128, false};
    case Type::kQ5_0:
      return {32, Codec::kNibble1, 320, 64, false};
    case Type::kQ5_1:
      return {32, Codec::kNibble1, 320, 128, false};
    case Type::kQ8_0:
      return {32, Codec::kByte, 512, 64, false};
    case Type::kQ2_K:
      return {256, Codec::kTwoBit, 128, 320, false};
    case Type::kQ3_K:
      return {256, Codec::kThreeBit, 192, 192, true};
    case Type::kQ4_K:
      return {256, Codec::kNibble, 256, 256, false};
    case Type::kQ5_K:
      return {256, Codec::kNibble1, 320, 256, false};
    case Type::kQ6_K:
      return {256, Codec::kNibble2, 384, 256, true};
    case Type::kIQ4_XS:
      return {256, Codec::kNibble, 256, 128, false};
    default:
      return {1, Codec::kNone, 0, 0, false};
  }
}

inline constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Bytes of the super-scales in front of a panel of `blocks` super-blocks.
inline constexpr int64_t leading_bytes(Type type, int64_t blocks) {
  return layout_of(type).scales_first ? round_up(blocks * 2 * kPanelRows, 64) : 0;
}

// Bytes of a panel of 16 rows of `blocks` ggml blocks; a multiple of 64.
inline int64_t panel_bytes(Type type, int64_t blocks) {
  const TypeInfo& info = type_info(type);
  const Layout layout = layout_of(type);
  if (info.block_size == 1) return round_up(blocks * info.type_size * kPanelRows, 64);
  if (info.block_size == 32) return (blocks + 1) / 2 * (layout.header_bytes + 2 * layout.codec_bytes);
  return leading_bytes(type, blocks) + blocks * (layout.header_bytes + 8 * layout.codec_bytes);
}

}  // namespace ktx
