// SPDX-License-Identifier: Apache-2.0
#include "attention.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "arrays.h"
#include "isa.h"
#include "memory.h"
#include "thread_pool.h"

namespace ktx {
namespace {

constexpr int64_t kChunk = 512;         // positions, a multiple of the tile
constexpr int64_t kGroupsTogether = 8;  // share each packed tile; their states stay in the second-level cache

constexpr size_t kSplitBytes = size_t{256} << 20;  // of chunks' states, at most

// Sixteen heads of one token.
struct Group {
  int64_t token;
  int64_t head;
  int heads;
  int64_t length;  // rows it attends
};

struct Block {  // consecutive groups of one sequence
  size_t first;
  size_t last;
  int64_t sequence;
  int64_t length;  // of the longest
};

void check_indices(const AttentionCall& c) {
  std::vector<int64_t> longest(static_cast<size_t>(c.sequences), 0);
  for (int64_t t = 0; t < c.tokens; ++t) {
    const int32_t sequence = c.sequence[t];
    if (sequence < 0) continue;
    if (sequence >= c.sequences) {
      throw std::invalid_argument("token " + std::to_string(t) + " is of sequence " + std::to_string(sequence) +
                                  ", but block_tables has " + std::to_string(c.sequences));
    }
    if (c.positions[t] < 0 || c.positions[t] >= c.max_pages * c.page_size) {
      throw std::invalid_argument("token " + std::to_string(t) + " is at position " + std::to_string(c.positions[t]) +
                                  ", outside the " + std::to_string(c.max_pages) + " pages of " +
                                  std::to_string(c.page_size) + " rows of a block table");
    }
    int64_t& length = longest[static_cast<size_t>(sequence)];
    length = std::max<int64_t>(length, c.positions[t] + 1);
  }
  for (int64_t b = 0; b < c.sequences; ++b) {
    for (int64_t i = 0; i * c.page_size < longest[static_cast<size_t>(b)]; ++i) {
      const int32_t page = c.block_tables[b * c.max_pages + i];
      if (page < 0 || page >= c.pages) {
        throw std::invalid_argument("block table " + std::to_string(b) + " names page " + std::to_string(page) +
                                    " at entry " + std::to_string(i) + ", but the cache has " +
                                    std::to_string(c.pages));
      }
    }
  }
}

class AttentionRun {
 public:
  explicit AttentionRun(const AttentionCall& call)
      : call_(call), kernels_(attention_kernels(call.cache_bf16)), shape_(call.shape) {
    query_bytes_ = kernels_.query_bytes(shape_);
    tile_bytes_ = kernels_.tile_bytes(shape_);
    state_bytes_ = static_cast<size_t>(shape_.state_floats()) * sizeof(float);
  }

  void run() {
    make_groups();
    if (groups_.empty()) return;
    const int64_t count = static_cast<int64_t>(groups_.size());
    const int64_t chunks = (longest_ + kChunk - 1) / kChunk;
    const size_t split_bytes = static_cast<size_t>(count * chunks) * state_bytes_;
    make_blocks(kGroupsTogether);
    const bool few = static_cast<int64_t>(blocks_.size()) < 2 * threads();
    if (few && chunks > 1 && split_bytes <= kSplitBytes) return run_split(chunks);
    make_blocks(std::clamp<int64_t>(count / (4 * threads()), 1, kGroupsTogether));
    // Later tokens attend more rows: the longest work comes first.
    parallel_for(static_cast<int64_t>(blocks_.size()),
                 [&](int64_t i) { whole_block(blocks_[blocks_.size() - 1 - static_cast<size_t>(i)]); });
  }

 private:
  void make_groups() {
    for (int64_t t = 0; t < call_.tokens; ++t) {
      if (call_.sequence[t] < 0) {
        const size_t row = static_cast<size_t>(call_.heads * shape_.latent) * (call_.q_bf16 ? 2 : 4);
        std::memset(static_cast<uint8_t*>(call_.out) + static_cast<size_t>(t) * row, 0, row);
        continue;
      }
      for (int64_t h = 0; h < call_.heads; h += kHeadLanes) {
        const int heads = static_cast<int>(std::min<int64_t>(kHeadLanes, call_.heads - h));
        groups_.push_back({t, h, heads, call_.positions[t] + 1});
        longest_ = std::max(longest_, groups_.back().length);
      }
    }
  }

