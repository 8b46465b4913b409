// SPDX-License-Identifier: Apache-2.0
// Two passes over the weights. In the first, a unit of work is some hidden columns of one expert: gate, up, the gated
// unit and quantization for the second. There, a unit is some output columns of all experts, so that no two threads
// write the same place and a token's sum runs in the order of its experts.
#include "experts.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "expert_plan.h"
#include "arrays.h"
#include "isa.h"
#include "layout.h"
#include "thread_pool.h"

namespace ktx {
namespace {

constexpr int64_t kBlockBytes = 384 << 10;   // activations that stay in the second-level cache
constexpr int64_t kOutputBytes = 1 << 20;    // of a thread's output columns
constexpr int64_t kSerialValues = 32 << 10;
constexpr int64_t kTokensAtOnce = 4096;  // bounds the memory of intermediate values
constexpr int64_t kColumns = 256;        // hidden columns of a unit, and of a quantization group at most
constexpr int64_t kFewColumns = 64;      // of a unit when there are few

bool same(const ActFormat& a, const ActFormat& b) {
  return a.group == b.group && a.aux == b.aux && a.offset == b.offset;
}

// Consecutive tiles whose activations fit the cache.
struct TileBlock {
  int64_t expert;
  int64_t tile_first;
  int64_t tile_last;
};

// Some hidden columns of a block of tiles.
struct HiddenUnit {
  size_t block;
  int64_t part;
};

// All blocks of an expert for some columns, then the next columns: weights come from memory once.
std::vector<HiddenUnit> hidden_units(const std::vector<TileBlock>& blocks, int64_t parts) {
  std::vector<HiddenUnit> units;
  for (size_t first = 0; first < blocks.size();) {
    size_t last = first;
    while (last < blocks.size() && blocks[last].expert == blocks[first].expert) ++last;
    for (int64_t part = 0; part < parts; ++part) {
      for (size_t b = first; b < last; ++b) units.push_back({b, part});
    }
    first = last;
  }
  return units;
}

std::vector<TileBlock> block_tiles(const ExpertPlan& plan, int64_t row_bytes) {
  std::vector<TileBlock> blocks;
  for (const ExpertPlan::Group& g : plan.groups) {
    const int64_t widest = plan.tiles[static_cast<size_t>(g.tile_last) - 1].padded;
    const int64_t size = std::max<int64_t>(1, kBlockBytes / (row_bytes * widest));
    for (int64_t t = g.tile_first; t < g.tile_last; t += size) {
      blocks.push_back({g.expert, t, std::min(t + size, g.tile_last)});
    }
  }
  return blocks;
}

int64_t row_bytes(const Weights& w) { return w.type->group == 0 ? 4 * w.k : w.k; }

class ExpertsRun {
 public:
  ExpertsRun(const ExpertsCall& call, int64_t first, int64_t tokens)
      : call_(call),
        first_(first),
        tokens_(tokens),
        plan_(kernels_, call.ids + first * call.top_k, call.weights + first * call.top_k, tokens, call.top_k,
              call.gate.lead, call.precise ? 2 : 1),
        gate_in_(call.gate.type->type, call.gate.k),
        up_in_(call.up.type->type, call.up.k),
        hidden_(call.down.type->type, call.down.k) {}

