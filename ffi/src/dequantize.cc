// SPDX-License-Identifier: Apache-2.0
#include "dequantize.h"

#include "formats.h"

namespace ktx {
namespace {

struct SubBlockScales {
  float scale[16];
  float minimum[16];
  int width;  // elements a scale holds for
};

void k_scales(Type type, const uint8_t* b, SubBlockScales* out) {
  uint8_t s[16];
  uint8_t m[16] = {};
  float dmin = 0.0f;
  float d = 0.0f;
  out->width = 16;
  int offset = 0;
  switch (type) {
    case Type::kQ2_K:
      for (int i = 0; i < 16; ++i) {
        s[i] = b[i] & 15;
        m[i] = b[i] >> 4;
      }
      d = half_to_float(load_u16(b + 80));
      dmin = half_to_float(load_u16(b + 82));
      break;
    case Type::kQ3_K:
      q3k_scales(b + 96, s);
      offset = 32;
      d = half_to_float(load_u16(b + 108));
      break;
    case Type::kQ6_K:
      for (int i = 0; i < 16; ++i) s[i] = b[192 + i] ^ 0x80;
      offset = 128;
      d = half_to_float(load_u16(b + 208));
      break;
    case Type::kIQ4_XS:
      iq4xs_scales(b, s);
      offset = 32;
      d = half_to_float(load_u16(b));
      out->width = 32;
      break;
    default:  // Q4_K, Q5_K
      k_scales_and_minima(b + 4, s, m);
      d = half_to_float(load_u16(b));
      dmin = half_to_float(load_u16(b + 2));
      out->width = 32;
      break;
  }
  for (int i = 0; i < 256 / out->width; ++i) {
    out->scale[i] = d * static_cast<float>(static_cast<int>(s[i]) - offset);
    out->minimum[i] = dmin * static_cast<float>(m[i]);
  }
}

void k_block(const TypeInfo& info, const uint8_t* b, float* out) {
  uint8_t levels[256];
  SubBlockScales scales;
  unpack_levels(info.type, b, levels);
  k_scales(info.type, b, &scales);
  for (int i = 0; i < 256; ++i) {
    const int level = info.type == Type::kIQ4_XS ? kIq4Levels[levels[i]] : levels[i];
    const int s = i / scales.width;
    const float value = scales.scale[s] * static_cast<float>(level - info.offset);
    out[i] = info.aux == Aux::kSums || info.aux == Aux::kSums16 ? value - scales.minimum[s] : value;
  }
}

void block_of_32(const TypeInfo& info, const uint8_t* b, float* out) {
  uint8_t levels[32];
  unpack_levels(info.type, b, levels);
  const float d = half_to_float(load_u16(b));
  for (int i = 0; i < 32; ++i) {
    const int level = info.type == Type::kIQ4_NL ? kIq4Levels[levels[i]] : levels[i];
    out[i] = d * static_cast<float>(level - info.offset);
    if (info.aux == Aux::kScaledSums) out[i] += half_to_float(load_u16(b + 2));
  }
}

}  // namespace

void dequantize_row(Type type, const uint8_t* row, int64_t blocks, float* out) {
  const TypeInfo& info = type_info(type);
  for (int64_t i = 0; i < blocks; ++i, row += info.type_size, out += info.block_size) {
    switch (info.block_size) {
      case 1:
        *out = type == Type::kF32   ? float_from_bits(load_u32(row))
               : type == Type::kF16 ? half_to_float(load_u16(row))
                                    : bf16_to_float(load_u16(row));
        break;
      case 32:
        block_of_32(info, row, out);
        break;
      default:
        k_block(info, row, out);
    }
  }
}

}  // namespace ktx
