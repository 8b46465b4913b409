// SPDX-License-Identifier: Apache-2.0
// Activations cut into tiles of rows and quantized for a weight type.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "layout.h"

namespace ktx {

struct Tile {
  int64_t first;   // row
  int rows;        // rows that count
  int padded;      // rows of the kernel that runs it
  int64_t offset;  // padded rows before it
};

// Appends tiles of nearly equal size for rows [first, first + rows), each of them `each` rows of a kernel; returns the
// padded rows so far.
int64_t append_tiles(const Kernels& kernels, int64_t first, int64_t rows, int64_t offset, std::vector<Tile>* tiles,
                     int each = 1);

// Row m of a tile's products with a panel becomes the sum of rows 2m and 2m + 1, those of values quantized twice.
inline void add_pairs(float* products, int rows) {
  for (int m = 0; m < rows; ++m) {
    for (int j = 0; j < kPanelRows; ++j) {
      products[m * kPanelRows + j] = products[2 * m * kPanelRows + j] + products[(2 * m + 1) * kPanelRows + j];
    }
  }
}

// Where the quantized rows of all tiles lie.
class Activations {
 public:
  Activations(Type type, int64_t k) : format_(act_format(type)), k_(k) {}

  const ActFormat& format() const { return format_; }
  int64_t k() const { return k_; }

  // Bytes for that many padded rows, and the memory (aligned to 64).
  size_t bytes(int64_t padded_rows) const;
  void place(uint8_t* memory, int64_t padded_rows);

  ActTile tile(const Tile& t) const {
    return {q_ + t.offset * k_, d_ + t.offset * scales_per_row(), aux_ + t.offset * aux_per_row()};
  }

  // Quantizes x into row m of the tile.
  void quantize(const Kernels& kernels, const Tile& t, int m, const float* x) const {
    kernels.quantize(format_, x, k_, tile(t), t.padded, m);
  }

  // Quantizes x into row m, and what that loses of it into row m + 1, for fifteen bits in place of eight. `lost`: k
  // values to work in.
  void quantize_twice(const Kernels& kernels, const Tile& t, int m, const float* x, float* lost) const {
    quantize_twice(kernels, tile(t), t.padded, m, x, k_, lost);
  }

  // The same for k columns of a tile of `rows` rows.
  void quantize_twice(const Kernels& kernels, const ActTile& tile, int rows, int m, const float* x, int64_t k,
                      float* lost) const {
    kernels.quantize(format_, x, k, tile, rows, m);
    if (format_.group == 0) {  // nothing is lost
      std::fill_n(lost, k, 0.0f);
    } else {
      kernels.residual(format_, x, k, tile, rows, m, lost);
    }
    kernels.quantize(format_, lost, k, tile, rows, m + 1);
  }

  // Fills the padding, rows `first` and on, with x: any values do.
  void pad(const Kernels& kernels, const Tile& t, int first, const float* x) const {
    for (int p = first; p < t.padded; ++p) quantize(kernels, t, p, x);
  }

  // The part of a tile that begins at column `k`, a multiple of the group.
  ActTile columns(const Tile& t, int64_t k) const;

 private:
  int64_t scales_per_row() const { return format_.group == 0 ? k_ : k_ / format_.group; }
  int64_t aux_per_row() const { return aux_words(k_); }
  int64_t aux_words(int64_t k) const;

  ActFormat format_;
  int64_t k_;
  int8_t* q_ = nullptr;
  float* d_ = nullptr;
  int32_t* aux_ = nullptr;
};

}  // namespace ktx
