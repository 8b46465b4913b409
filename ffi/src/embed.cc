// SPDX-License-Identifier: Apache-2.0
#include "embed.h"

#include "arrays.h"
#include "dequantize.h"
#include "thread_pool.h"

namespace ktx {

void embed(const Weights& w, const int32_t* ids, int64_t n, void* out, bool out_bf16) {
  constexpr int64_t kRowsAtOnce = 8;  // less is not worth waking a thread
  const OutputRows rows{out, out_bf16, w.k};
  parallel_for((n + kRowsAtOnce - 1) / kRowsAtOnce, [&](int64_t unit) {
    float* buffer = reinterpret_cast<float*>(thread_memory(ThreadSlot::kRow, static_cast<size_t>(w.k) * sizeof(float)));
    for (int64_t i = unit * kRowsAtOnce; i < n && i < (unit + 1) * kRowsAtOnce; ++i) {
      const uint8_t* source = w.blocks.lead[0] + ids[i] * w.blocks.row_stride;
      dequantize_row(w.type->type, source, w.blocks_per_row(), buffer);
      rows.write(i, 0, buffer, w.k);
    }
  });
}

}  // namespace ktx
