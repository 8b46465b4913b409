// SPDX-License-Identifier: Apache-2.0
// Chooses among the instances of the panel kernels. Included after a simd_*.h, in one translation unit an instruction
// set.
#pragma once

#include "attention_f32.h"
#include "panel_kernels.h"
#include "row_kernels.h"

namespace ktx {
namespace {

// Tile sizes that have a kernel: every size to eight, then even ones.
constexpr int next_tile_rows(int rows) { return rows < 8 ? rows + 1 : rows + 2; }
int padded_tile_rows(int rows) { return rows <= 8 ? rows : (rows + 1) / 2 * 2; }

template <Type kType, int M>
constexpr PanelKernel panel_kernel() {
  constexpr int kBlock = layout_of(kType).block_size;
  if constexpr (kBlock == 1) {
    return panel_of_floats<kType, M>;
  } else if constexpr (kBlock == 32) {
    return panel_of_32<kType, M>;
  } else {
    return panel_of_256<kType, M>;
  }
}

template <Type kType, int M = 1>
PanelKernel kernel_of_rows(int rows) {
  if (rows == M) return panel_kernel<kType, M>();
  if constexpr (next_tile_rows(M) <= kTileRows) return kernel_of_rows<kType, next_tile_rows(M)>(rows);
  return nullptr;
}

PanelKernel choose_panel_kernel(Type type, int rows) {
  switch (type) {
    case Type::kF32:
      return kernel_of_rows<Type::kF32>(rows);
    case Type::kF16:
      return kernel_of_rows<Type::kF16>(rows);
    case Type::kBF16:
      return kernel_of_rows<Type::kBF16>(rows);
    case Type::kQ4_0:
      return kernel_of_rows<Type::kQ4_0>(rows);
    case Type::kQ4_1:
      return kernel_of_rows<Type::kQ4_1>(rows);
    case Type::kQ5_0:
      return kernel_of_rows<Type::kQ5_0>(rows);
    case Type::kQ5_1:
      return kernel_of_rows<Type::kQ5_1>(rows);
    case Type::kQ8_0:
      return kernel_of_rows<Type::kQ8_0>(rows);
    case Type::kQ2_K:
      return kernel_of_rows<Type::kQ2_K>(rows);
    case Type::kQ3_K:
      return kernel_of_rows<Type::kQ3_K>(rows);
    case Type::kQ4_K:
      return kernel_of_rows<Type::kQ4_K>(rows);
    case Type::kQ5_K:
      return kernel_of_rows<Type::kQ5_K>(rows);
    case Type::kQ6_K:
      return kernel_of_rows<Type::kQ6_K>(rows);
    case Type::kIQ4_NL:
      return kernel_of_rows<Type::kIQ4_NL>(rows);
    case Type::kIQ4_XS:
      return kernel_of_rows<Type::kIQ4_XS>(rows);
  }
  return nullptr;
}

constexpr Kernels make_kernels() {
  return {kTileRows, choose_panel_kernel, padded_tile_rows, quantize_row, residual_row, from_bf16, to_bf16, silu_mul, add_rows, &kAttentionF32};
}

}  // namespace
}  // namespace ktx
