// SPDX-License-Identifier: Apache-2.0
#include "pack.h"

#include <cstring>

#include "formats.h"

namespace ktx {
namespace {

constexpr uint32_t every_byte(uint32_t b) { return b * 0x01010101u; }

// Bits `shift`.. of `count` quads, `width` bits each, side by side in one word.
inline uint32_t plane(const uint8_t* levels, int count, int shift, int width) {
  uint32_t word = 0;
  for (int c = 0; c < count; ++c) {
    word |= ((load_u32(levels + 4 * c) >> shift) & every_byte((1u << width) - 1)) << (width * c);
  }
  return word;
}

// Thirty-two levels of row r, into the vectors of the codec.
void pack_levels(Codec codec, const uint8_t* levels, int r, uint8_t* out) {
  out += 4 * r;
  switch (codec) {
    case Codec::kNibble:
    case Codec::kNibble1:
    case Codec::kNibble2:
      for (int j = 0; j < 4; ++j) {
        const uint32_t low = load_u32(levels + 4 * j) & every_byte(15);
        const uint32_t high = load_u32(levels + 16 + 4 * j) & every_byte(15);
        store_u32(out + 64 * j, low | (high << 4));
      }
      if (codec == Codec::kNibble1) store_u32(out + 256, plane(levels, 8, 4, 1));
      if (codec == Codec::kNibble2) {
        store_u32(out + 256, plane(levels, 4, 4, 2));
        store_u32(out + 320, plane(levels + 16, 4, 4, 2));
      }
      return;
    case Codec::kByte:
      for (int j = 0; j < 8; ++j) store_u32(out + 64 * j, load_u32(levels + 4 * j));
      return;
    case Codec::kTwoBit:
    case Codec::kThreeBit:
      store_u32(out, plane(levels, 4, 0, 2));
      store_u32(out + 64, plane(levels + 16, 4, 0, 2));
      if (codec == Codec::kThreeBit) store_u32(out + 128, plane(levels, 8, 2, 1));
      return;
    case Codec::kNone:
      return;
  }
}

// 256 six-bit values in 192 bytes: values 0..191 in the low bits, the others spread over the top bits.
void pack_six_bits(const uint8_t* values, uint8_t* out) {
  for (int i = 0; i < 64; ++i) {
    const uint8_t last = values[192 + i];
    out[i] = static_cast<uint8_t>(values[i] | ((last & 3) << 6));
    out[64 + i] = static_cast<uint8_t>(values[64 + i] | (((last >> 2) & 3) << 6));
    out[128 + i] = static_cast<uint8_t>(values[128 + i] | ((last >> 4) << 6));
  }
}

// Scales of sixteen rows of one super-block, gathered before they are interleaved.
struct HeaderFields {
  uint8_t scales[16][16];  // [sub-block][row]
  uint8_t minima[16][16];
  uint16_t d[16];
  uint16_t dmin[16];
};

void read_header(Type type, const uint8_t* b, int r, HeaderFields* f) {
  uint8_t s[16] = {};
  uint8_t m[16] = {};
  switch (type) {
    case Type::kQ2_K:
      for (int i = 0; i < 16; ++i) {
        s[i] = b[i] & 15;
        m[i] = b[i] >> 4;
      }
      f->d[r] = load_u16(b + 80);
      f->dmin[r] = load_u16(b + 82);
      break;
    case Type::kQ3_K:
      q3k_scales(b + 96, s);
      f->d[r] = load_u16(b + 108);
      break;
    case Type::kQ6_K:
      std::memcpy(s, b + 192, 16);
      f->d[r] = load_u16(b + 208);
      break;
    case Type::kIQ4_XS:
      iq4xs_scales(b, s);
      f->d[r] = load_u16(b);
      break;
    default:  // Q4_K, Q5_K
      k_scales_and_minima(b + 4, s, m);
      f->d[r] = load_u16(b);
      f->dmin[r] = load_u16(b + 2);
      break;
  }
  for (int i = 0; i < 16; ++i) {
    f->scales[i][r] = s[i];
    f->minima[i][r] = m[i];
  }
}

// Minima of sub-blocks 2p and 2p + 1 side by side, for products of 16-bit pairs.
void pair_minima(const HeaderFields& f, int sub_blocks, uint8_t* out) {
  for (int s = 0; s < sub_blocks; ++s) {
    for (int r = 0; r < kPanelRows; ++r) out[s / 2 * 32 + 2 * r + s % 2] = f.minima[s][r];
  }
}

void write_header(Type type, const HeaderFields& f, uint8_t* super_scales, uint8_t* out) {
  switch (type) {
    case Type::kQ2_K: {
      uint8_t minima[256];
      pair_minima(f, 16, minima);
      std::memcpy(out, f.d, 32);
      std::memcpy(out + 32, f.dmin, 32);
      for (int i = 0; i < 256; ++i) out[64 + i] = static_cast<uint8_t>(f.scales[i / 16][i % 16] | (minima[i] << 4));
      return;
    }
    case Type::kQ3_K:
      std::memcpy(super_scales, f.d, 32);
      return pack_six_bits(&f.scales[0][0], out);
    case Type::kQ6_K:
      std::memcpy(super_scales, f.d, 32);
      std::memcpy(out, f.scales, 256);
      return;
    case Type::kIQ4_XS:
      std::memcpy(out, f.d, 32);
      for (int i = 0; i < 32; ++i) {  // top two bits of four values 32 apart
        uint8_t top = 0;
        for (int c = 0; c < 4; ++c) top |= static_cast<uint8_t>((f.scales[2 * c + i / 16][i % 16] >> 4) << (2 * c));
        out[32 + i] = top;
      }
      for (int i = 0; i < 64; ++i) {
        const int s = i / 16;
        out[64 + i] = static_cast<uint8_t>((f.scales[s][i % 16] & 15) | ((f.scales[s + 4][i % 16] & 15) << 4));
      }
      return;
    default: {  // Q4_K, Q5_K
      std::memcpy(out, f.d, 32);
      std::memcpy(out + 32, f.dmin, 32);
      uint8_t values[256];
      std::memcpy(values, f.scales, 128);
      pair_minima(f, 8, values + 128);
      return pack_six_bits(values, out + 64);
    }
  }
}

void pack_super_blocks(const TypeInfo& info, const uint8_t* rows, int64_t stride, int n_rows, int64_t blocks,
                       uint8_t* out) {
  const Layout layout = layout_of(info.type);
  uint8_t* super_scales = out;
  out += leading_bytes(info.type, blocks);
  for (int64_t i = 0; i < blocks; ++i) {
    HeaderFields fields = {};
    uint8_t* levels_out = out + layout.header_bytes;
    for (int r = 0; r < kPanelRows; ++r) {
      uint8_t levels[256] = {};
      if (r < n_rows) {
        const uint8_t* block = rows + r * stride + i * info.type_size;
        unpack_levels(info.type, block, levels);
        read_header(info.type, block, r, &fields);
      }
      for (int s = 0; s < 8; ++s) pack_levels(layout.codec, levels + 32 * s, r, levels_out + s * layout.codec_bytes);
    }
    write_header(info.type, fields, super_scales + i * 2 * kPanelRows, out);
    out += layout.header_bytes + 8 * layout.codec_bytes;
  }
}

void pack_blocks_of_32(const TypeInfo& info, const uint8_t* rows, int64_t stride, int n_rows, int64_t blocks,
                       uint8_t* out) {
  const Layout layout = layout_of(info.type);
  const bool minima = info.aux == Aux::kScaledSums;
  for (int64_t i = 0; i < blocks + blocks % 2; ++i) {
    uint8_t* scales = out + (i % 2) * (layout.header_bytes / 2);
    uint8_t* levels_out = out + layout.header_bytes + (i % 2) * layout.codec_bytes;
    for (int r = 0; r < kPanelRows; ++r) {
      uint8_t levels[32] = {};
      uint16_t d = 0;
      uint16_t m = 0;
      if (r < n_rows && i < blocks) {
        const uint8_t* block = rows + r * stride + i * info.type_size;
        unpack_levels(info.type, block, levels);
        d = load_u16(block);
        m = load_u16(block + 2);
      }
      store_u16(scales + 2 * r, d);
      if (minima) store_u16(scales + 32 + 2 * r, m);
      pack_levels(layout.codec, levels, r, levels_out);
    }
    if (i % 2 == 1) out += layout.header_bytes + 2 * layout.codec_bytes;
  }
}

template <typename Word>
void pack_floats(const uint8_t* rows, int64_t stride, int n_rows, int64_t k, uint8_t* out) {
  constexpr int64_t kTile = 16;
  for (int64_t begin = 0; begin < k; begin += kTile) {
    const int64_t end = begin + kTile < k ? begin + kTile : k;
    for (int r = 0; r < kPanelRows; ++r) {
      for (int64_t i = begin; i < end; ++i) {
        Word value = 0;
        if (r < n_rows) std::memcpy(&value, rows + r * stride + i * sizeof(Word), sizeof(Word));
        std::memcpy(out + (i * kPanelRows + r) * sizeof(Word), &value, sizeof(Word));
      }
    }
  }
}

}  // namespace

void pack_panel(Type type, const uint8_t* rows, int64_t row_stride, int n_rows, int64_t blocks, uint8_t* out) {
  const TypeInfo& info = type_info(type);
  switch (info.block_size) {
    case 1:
      if (info.type_size == 4) return pack_floats<uint32_t>(rows, row_stride, n_rows, blocks, out);
      return pack_floats<uint16_t>(rows, row_stride, n_rows, blocks, out);
    case 32:
      return pack_blocks_of_32(info, rows, row_stride, n_rows, blocks, out);
    default:
      return pack_super_blocks(info, rows, row_stride, n_rows, blocks, out);
  }
}

}  // namespace ktx
