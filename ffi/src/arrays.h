// SPDX-License-Identifier: Apache-2.0
// Rows of float32 or bfloat16, as they come from and go to the caller.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"
#include "layout.h"

namespace ktx {

struct InputRows {
  const void* data;
  bool bf16;
  int64_t stride;  // elements from row to row

  // Row i as float32: in place, or converted into `buffer` of `n` floats.
  const float* row(int64_t i, int64_t n, float* buffer) const {
    if (!bf16) return static_cast<const float*>(data) + i * stride;
    kernels().from_bf16(static_cast<const uint16_t*>(data) + i * stride, n, buffer);
    return buffer;
  }
};

struct OutputRows {
  void* data;
  bool bf16;
  int64_t stride;

  // Columns [first, first + n) of row i.
  void write(int64_t i, int64_t first, const float* values, int64_t n) const {
    const int64_t at = i * stride + first;
    if (!bf16) {
      std::memcpy(static_cast<float*>(data) + at, values, static_cast<size_t>(n) * sizeof(float));
      return;
    }
    kernels().to_bf16(values, n, static_cast<uint16_t*>(data) + at);
  }

  // Columns [first, first + n), n <= 16, of `rows` rows i, i + step, ...; values are [rows, 16].
  void write_tile(int64_t i, int64_t step, int rows, int64_t first, const float* values, int64_t n) const {
    if (!bf16) {
      for (int m = 0; m < rows; ++m) write(i + m * step, first, values + m * kPanelRows, n);
      return;
    }
    uint16_t bits[kMaxTileRows * kPanelRows];
    kernels().to_bf16(values, rows * kPanelRows, bits);
    for (int m = 0; m < rows; ++m) {
      std::memcpy(static_cast<uint16_t*>(data) + (i + m * step) * stride + first, bits + m * kPanelRows,
                  static_cast<size_t>(n) * sizeof(uint16_t));
    }
  }
};

}  // namespace ktx
