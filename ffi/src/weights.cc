// SPDX-License-Identifier: Apache-2.0
#include "weights.h"

#include <algorithm>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <utility>

#include "pack.h"
#include "thread_pool.h"

namespace ktx {
namespace {

struct Registry {
  std::shared_mutex mutex;
  std::unordered_map<uint32_t, std::shared_ptr<const Weights>> weights;
  uint32_t next = 1;  // handles are not used twice; 0 is never one
};

Registry& registry() {
  static Registry* r = new Registry;  // never destroyed: objects may be freed late at exit
  return *r;
}

void repack(Weights* w) {
  const int64_t panels = w->panels_per_lead();
  w->panels = Buffer(static_cast<size_t>(w->lead * panels * w->panel_size));
  parallel_for(w->lead * panels, [w, panels](int64_t i) {
    const int64_t first = i % panels * kPanelRows;
    const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, w->n - first));
    const uint8_t* source = w->blocks.lead[static_cast<size_t>(i / panels)] + first * w->blocks.row_stride;
    pack_panel(w->type->type, source, w->blocks.row_stride, rows, w->blocks_per_row(),
               w->panels.data() + i * w->panel_size);
  });
  w->blocks = {};
}

}  // namespace

const uint8_t* Weights::panel(int64_t lead_index, int64_t index) const {
  if (repacked) return panel_address(lead_index, index);
  uint8_t* out = thread_memory(ThreadSlot::kPanel, static_cast<size_t>(panel_size));
  const int64_t first = index * kPanelRows;
  const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, n - first));
  pack_panel(type->type, blocks.lead[static_cast<size_t>(lead_index)] + first * blocks.row_stride, blocks.row_stride,
             rows, blocks_per_row(), out);
  return out;
}

uint32_t register_weights(const TypeInfo& type, std::vector<int64_t> shape, BlocksView blocks, bool repack_now) {
  auto w = std::make_shared<Weights>();
  w->type = &type;
  w->n = shape[shape.size() - 2];
  w->k = shape[shape.size() - 1];
  w->lead = 1;
  for (size_t i = 0; i + 2 < shape.size(); ++i) w->lead *= shape[i];
  w->shape = std::move(shape);
  w->repacked = repack_now;
  w->blocks = std::move(blocks);
  w->panel_size = panel_bytes(type.type, w->blocks_per_row());
  if (repack_now) repack(w.get());
  std::unique_lock<std::shared_mutex> lock(registry().mutex);
  const uint32_t handle = registry().next++;
  registry().weights.emplace(handle, std::move(w));
  return handle;
}

void release_weights(uint32_t handle) {
  std::shared_ptr<const Weights> last;  // freed after the lock
  std::unique_lock<std::shared_mutex> lock(registry().mutex);
  const auto it = registry().weights.find(handle);
  if (it == registry().weights.end()) return;
  last = std::move(it->second);
  registry().weights.erase(it);
}

std::shared_ptr<const Weights> find_weights(uint32_t handle) {
  std::shared_lock<std::shared_mutex> lock(registry().mutex);
  const auto it = registry().weights.find(handle);
  return it == registry().weights.end() ? nullptr : it->second;
}

}  // namespace ktx
