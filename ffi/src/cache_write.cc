// SPDX-License-Identifier: Apache-2.0
#include "cache_write.h"

#include "arrays.h"
#include "memory.h"

namespace ktx {

void cache_write(void* cache, bool cache_bf16, const void* rows, bool rows_bf16, const int32_t* slots, int64_t tokens,
                 int64_t width) {
  const InputRows in{rows, rows_bf16, width};
  const OutputRows out{cache, cache_bf16, width};
  float* buffer = reinterpret_cast<float*>(thread_memory(ThreadSlot::kRow, static_cast<size_t>(width) * sizeof(float)));
  for (int64_t t = 0; t < tokens; ++t) {
    if (slots[t] >= 0) out.write(slots[t], 0, in.row(t, width, buffer), width);
  }
}

}  // namespace ktx