  void run() {
    const bool one_input = same(gate_in_.format(), up_in_.format());
    blocks_ = block_tiles(plan_, row_bytes(call_.gate));
    const int64_t column_blocks = (call_.down.k + kColumns - 1) / kColumns;
    const int64_t units = static_cast<int64_t>(blocks_.size()) * column_blocks;
    const bool split = units < 16 * threads();
    const int64_t rows = plan_.padded_rows;
    const size_t shared = split ? scratch_bytes<float>(static_cast<size_t>(rows * call_.down.k)) : 0;
    Scratch scratch(gate_in_.bytes(rows) + (one_input ? 0 : up_in_.bytes(rows)) + hidden_.bytes(rows) + shared + 64);
    gate_in_.place(scratch.take<uint8_t>(gate_in_.bytes(rows)), rows);
    if (one_input) {
      up_in_ = gate_in_;
    } else {
      up_in_.place(scratch.take<uint8_t>(up_in_.bytes(rows)), rows);
    }
    hidden_.place(scratch.take<uint8_t>(hidden_.bytes(rows)), rows);
    quantize_inputs(one_input);
    if (split) {
      hidden_values_split(column_blocks, scratch.take<float>(static_cast<size_t>(rows * call_.down.k)));
    } else {
      const std::vector<HiddenUnit> list = hidden_units(blocks_, column_blocks);
      parallel_for(units, [&](int64_t i) {
        const HiddenUnit& unit = list[static_cast<size_t>(i)];
        hidden_values(blocks_[unit.block], unit.part, first_panel(list, i + 1, kColumns));
      });
    }
    output();
  }

 private:
  const Tile& tile(int64_t i) const { return plan_.tiles[static_cast<size_t>(i)]; }

  // Rows of the kernel for a row.
  int each() const { return call_.precise ? 2 : 1; }

  // Row m of a tile: k columns of `acts` that begin at the tile's first.
  void quantize(const Activations& acts, const ActTile& out, int padded, int m, const float* row, int64_t k,
                float* lost) const {
    if (call_.precise) {
      acts.quantize_twice(kernels_, out, padded, 2 * m, row, k, lost);
    } else {
      kernels_.quantize(acts.format(), row, k, out, padded, m);
    }
  }

  void quantize_inputs(bool one_input) {
    const int64_t d = call_.gate.k;
    const InputRows x{call_.x, call_.x_bf16, d};
    const auto one_tile = [&](int64_t i) {
      float* buffer = reinterpret_cast<float*>(thread_memory(ThreadSlot::kRow, static_cast<size_t>(d) * 2 * sizeof(float)));
      for (int m = 0; m < tile(i).rows; ++m) {
        const int64_t token = plan_.token[static_cast<size_t>(tile(i).first + m)];
        const float* row = x.row(first_ + token, d, buffer);
        for (const Activations* in : {&gate_in_, &up_in_}) {
          if (in == &up_in_ && one_input) continue;
          quantize(*in, in->tile(tile(i)), tile(i).padded, m, row, d, buffer + d);
          if (m + 1 == tile(i).rows) in->pad(kernels_, tile(i), each() * tile(i).rows, row);
        }
      }
    };
    const int64_t count = static_cast<int64_t>(plan_.tiles.size());
    if (plan_.padded_rows * d < kSerialValues) {
      for (int64_t i = 0; i < count; ++i) one_tile(i);
    } else {
      parallel_for(count, one_tile);
    }
  }

  // One panel of gate or up times the tiles of a block, into out [padded rows of the block, 16], of which a tile's rows
  // come first; `next` is read after it.
  void project(const Weights& w, const Activations& in, const TileBlock& b, int64_t panel, const uint8_t* next,
               float* out) const {
    const uint8_t* data = w.panel(b.expert, panel);
    for (int64_t t = b.tile_first; t < b.tile_last; ++t) {
      kernels_.panel(w.type->type, tile(t).padded)(data, next, w.kernel_k(), in.tile(tile(t)), out, kPanelRows);
      if (call_.precise) add_pairs(out, tile(t).rows);
      out += tile(t).padded * kPanelRows;
    }
  }

