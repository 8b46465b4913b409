// SPDX-License-Identifier: Apache-2.0
// Weights in host memory, behind integer handles.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "memory.h"
#include "types.h"

namespace ktx {

// A view of raw ggml blocks [lead, n, k / block_size, type_size]; the last two axes contiguous, strides in bytes.
struct BlocksView {
  const uint8_t* data;
  std::vector<const uint8_t*> lead;  // the start of each leading index
  int64_t row_stride;
  std::shared_ptr<void> owner;  // of the memory
};

struct Weights {
  const TypeInfo* type;
  std::vector<int64_t> shape;  // logical [*lead, n, k]
  int64_t lead;
  int64_t n;
  int64_t k;

  bool repacked;
  Buffer panels;      // repacked: [lead][ceil(n / 16)] panels of panel_bytes
  BlocksView blocks;  // not repacked
  int64_t panel_size;

  int64_t blocks_per_row() const { return k / type->block_size; }
  // K as panel kernels count it.
  int64_t kernel_k() const { return type->group == 0 ? k : k / 32; }
  int64_t panels_per_lead() const { return (n + 15) / 16; }

  // Panel `index` of leading index `lead_index`. Weights that are not repacked are interleaved into the thread's
  // memory.
  const uint8_t* panel(int64_t lead_index, int64_t index) const;
  // Where it lies; nullptr unless repacked.
  const uint8_t* panel_address(int64_t lead_index, int64_t index) const {
    return repacked ? panels.data() + (lead_index * panels_per_lead() + index) * panel_size : nullptr;
  }
};

// Registers weights; repacking runs on all threads. Throws std::bad_alloc.
uint32_t register_weights(const TypeInfo& type, std::vector<int64_t> shape, BlocksView blocks, bool repack);

// Frees a handle; calls that use it finish first. Unknown handles are ignored.
void release_weights(uint32_t handle);

// nullptr for a handle that is unknown or freed.
std::shared_ptr<const Weights> find_weights(uint32_t handle);

}  // namespace ktx