  void make_blocks(int64_t together) {
    blocks_.clear();
    for (size_t i = 0; i < groups_.size(); ++i) {
      const int64_t sequence = call_.sequence[groups_[i].token];
      const bool joins = !blocks_.empty() && blocks_.back().sequence == sequence &&
                         static_cast<int64_t>(i - blocks_.back().first) < together;
      if (!joins) blocks_.push_back({i, i, sequence, 0});
      blocks_.back().last = i + 1;
      blocks_.back().length = std::max(blocks_.back().length, groups_[i].length);
    }
  }

  const void* cache_row(int64_t sequence, int64_t position) const {
    const int64_t page = call_.block_tables[sequence * call_.max_pages + position / call_.page_size];
    const int64_t row = page * call_.page_size + position % call_.page_size;
    const int64_t size = (shape_.latent + shape_.rope) * (call_.cache_bf16 ? 2 : 4);
    return static_cast<const uint8_t*>(call_.cache) + row * size;
  }

  // Rows of a block's sequence from `begin` on; nullptr behind the last.
  void tile_rows(const Block& b, int64_t begin, const void** rows) const {
    for (int i = 0; i < kTilePositions; ++i) rows[i] = begin + i < b.length ? cache_row(b.sequence, begin + i) : nullptr;
  }

  void pack_query(const Group& g, uint8_t* out) const {
    const int64_t row = g.token * call_.heads + g.head;
    const size_t latent = static_cast<size_t>(g.heads * shape_.latent);
    const size_t rope = static_cast<size_t>(g.heads * shape_.rope);
    float* buffer = reinterpret_cast<float*>(thread_memory(ThreadSlot::kRow, (latent + rope) * sizeof(float)));
    const InputRows latents{call_.q_latent, call_.q_bf16, shape_.latent};
    const InputRows ropes{call_.q_rope, call_.q_bf16, shape_.rope};
    const float* l = latents.row(row, static_cast<int64_t>(latent), buffer);
    const float* r = ropes.row(row, static_cast<int64_t>(rope), buffer + latent);
    kernels_.pack_query(shape_, l, r, g.heads, out);
  }

  // Heads [first, last) of a group.
  void write(const Group& g, const float* tops, const float* mean, int first, int last) const {
    const int64_t n = (last - first) * shape_.latent;
    float* values = reinterpret_cast<float*>(thread_memory(ThreadSlot::kRow, static_cast<size_t>(n) * sizeof(float)));
    kernels_.finish(shape_, tops, mean, first, last, values);
    const OutputRows out{call_.out, call_.q_bf16, shape_.latent};
    out.write(g.token * call_.heads + g.head + first, 0, values, n);
  }

  // One chunk of positions for every group of a block, each into its own state.
  void chunk(const Block& b, int64_t first, const uint8_t* queries, uint8_t* tile, float* const* states) const {
    const int64_t last = std::min(first + kChunk, b.length);
    const void* pointers[2][kTilePositions];
    const void** rows = pointers[0];
    const void** ahead = pointers[1];  // the rows of the next tile, which are fetched meanwhile, of the next chunk too
    tile_rows(b, first, rows);
    for (int64_t begin = first; begin < last; begin += kTilePositions, std::swap(rows, ahead)) {
      const int n = static_cast<int>(std::min<int64_t>(kTilePositions, last - begin));
      tile_rows(b, begin + kTilePositions, ahead);
      kernels_.pack_tile(shape_, rows, ahead, n, call_.cache_bf16, tile);
      for (size_t g = b.first; g < b.last; ++g) {
        const int valid = static_cast<int>(std::min<int64_t>(n, groups_[g].length - begin));
        if (valid <= 0) continue;
        kernels_.attend(shape_, queries + (g - b.first) * query_bytes_, tile, valid, call_.scale, states[g - b.first]);
      }
    }
  }

