// SPDX-License-Identifier: Apache-2.0
// The interface between the operations and the kernels of one instruction set. Each instruction set is a translation
// unit with its own compiler flags; `kernels()` gives the one this machine runs (isa.h).
#pragma once

#include <cstdint>

#include "attention_kernels.h"
#include "types.h"

namespace ktx {

inline constexpr int kMaxTileRows = 16;

// How activations are quantized for a weight type.
struct ActFormat {
  int group;  // elements that share a scale; 0: float32
  Aux aux;
  int offset;
};

inline ActFormat act_format(Type type) {
  const TypeInfo& info = type_info(type);
  return {info.group, info.aux, info.offset};
}

// A tile of M rows of quantized activations, interleaved in order of K:
//   q    int8 [K/32][M][32]
//   d    float [K/group][M], the scale; for floating-point weights the values themselves, [K][M]
//   aux  see Aux: [K/32][M] words (kStart16: two each), or [K/256][M] of 8 or 16 int16
struct ActTile {
  int8_t* q;
  float* d;
  int32_t* aux;
};

// out[m * ld + r] = row m of the tile times row r of the panel, r < 16. `k` is in units of 32 for quantized types (of
// one for floating-point ones). `next`: the panel that will be read after this one, if known; its beginning is fetched.
using PanelKernel = void (*)(const uint8_t* panel, const uint8_t* next, int64_t k, const ActTile& x, float* out, int64_t ld);

struct Kernels {
  int max_tile_rows;
  // The kernel for tiles of exactly `rows` rows, 1 <= rows <= max_tile_rows, where tile_rows(rows) == rows.
  PanelKernel (*panel)(Type type, int rows);
  // The smallest tile with a kernel that holds `rows` rows; the rest of it is padding.
  int (*tile_rows)(int rows);
  // Quantizes one row of k values into row m of a tile of `rows` rows.
  void (*quantize)(const ActFormat& format, const float* x, int64_t k, const ActTile& tile, int rows, int m);
  // What that lost: lost[i] = x[i] less the value that its level in row m of the tile stands for.
  void (*residual)(const ActFormat& format, const float* x, int64_t k, const ActTile& tile, int rows, int m,
                   float* lost);
  // Rows of bfloat16, n values.
  void (*from_bf16)(const uint16_t* x, int64_t n, float* out);
  void (*to_bf16)(const float* x, int64_t n, uint16_t* out);
  // out[i] = silu(gate[i]) * up[i], i < n, a multiple of 16.
  void (*silu_mul)(const float* gate, const float* up, int64_t n, float* out);
  // sums[token[m] * ld + r] += weight[m] * values[16 m + r], for rows m in order and r < 16.
  void (*add_rows)(const float* values, int rows, const float* weight, const int64_t* token, float* sums, int64_t ld);
  const AttentionKernels* attention;  // in float32
};

}  // namespace ktx
