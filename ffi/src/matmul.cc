// SPDX-License-Identifier: Apache-2.0
#include "matmul.h"

#include <algorithm>

#include "activations.h"
#include "isa.h"
#include "layout.h"
#include "thread_pool.h"

namespace ktx {
namespace {

// Activations that stay in the second-level cache while several panels pass over them.
constexpr int64_t kBlockBytes = 384 << 10;
// Below this many values, quantizing is quicker on one thread than waking the others.
constexpr int64_t kSerialValues = 32 << 10;
// Units of work: many, so that a slow thread holds nobody up, but of some size.
constexpr int64_t kUnitsPerThread = 32;
constexpr int64_t kUnitBytes = 64 << 10;

struct Problem {
  const Kernels& kernels;
  const Weights& w;
  const Activations& acts;
  bool precise;  // then every row is followed by what quantization lost of it, as a row of its own
  const std::vector<Tile>& tiles;  // of every leading index in turn; rows are tokens, padded ones those of the kernel
  int64_t tiles_per_lead;
  OutputRows out;  // row = token * lead + leading index
};

void quantize_all(const Problem& p, const InputRows& x) {
  const auto one_tile = [&](int64_t i) {
    const Tile& tile = p.tiles[static_cast<size_t>(i)];
    const int64_t lead_index = i / p.tiles_per_lead;
    const size_t bytes = static_cast<size_t>(p.w.k) * sizeof(float);
    float* buffer = reinterpret_cast<float*>(thread_memory(ThreadSlot::kRow, 2 * bytes));
    for (int m = 0; m < tile.rows; ++m) {
      const float* row = x.row((tile.first + m) * p.w.lead + lead_index, p.w.k, buffer);
      if (p.precise) {
        p.acts.quantize_twice(p.kernels, tile, 2 * m, row, buffer + p.w.k);
      } else {
        p.acts.quantize(p.kernels, tile, m, row);
      }
      if (m + 1 == tile.rows) p.acts.pad(p.kernels, tile, (p.precise ? 2 : 1) * tile.rows, row);
    }
  };
  const int64_t count = static_cast<int64_t>(p.tiles.size());
  if (count * p.tiles[0].rows * p.w.k < kSerialValues) {
    for (int64_t i = 0; i < count; ++i) one_tile(i);
  } else {
    parallel_for(count, one_tile);
  }
}

// Panels [first, last) of one leading index times tiles [tile_first, tile_last).
void multiply(const Problem& p, int64_t lead_index, int64_t first, int64_t last, int64_t tile_first,
              int64_t tile_last) {
  alignas(64) float block[kMaxTileRows * kPanelRows];
  for (int64_t i = first; i < last; ++i) {
    const uint8_t* panel = p.w.panel(lead_index, i);
    const uint8_t* next = p.w.panel_address(lead_index, i + 1);  // the thread's next unit, as a rule, if not of this one
    const int64_t columns = std::min<int64_t>(kPanelRows, p.w.n - i * kPanelRows);
    for (int64_t t = tile_first; t < tile_last; ++t) {
      const Tile& tile = p.tiles[static_cast<size_t>(lead_index * p.tiles_per_lead + t)];
      const PanelKernel kernel = p.kernels.panel(p.w.type->type, tile.padded);
      kernel(panel, next, p.w.kernel_k(), p.acts.tile(tile), block, kPanelRows);
      if (p.precise) add_pairs(block, tile.rows);
      p.out.write_tile(tile.first * p.w.lead + lead_index, p.w.lead, tile.rows, i * kPanelRows, block, columns);
    }
  }
}

}  // namespace

void matmul(const Weights& w, int64_t tokens, const void* x, bool x_bf16, void* out, bool out_bf16, bool precise) {
  if (tokens == 0 || w.lead == 0 || w.n == 0) return;
  const Kernels& k = kernels();
  std::vector<Tile> tiles;
  int64_t padded = 0;
  precise = precise && w.type->group != 0;  // floating-point weights take activations as they are
  for (int64_t l = 0; l < w.lead; ++l) padded = append_tiles(k, 0, tokens, padded, &tiles, precise ? 2 : 1);
  Activations acts(w.type->type, w.k);
  Scratch scratch(acts.bytes(padded));
  acts.place(scratch.take<uint8_t>(acts.bytes(padded)), padded);
  const int64_t per_lead = static_cast<int64_t>(tiles.size()) / w.lead;
  const Problem p{k, w, acts, precise, tiles, per_lead, {out, out_bf16, w.n}};
  quantize_all(p, {x, x_bf16, w.k});

  const int64_t row_bytes = w.type->group == 0 ? 4 * w.k : w.k;
  const int64_t block = std::clamp<int64_t>(kBlockBytes / (row_bytes * tiles[0].padded), 1, per_lead);
  const int64_t blocks = (per_lead + block - 1) / block;
  const int64_t panels = w.panels_per_lead();
  const int64_t wanted = std::max<int64_t>(1, threads() * kUnitsPerThread / (w.lead * blocks));
  const int64_t least = std::min((kUnitBytes + w.panel_size - 1) / w.panel_size, panels);
  const int64_t chunk = std::clamp<int64_t>(panels / wanted, least, std::max<int64_t>(least, 64));
  const int64_t chunks = (panels + chunk - 1) / chunk;
  parallel_for(w.lead * blocks * chunks, [&](int64_t unit) {
    // All rows for some panels, then the next panels: weights come from memory once.
    const int64_t first = unit / blocks % chunks * chunk;
    const int64_t tile_first = unit % blocks * block;
    multiply(p, unit / (chunks * blocks), first, std::min(first + chunk, panels), tile_first,
             std::min(tile_first + block, per_lead));
  });
}

}  // namespace ktx
