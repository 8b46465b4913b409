// SPDX-License-Identifier: Apache-2.0
// Kernels on rows of activations: quantization and the gated unit. Included after a simd_*.h.
#pragma once

#include "half.h"
#include "kernels.h"
#include "math_kernels.h"

namespace ktx {
namespace {

// Quantizes `n` values (32 or 256) by one scale, the largest magnitude to 127, and writes 32 at a time `stride` bytes
// apart. NaN or infinity in a group makes its scale NaN, so that they reach the result. sums[i]: of 16 values each.
KTX_INLINE float quantize_group(const float* x, int n, int8_t* q, int64_t stride, int32_t* sums) {
  const float top = abs_max(x, n);
  const bool finite = top < __builtin_inff();
  const float inverse = finite && top > 0.0f ? 127.0f / top : 0.0f;
  for (int i = 0; i < n; i += 16) {
    int8_t* out = q + i / 32 * stride + i % 32;
    if (finite) {
      sums[i / 16] = quantize16(x + i, inverse, out);
    } else {
      for (int c = 0; c < 16; ++c) out[c] = 0;
      sums[i / 16] = 0;
    }
  }
  return finite ? top / 127.0f : __builtin_nanf("");
}

void quantize_row(const ActFormat& format, const float* x, int64_t k, const ActTile& tile, int rows, int m) {
  if (format.group == 0) {
    for (int64_t i = 0; i < k; ++i) tile.d[i * rows + m] = x[i];
    return;
  }
  const int64_t stride = 32 * static_cast<int64_t>(rows);
  const int per_group = format.group / 32;
  int8_t* q = tile.q + 32 * m;
  float* d = tile.d + m;
  for (int64_t i = 0; i < k / format.group; ++i, x += format.group, q += per_group * stride, d += rows) {
    int32_t sums[16];
    *d = quantize_group(x, format.group, q, stride, sums);
    const int64_t at = i * rows + m;  // of this group in a [K/group][M] array
    for (int s = 0; s < per_group; ++s) {
      const int32_t both = sums[2 * s] + sums[2 * s + 1];
      const int64_t at32 = (i * per_group + s) * rows + m;
      switch (format.aux) {
        case Aux::kStart:
          tile.aux[at32] = -format.offset * both;
          break;
        case Aux::kStart16:
          tile.aux[2 * at32] = -format.offset * sums[2 * s];
          tile.aux[2 * at32 + 1] = -format.offset * sums[2 * s + 1];
          break;
        case Aux::kSums:
          reinterpret_cast<int16_t*>(tile.aux)[8 * at + s] = static_cast<int16_t>(both);
          break;
        case Aux::kSums16:
          reinterpret_cast<int16_t*>(tile.aux)[16 * at + 2 * s] = static_cast<int16_t>(sums[2 * s]);
          reinterpret_cast<int16_t*>(tile.aux)[16 * at + 2 * s + 1] = static_cast<int16_t>(sums[2 * s + 1]);
          break;
        case Aux::kScaledSums:
          reinterpret_cast<float*>(tile.aux)[at32] = *d * static_cast<float>(both);
          break;
        case Aux::kNone:
          break;
      }
    }
  }
}

void residual_row(const ActFormat& format, const float* x, int64_t k, const ActTile& tile, int rows, int m,
                  float* lost) {
  for (int64_t i = 0; i < k; i += 32) {
    const int8_t* level = tile.q + (i / 32 * rows + m) * 32;
    const float d = tile.d[i / format.group * rows + m];
    for (int j = 0; j < 32; ++j) lost[i + j] = x[i + j] - d * static_cast<float>(level[j]);
  }
}

void from_bf16(const uint16_t* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = bf16_to_float(x[i]);
}

void to_bf16(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = float_to_bf16(x[i]);
}

void silu_mul(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const F32 g = load_f(gate + i);
    const F32 denominator = add_f(set_f(1.0f), exp_f(sub_f(zero_f(), g)));
    store_f(out + i, mul_f(div_f(g, denominator), load_f(up + i)));
  }
}

void add_rows(const float* values, int rows, const float* weight, const int64_t* token, float* sums, int64_t ld) {
  for (int m = 0; m < rows; ++m) {
    float* out = sums + token[m] * ld;
    store_f(out, fma_f(set_f(weight[m]), load_f(values + 16 * m), load_f(out)));
  }
}

}  // namespace
}  // namespace ktx
