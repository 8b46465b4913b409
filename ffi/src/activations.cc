// SPDX-License-Identifier: Apache-2.0
#include "activations.h"

#include "memory.h"

namespace ktx {

int64_t append_tiles(const Kernels& kernels, int64_t first, int64_t rows, int64_t offset, std::vector<Tile>* tiles,
                     int each) {
  const int64_t most = kernels.max_tile_rows / each;
  const int64_t count = (rows + most - 1) / most;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = rows * i / count;
    const int size = static_cast<int>(rows * (i + 1) / count - begin);
    const int padded = kernels.tile_rows(each * size);
    tiles->push_back({first + begin, size, padded, offset});
    offset += padded;
  }
  return offset;
}

int64_t Activations::aux_words(int64_t k) const {
  switch (format_.aux) {
    case Aux::kNone:
      return 0;
    case Aux::kStart:
    case Aux::kScaledSums:
      return k / 32;
    case Aux::kStart16:
      return k / 16;
    case Aux::kSums:
      return k / 64;
    case Aux::kSums16:
      return k / 32;
  }
  return 0;
}

size_t Activations::bytes(int64_t padded_rows) const {
  const size_t rows = static_cast<size_t>(padded_rows);
  const size_t levels = format_.group == 0 ? 0 : static_cast<size_t>(k_);
  return scratch_bytes<int8_t>(rows * levels) + scratch_bytes<float>(rows * static_cast<size_t>(scales_per_row())) +
         scratch_bytes<int32_t>(rows * static_cast<size_t>(aux_per_row()));
}

void Activations::place(uint8_t* memory, int64_t padded_rows) {
  const size_t rows = static_cast<size_t>(padded_rows);
  q_ = reinterpret_cast<int8_t*>(memory);
  memory += scratch_bytes<int8_t>(format_.group == 0 ? 0 : rows * static_cast<size_t>(k_));
  d_ = reinterpret_cast<float*>(memory);
  memory += scratch_bytes<float>(rows * static_cast<size_t>(scales_per_row()));
  aux_ = reinterpret_cast<int32_t*>(memory);
}

ActTile Activations::columns(const Tile& t, int64_t k) const {
  ActTile out = tile(t);
  if (format_.group == 0) {
    out.d += k * t.padded;
    return out;
  }
  out.q += k * t.padded;
  out.d += k / format_.group * t.padded;
  out.aux += aux_words(k) * t.padded;
  return out;
}

}  // namespace ktx