  // Columns [begin, end) of `down`'s input, for a block of tiles; row r of the block goes to out + r * ld. They are
  // silu(gate) * up, with zeros before and behind where `down` is wider. `next` is read after that.
  void gated(const TileBlock& b, int64_t begin, int64_t end, const uint8_t* next, float* out, int64_t ld) const {
    const int64_t rows = padded_rows(b);
    const int64_t first = std::clamp(call_.offset, begin, end);
    const int64_t last = std::clamp(call_.offset + call_.gate.n, first, end);
    if (last - first < end - begin) {
      for (int64_t r = 0; r < rows; ++r) std::fill(out + r * ld, out + r * ld + (end - begin), 0.0f);
    }
    const size_t size = static_cast<size_t>(rows * kPanelRows);
    float* gate = reinterpret_cast<float*>(thread_memory(ThreadSlot::kOutput, 2 * size * sizeof(float)));
    float* up = gate + size;
    for (int64_t c = first; c < last; c += kPanelRows) {
      const int64_t panel = (c - call_.offset) / kPanelRows;
      const bool more = c + kPanelRows < last;
      project(call_.gate, gate_in_, b, panel, call_.up.panel_address(b.expert, panel), gate);
      project(call_.up, up_in_, b, panel, more ? call_.gate.panel_address(b.expert, panel + 1) : next, up);
      kernels_.silu_mul(gate, up, rows * kPanelRows, gate);
      const size_t columns = static_cast<size_t>(std::min<int64_t>(kPanelRows, last - c));
      for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(out + r * ld + (c - begin), gate + r * kPanelRows, columns * sizeof(float));
      }
    }
  }

  // Of gate, what unit i begins with; nullptr behind the last.
  const uint8_t* first_panel(const std::vector<HiddenUnit>& units, int64_t i, int64_t columns) const {
    if (i == static_cast<int64_t>(units.size())) return nullptr;
    const HiddenUnit& unit = units[static_cast<size_t>(i)];
    const int64_t first = std::max<int64_t>(0, unit.part * columns - call_.offset) / kPanelRows;
    return call_.gate.panel_address(blocks_[unit.block].expert, std::min(first, call_.gate.panels_per_lead()));
  }

  int64_t padded_rows(const TileBlock& b) const {
    return tile(b.tile_last - 1).offset + tile(b.tile_last - 1).padded - tile(b.tile_first).offset;
  }

  // Quantizes columns [begin, begin + n) of a block's hidden values, padding included.
  void quantize_hidden(const TileBlock& b, int64_t begin, int64_t n, const float* values, int64_t ld) const {
    alignas(64) float lost[kColumns];
    for (int64_t t = b.tile_first; t < b.tile_last; values += tile(t).padded * ld, ++t) {
      const ActTile out = hidden_.columns(tile(t), begin);
      const int padded = tile(t).padded;
      for (int m = 0; m < tile(t).rows; ++m) quantize(hidden_, out, padded, m, values + m * ld, n, lost);
      for (int m = each() * tile(t).rows; m < padded; ++m) {
        kernels_.quantize(hidden_.format(), values, n, out, padded, m);
      }
    }
  }

  void hidden_values(const TileBlock& b, int64_t column_block, const uint8_t* next) const {
    const int64_t begin = column_block * kColumns;
    const int64_t end = std::min(begin + kColumns, call_.down.k);
    const size_t bytes = static_cast<size_t>(padded_rows(b) * kColumns) * sizeof(float);
    float* values = reinterpret_cast<float*>(thread_memory(ThreadSlot::kHidden, bytes));
    gated(b, begin, end, next, values, kColumns);
    quantize_hidden(b, begin, end - begin, values, kColumns);
  }

  // The same in smaller units; whichever thread completes a block of columns quantizes it. `values`: [padded rows, K].
  void hidden_values_split(int64_t column_blocks, float* values) const {
    const int64_t k = call_.down.k;
    const int64_t parts = (k + kFewColumns - 1) / kFewColumns;
    constexpr int64_t kPartsPerBlock = kColumns / kFewColumns;
    const size_t counters = blocks_.size() * static_cast<size_t>(column_blocks);
    const std::unique_ptr<std::atomic<int>[]> done(new std::atomic<int>[counters]());
    const std::vector<HiddenUnit> units = hidden_units(blocks_, parts);
    parallel_for(static_cast<int64_t>(units.size()), [&](int64_t i) {
      const HiddenUnit& unit = units[static_cast<size_t>(i)];
      const TileBlock& b = blocks_[unit.block];
      const int64_t part = unit.part;
      const int64_t column_block = part / kPartsPerBlock;
      float* rows = values + tile(b.tile_first).offset * k;
      gated(b, part * kFewColumns, std::min((part + 1) * kFewColumns, k), first_panel(units, i + 1, kFewColumns),
            rows + part * kFewColumns, k);
      const int64_t begin = column_block * kColumns;
      const int64_t end = std::min(begin + kColumns, k);
      const int all = static_cast<int>((end - begin + kFewColumns - 1) / kFewColumns);
      std::atomic<int>& counter =
          done[unit.block * static_cast<size_t>(column_blocks) + static_cast<size_t>(column_block)];
      if (counter.fetch_add(1, std::memory_order_acq_rel) + 1 == all) {
        quantize_hidden(b, begin, end - begin, rows + begin, k);
      }
    });
  }