  void whole_block(const Block& b) const {
    const size_t n = b.last - b.first;
    uint8_t* memory = thread_memory(ThreadSlot::kHidden, n * (query_bytes_ + 2 * state_bytes_) + tile_bytes_);
    uint8_t* queries = memory + tile_bytes_;
    float* states[kGroupsTogether];
    float* partial[kGroupsTogether];
    for (size_t i = 0; i < n; ++i) {
      pack_query(groups_[b.first + i], queries + i * query_bytes_);
      states[i] = reinterpret_cast<float*>(queries + n * query_bytes_ + i * state_bytes_);
      partial[i] = reinterpret_cast<float*>(queries + n * (query_bytes_ + state_bytes_) + i * state_bytes_);
      kernels_.reset(shape_, states[i]);
    }
    chunk(b, 0, queries, memory, states);
    for (int64_t first = kChunk; first < b.length; first += kChunk) {
      for (size_t i = 0; i < n; ++i) kernels_.reset(shape_, partial[i]);
      chunk(b, first, queries, memory, partial);
      for (size_t i = 0; i < n; ++i) {
        if (groups_[b.first + i].length > first)
          kernels_.merge(shape_, partial[i], states[i], means(states[i]), 0, kHeadLanes);
      }
    }
    for (size_t i = 0; i < n; ++i) {
      const Group& g = groups_[b.first + i];
      write(g, states[i], means(states[i]), 0, g.heads);
    }
  }

  // Few blocks over long contexts: every chunk is a unit of work.
  void run_split(int64_t chunks) const {
    const int64_t count = static_cast<int64_t>(groups_.size());
    const size_t query_total = static_cast<size_t>(count) * query_bytes_;
    Scratch scratch(query_total + static_cast<size_t>(count * chunks) * state_bytes_ + 64);
    uint8_t* queries = scratch.take<uint8_t>(query_total);
    float* states = scratch.take<float>(static_cast<size_t>(count * chunks * shape_.state_floats()));
    const auto state = [&](size_t group, int64_t c) {
      return states + (static_cast<int64_t>(group) * chunks + c) * shape_.state_floats();
    };
    for (size_t i = 0; i < groups_.size(); ++i) pack_query(groups_[i], queries + i * query_bytes_);
    parallel_for(static_cast<int64_t>(blocks_.size()) * chunks, [&](int64_t unit) {
      const int64_t c = unit % chunks;
      const Block& b = blocks_[static_cast<size_t>(unit / chunks)];
      if (c * kChunk >= b.length) return;
      float* mine[kGroupsTogether];
      for (size_t g = b.first; g < b.last; ++g) {
        mine[g - b.first] = state(g, c);
        kernels_.reset(shape_, state(g, c));
      }
      uint8_t* tile = thread_memory(ThreadSlot::kHidden, tile_bytes_);
      chunk(b, c * kChunk, queries + b.first * query_bytes_, tile, mine);
    });
    // Merging reads every chunk's state: heads are spread over threads too.
    constexpr int kHeads = 4;
    parallel_for(count * kHeadLanes / kHeads, [&](int64_t unit) {
      const size_t i = static_cast<size_t>(unit / (kHeadLanes / kHeads));
      const Group& g = groups_[i];
      const int first = static_cast<int>(unit % (kHeadLanes / kHeads)) * kHeads;
      const int last = std::min(first + kHeads, g.heads);
      if (first >= last) return;
      float* mean = means(state(i, 0));
      alignas(64) float tops[2 * kHeadLanes];
      std::memcpy(tops, state(i, 0), sizeof tops);
      const int64_t used = (g.length + kChunk - 1) / kChunk;
      for (int64_t c = 1; c < used; ++c) kernels_.merge(shape_, state(i, c), tops, mean, first, last);
      write(g, tops, mean, first, last);
    });
  }

  static float* means(float* state) { return state + 2 * kHeadLanes; }

  const AttentionCall& call_;
  const AttentionKernels& kernels_;
  const LatentShape shape_;
  size_t query_bytes_;
  size_t tile_bytes_;
  size_t state_bytes_;
  std::vector<Group> groups_;
  std::vector<Block> blocks_;
  int64_t longest_ = 0;
};

}  // namespace

void mla_attention(const AttentionCall& call) {
  check_indices(call);
  AttentionRun(call).run();
}

}  // namespace ktx