  void output() const {
    const int64_t panels = call_.down.panels_per_lead();
    const int64_t fitting = kOutputBytes / (tokens_ * kPanelRows * static_cast<int64_t>(sizeof(float)));
    // Few rows stay in the cache from panel to panel: then small units, so that no thread waits long for another.
    const int64_t units = plan_.padded_rows * call_.down.k <= kBlockBytes ? 16 : 8;
    const int64_t chunk = std::clamp<int64_t>(std::min(fitting, panels / (units * threads())), 1, 8);
    const std::vector<TileBlock> blocks = block_tiles(plan_, row_bytes(call_.down));
    parallel_for((panels + chunk - 1) / chunk,
                 [&](int64_t unit) { output_columns(blocks, unit * chunk, std::min((unit + 1) * chunk, panels)); });
  }

  // Panels [first, last) of `down` for all tokens.
  void output_columns(const std::vector<TileBlock>& blocks, int64_t first, int64_t last) const {
    const Weights& w = call_.down;
    const int64_t ld = (last - first) * kPanelRows;
    const size_t bytes = static_cast<size_t>(tokens_ * ld) * sizeof(float);
    float* sums = reinterpret_cast<float*>(thread_memory(ThreadSlot::kOutput, bytes));
    std::memset(sums, 0, bytes);
    alignas(64) float products[kMaxTileRows * kPanelRows];
    for (size_t i = 0; i < blocks.size(); ++i) {
      const TileBlock& b = blocks[i];
      for (int64_t panel = first; panel < last; ++panel) {
        const uint8_t* data = w.panel(b.expert, panel);
        const uint8_t* next = panel + 1 < last          ? w.panel_address(b.expert, panel + 1)
                              : i + 1 < blocks.size() ? w.panel_address(blocks[i + 1].expert, first)
                                                      : w.panel_address(blocks[0].expert, last);
        for (int64_t t = b.tile_first; t < b.tile_last; ++t) {
          kernels_.panel(w.type->type, tile(t).padded)(data, next, w.kernel_k(), hidden_.tile(tile(t)), products,
                                                       kPanelRows);
          if (call_.precise) add_pairs(products, tile(t).rows);
          const size_t row = static_cast<size_t>(tile(t).first);
          kernels_.add_rows(products, tile(t).rows, &plan_.weight[row], &plan_.token[row],
                            sums + (panel - first) * kPanelRows, ld);
        }
      }
    }
    const OutputRows out{call_.out, call_.out_bf16, w.n};
    const int64_t columns = std::min(ld, w.n - first * kPanelRows);
    for (int64_t t = 0; t < tokens_; ++t) out.write(first_ + t, first * kPanelRows, sums + t * ld, columns);
  }

  const Kernels& kernels_ = kernels();
  const ExpertsCall& call_;
  const int64_t first_;
  const int64_t tokens_;
  const ExpertPlan plan_;
  Activations gate_in_;
  Activations up_in_;
  Activations hidden_;
  std::vector<TileBlock> blocks_;
};

}  // namespace

void experts(const ExpertsCall& call) {
  for (int64_t first = 0; first < call.tokens; first += kTokensAtOnce) {
    ExpertsRun(call, first, std::min(kTokensAtOnce, call.tokens - first)).run();
  }
}

}  // namespace ktx
